"""Key names of the older releases (Deep Incubation, the m2mKD authors, fastmoe) as mapping rules to canonical names.

The trees differ in three ways. (1) A model registers every block twice: as `blocks.N` and, on the same storage, as
`stages.K.blocks.J`; a checkpoint holds both, and a third time, a list `model_stages` of one state dict a stage. (2) Stitch layers sit
inside the first and last block of a stage (`blocks.J.pre_stitch.ln|fc`). (3) The MoE layer is fastmoe's: router `moe.gate.gate`, experts
`htoh4` and `h4toh`, either one fused module with a leading expert axis (fastmoe up to 0.2) or a list of modules of one expert each (from
1.0). Here E experts, D width, F expert hidden, V classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from m2mkd_ds.checkpoint.mapping import Alias, Drop, Rename, SourceRule, Stack
from m2mkd_ds.models.spans import StageSpan, stage_spans

_FIRST_PARTS = r"patch_embed\..+|cls_token|pos_embed"
_LAST_PARTS = r"(?:norm|head)\..+"


class LegacyError(ValueError):
    """An old checkpoint that cannot be read, or that is not what was asked for; the message says what to do."""


def stage_depths_of(names: Sequence[str], prefix: str) -> tuple[int, ...]:
    """Blocks of each stage, counted from keys such as `<prefix>K.blocks.J.*`; () when there are none.

    Raises LegacyError when numbers are missing in between, because then it is not known which blocks these are.
    """
    found: dict[int, set[int]] = {}
    for name in names:
        match = re.match(re.escape(prefix) + r"(\d+)\.blocks\.(\d+)\.", name)
        if match:
            found.setdefault(int(match[1]), set()).add(int(match[2]))
    for stage, blocks in found.items():
        if sorted(blocks) != list(range(len(blocks))):
            raise LegacyError(f"{prefix}{stage} holds blocks {sorted(blocks)}, expected 0 to {len(blocks) - 1}: keys are missing")
    if sorted(found) != list(range(len(found))):
        raise LegacyError(f"{prefix}* holds stages {sorted(found)}, expected 0 to {len(found) - 1}: keys are missing")
    return tuple(len(found[stage]) for stage in sorted(found))


def stage_rules(file_depths: Sequence[int], target_depths: Sequence[int], target_of: Mapping[int, int]) -> list[SourceRule]:
    """Rules from the file's three copies (`model.blocks.N`, `model.stages.K`, `model_stages.K`) to absolute block numbers.

    `target_of` says which stage of the whole model each wanted stage of the file is; the file's other stages are dropped.
    """
    file_spans, target_spans = stage_spans(file_depths), stage_spans(target_depths)
    shift = {k: target_spans[target].first_block - file_spans[k].first_block for k, target in target_of.items()}
    stage_of = {block: k for k in target_of for block in file_spans[k].blocks}

    def from_model(match: re.Match[str]) -> str:
        block = int(match[1])
        return f"blocks.{block + shift[stage_of[block]] if block in stage_of else block}.{match[2]}"

    def from_stage(match: re.Match[str]) -> str:
        k, j = int(match[1]), int(match[2])
        return f"blocks.{file_spans[k].first_block + j + shift[k]}.{match[3]}"

    stages = r"(?:model\.stages|model_stages)\."
    rules: list[SourceRule] = []
    others = [k for k in range(len(file_depths)) if k not in target_of]
    if others:
        reason = "another stage of the file"
        stage_numbers = "|".join(map(str, others))
        block_numbers = "|".join(str(block) for k in others for block in file_spans[k].blocks)
        rules += [Drop(rf"{stages}(?:{stage_numbers})\..+", reason), Drop(rf"model\.blocks\.(?:{block_numbers})\..+", reason)]
        if 0 in others:
            rules.append(Drop(rf"model\.(?:{_FIRST_PARTS})", reason))
        if len(file_depths) - 1 in others:
            rules.append(Drop(rf"model\.(?:{_LAST_PARTS})", reason))
    return [
        *rules,
        Rename(r"model\.blocks\.(\d+)\.(.+)", from_model),
        Alias(rf"{stages}(\d+)\.blocks\.(\d+)\.(.+)", from_stage),
        Alias(rf"{stages}\d+\.({_FIRST_PARTS}|{_LAST_PARTS})", r"\1"),
        Rename(r"model\.(.+)", r"\1"),
    ]


def canonical_rules(depths: Sequence[int]) -> list[SourceRule]:
    """Rules from the old vocabulary (blocks already numbered in the whole model) to canonical names."""
    spans = stage_spans(depths)

    def stitch(match: re.Match[str]) -> str:
        block, kind = int(match[1]), match[2]
        pair = next((k for k, span in enumerate(spans) if block == (span.first_block if kind == "pre" else span.last_block)), None)
        if pair is None:
            place = "first" if kind == "pre" else "last"
            raise LegacyError(f"{match[0]}: block {block} is not the {place} of a stage of depths {list(depths)}; give the right depths")
        return f"stitches.{pair}.{kind}.{'norm' if match[3] == 'ln' else 'proj'}.{match[4]}"

    rules: list[SourceRule] = [
        Rename(r"blocks\.(\d+)\.(pre|post)_stitch\.(ln|fc)\.(weight|bias)", stitch),
        Rename(r"blocks\.(\d+)\.moe\.gate\.gate\.(weight|bias)", r"blocks.\1.moe.router.\2"),
    ]
    for old, new in (("htoh4", "up_proj"), ("h4toh", "down_proj")):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            to = rf"blocks.\1.moe.experts.{new}{suffix}"
            rules.append(Rename(rf"blocks\.(\d+)\.moe\.experts\.{old}\.{kind}", to))
            rules.append(Stack(rf"blocks\.(\d+)\.moe\.experts\.(?P<index>\d+)\.{old}\.{kind}", to))
    return rules


def expected_shapes(tensors: Mapping[str, Tensor], span: StageSpan) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a complete span, given the sizes and options that its own tensors show.

    Raises LegacyError when not even a block's first norm is there.
    """
    norm = tensors.get(f"blocks.{span.first_block}.norm1.weight")
    if norm is None:
        raise LegacyError(f"no blocks.{span.first_block}.norm1.weight: these are not the weights of a Vision Transformer of these releases")
    width = norm.shape[0]
    shapes: dict[str, tuple[int, ...]] = {}
    for i in span.blocks:
        shapes.update(_block_shapes(tensors, f"blocks.{i}.", width))
    if span.is_first:
        patch, tokens = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
        shapes["patch_embed.proj.weight"] = (width, *(patch.shape[1:] if patch is not None else ()))
        shapes["patch_embed.proj.bias"] = (width,)
        shapes["cls_token"] = (1, 1, width)
        shapes["pos_embed"] = (1, tokens.shape[1] if tokens is not None and tokens.dim() == 3 else 0, width)
    if span.is_last:
        num_classes = _rows(tensors, "head.weight")
        shapes.update({"norm.weight": (width,), "norm.bias": (width,), "head.weight": (num_classes, width), "head.bias": (num_classes,)})
    shapes.update(_stitch_shapes(tensors, width))
    return shapes


