"""The meta model: a VitStage over a few blocks of the teacher's architecture, and what aligning it to a teacher needs.

A meta model trained from scratch (Deep Incubation) is a plain VitStage. For a pretrained teacher it starts from the
teacher's own blocks (`meta_from_teacher`) and shows its hidden state after every stage (`BoundaryVit`), so that a loss can
pull each one towards the teacher's. Shape letters: B images, C channels, L tokens, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitStage


class BoundaryVit(VitStage):
    """A whole VitStage that returns the hidden state after each of `spans`; the last entry is the logits.

    Takes over the parts of `whole` (same parameters, same state-dict names). Raises ValueError if `whole` is not a whole
    model or `spans` do not follow each other over all its blocks.
    """

    def __init__(self, whole: VitStage, spans: Sequence[StageSpan]) -> None:
        super().__init__(whole, whole.span)
        _check_cover(whole.span.num_blocks, spans, "spans")
        if not (whole.span.is_first and whole.span.is_last):
            raise ValueError(f"boundaries need a whole model; this stage holds blocks {whole.span.first_block}..{whole.span.last_block}")
        self.boundaries = tuple(span.last_block for span in spans)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:  # type: ignore[override]
        """Images [B, C, H, W] -> [hidden_BLD after stage 0, ..., hidden_BLD after the last but one, logits_BV]."""
        states = []
        x_BLD = self.enter(images_BCHW)
        for number in self.span.blocks:
            x_BLD = self.run_block(number, x_BLD)
            if number in self.boundaries[:-1]:
                states.append(x_BLD)
        return [*states, self.leave(x_BLD)]


def run_stages(stages: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Run separate stages one after the other and keep every output: for all stages of a model, what BoundaryVit returns."""
    outputs: list[Tensor] = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs


def chosen_blocks(teacher_spans: Sequence[StageSpan], meta_spans: Sequence[StageSpan]) -> tuple[int, ...]:
    """The teacher block that each meta block starts from, in the order of the meta blocks.

    The meta blocks of stage i are the middles of equal parts of the teacher's stage i: with 6 teacher blocks, one meta
    block takes number 3 of 0..5, two take 1 and 4, three take 1, 3 and 5. A meta stage deeper than the teacher's repeats
    blocks. Raises ValueError if the two differ in the number of stages or either leaves a gap.
    """
    if len(teacher_spans) != len(meta_spans):
        raise ValueError(f"the teacher has {len(teacher_spans)} stages and the meta model {len(meta_spans)}; give both the same number")
    for what, spans in (("teacher_spans", teacher_spans), ("meta_spans", meta_spans)):
        _check_cover(spans[0].num_blocks if spans else 0, spans, what)
    return tuple(
        teacher.blocks[(2 * j + 1) * len(teacher.blocks) // (2 * len(meta.blocks))]
        for teacher, meta in zip(teacher_spans, meta_spans, strict=True)
        for j in range(len(meta.blocks))
    )


def meta_from_teacher(
    teacher: Mapping[str, Tensor], teacher_spans: Sequence[StageSpan], meta_spans: Sequence[StageSpan]
) -> dict[str, Tensor]:
    """First weights of a meta model: the teacher's embeddings, norm and head, and an even choice of its blocks (`chosen_blocks`).

    `teacher` holds the whole teacher under canonical names. The result does too, for the meta model's depth; every tensor
    is a copy, so training it leaves the teacher alone. Raises ValueError if the teacher's blocks are not those of
    `teacher_spans`.
    """
    by_block: dict[int, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for name, tensor in teacher.items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            by_block.setdefault(int(block), {})[rest] = tensor
        else:
            weights[name] = tensor.clone()
    sources = chosen_blocks(teacher_spans, meta_spans)
    expected = range(teacher_spans[0].num_blocks)
    if sorted(by_block) != list(expected):
        raise ValueError(
            f"the teacher's weights hold blocks {sorted(by_block)} and its stages blocks 0..{len(expected) - 1}; give all of them"
        )
    for number, source in enumerate(sources):
        weights.update({f"blocks.{number}.{rest}": tensor.clone() for rest, tensor in by_block[source].items()})
    return weights


def _check_cover(num_blocks: int, spans: Sequence[StageSpan], what: str) -> None:
    """Raise ValueError unless `spans` list blocks 0..num_blocks-1 once each, in order."""
    listed = [number for span in spans for number in span.blocks]
    if listed != list(range(num_blocks)) or not listed or any(span.num_blocks != num_blocks for span in spans):
        raise ValueError(f"{what} list the blocks {listed}; they must follow each other over all {num_blocks} blocks of the model")