def _block_shapes(tensors: Mapping[str, Tensor], at: str, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """A dense block, or a sparse one when a router is there; the two optional biases when any block has them."""
    for norm in ("norm1", "norm2"):
        yield f"{at}{norm}.weight", (width,)
        yield f"{at}{norm}.bias", (width,)
    yield f"{at}attn.qkv.weight", (3 * width, width)
    if any(name.endswith(".attn.qkv.bias") for name in tensors):
        yield f"{at}attn.qkv.bias", (3 * width,)
    yield f"{at}attn.proj.weight", (width, width)
    yield f"{at}attn.proj.bias", (width,)
    if any(name.startswith(f"{at}moe.") for name in tensors):
        experts = _rows(tensors, f"{at}moe.router.weight")
        up = tensors.get(f"{at}moe.experts.up_proj")
        hidden = up.shape[1] if up is not None and up.dim() == 3 else 0
        yield f"{at}moe.router.weight", (experts, width)
        if any(name.endswith(".moe.router.bias") for name in tensors):
            yield f"{at}moe.router.bias", (experts,)
        yield f"{at}moe.experts.up_proj", (experts, hidden, width)
        yield f"{at}moe.experts.up_proj_bias", (experts, hidden)
        yield f"{at}moe.experts.down_proj", (experts, width, hidden)
        yield f"{at}moe.experts.down_proj_bias", (experts, width)
    else:
        hidden = _rows(tensors, f"{at}mlp.fc1.weight")
        yield f"{at}mlp.fc1.weight", (hidden, width)
        yield f"{at}mlp.fc1.bias", (hidden,)
        yield f"{at}mlp.fc2.weight", (width, hidden)
        yield f"{at}mlp.fc2.bias", (width,)


def _stitch_shapes(tensors: Mapping[str, Tensor], width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """All four tensors of every stitch of which any tensor is there."""
    for at in sorted({match[0] for name in tensors if (match := re.match(r"stitches\.\d+\.(?:pre|post)\.", name))}):
        proj = tensors.get(f"{at}proj.weight")
        out_dim, in_dim = (proj.shape[0], proj.shape[1]) if proj is not None and proj.dim() == 2 else (0, 0)
        in_dim, out_dim = (in_dim, width) if at.endswith("pre.") else (width, out_dim)
        yield f"{at}norm.weight", (in_dim,)
        yield f"{at}norm.bias", (in_dim,)
        yield f"{at}proj.weight", (out_dim, in_dim)
        yield f"{at}proj.bias", (out_dim,)


def _rows(tensors: Mapping[str, Tensor], name: str) -> int:
    return tensors[name].shape[0] if name in tensors else 0
