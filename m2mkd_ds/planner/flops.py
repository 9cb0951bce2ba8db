"""Floating-point operations of one image, from the shapes of the models: 2 for every multiply-add, element-wise work left out.

    linear map           rows * 2 * in * out                patches: one map of 3 P^2 numbers to D, for L' = (S / P)^2 rows
    attention            4 * L^2 * D                        scores and weighted sum, over all heads
    dense block          L rows through qkv, proj, fc1, fc2, and attention
    MoE block            the router, and K experts a token; neither padding nor drops (expert choice: capacity_factor experts a token)

Backward, for the input alone: a linear map once more, attention twice (both factors have a gradient). For weights and input: a linear
map twice, attention twice; the patch map once, because nobody asks for the gradient of the image. Recomputation, which flash attention
and gradient checkpointing do, is not counted. Letters: L tokens, D width, F hidden width, P patch, S image side, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from m2mkd_ds.models.vit import VitStage
from m2mkd_ds.models.vmoe import StageSpan, StitchSpec, VMoEArch


@dataclass(frozen=True)
class Flops:
    """Of one forward pass of one image, by kind, because their backward passes differ."""

    linear: float = 0.0
    attention: float = 0.0
    constant: float = 0.0
    """Maps of what has no gradient: the image's patches, the learned queries of an attention pool."""

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.constant + other.constant)

    @property
    def forward(self) -> float:
        """The forward pass."""
        return self.linear + self.attention + self.constant

    @property
    def input_backward(self) -> float:
        """The backward pass through frozen weights, to the input."""
        return self.linear + 2 * self.attention

    @property
    def full_backward(self) -> float:
        """The backward pass to all weights."""
        return 2 * (self.linear + self.attention) + self.constant


def linear(rows: float, in_dim: int, out_dim: int) -> float:
    """Of a linear map."""
    return 2.0 * rows * in_dim * out_dim


def vit_stage_tokens(stage: VitStage) -> int:
    """L: patches, class token and registers."""
    grid: int = stage.patch_embed.num_patches
    return grid + int(stage.num_prefix_tokens)


def vit_stage_flops(stage: VitStage, tokens: int) -> Flops:
    """Of a stage of teacher or meta model; `tokens` is L, which only a first stage knows.

    Raises ValueError for parts whose work does not follow from their linear maps.
    """
    total = Flops()
    if stage.span.is_first:
        stem = stage.patch_embed.proj
        if not isinstance(stem, nn.Conv2d):
            raise ValueError(f"the stem {type(stage.patch_embed).__name__} is not one of plain patches; its FLOPs are not known here")
        per_patch = stem.in_channels * stem.kernel_size[0] * stem.kernel_size[1]
        total += Flops(constant=linear(stage.patch_embed.num_patches, per_patch, stem.out_channels))
    for number in stage.span.blocks:
        total += _vit_block_flops(stage.blocks[str(number)], tokens)
    return total + (_tail_flops(stage, tokens) if stage.span.is_last else Flops())


def _vit_block_flops(block: nn.Module, tokens: int) -> Flops:
    """Every linear map of a timm block sees all tokens; every module with heads holds one attention."""
    convolutions = [name for name, module in block.named_modules() if isinstance(module, (nn.Conv1d, nn.Conv2d))]
    if convolutions:
        raise ValueError(f"blocks of {type(block).__name__} have convolutions ({', '.join(convolutions)}); their FLOPs are not known here")
    maps = sum(linear(tokens, m.in_features, m.out_features) for m in block.modules() if isinstance(m, nn.Linear))
    widths = [int(m.num_heads) * int(m.head_dim) for m in block.modules() if hasattr(m, "num_heads") and hasattr(m, "head_dim")]  # type: ignore[arg-type]
    return Flops(linear=maps, attention=4.0 * tokens**2 * sum(widths))


def _tail_flops(stage: VitStage, tokens: int) -> Flops:
    """The head sees one row; an attention pool asks for it with a few learned queries."""
    head = stage.head
    total = Flops(linear=linear(1, head.in_features, head.out_features) if isinstance(head, nn.Linear) else 0.0)
    pool = stage.attn_pool
    if pool is None:
        return total
    queries, seen = pool.latent_len, pool.num_heads * pool.head_dim
    rows = {name: tokens if name == "kv" else queries for name, m in pool.named_modules() if isinstance(m, nn.Linear) and name != "q"}
    maps = sum(linear(n, pool.get_submodule(name).in_features, pool.get_submodule(name).out_features) for name, n in rows.items())
    # Of the scores, only the keys have a gradient: once more in the backward pass, as a linear map.
    scores = weighted_sum = 2.0 * queries * tokens * seen
    return total + Flops(linear=maps + scores, attention=weighted_sum, constant=linear(queries, pool.q.in_features, pool.q.out_features))


def student_flops(arch: VMoEArch, span: StageSpan, stitches: Sequence[StitchSpec], tokens: int) -> Flops:
    """Of a module of the student with its stitch layers; `tokens` is L of what goes in: the teacher's, or of a first module its own."""
    width = arch.embed_dim
    total = Flops()
    if span.is_first:
        total += Flops(constant=linear((arch.image_size // arch.patch_size) ** 2, 3 * arch.patch_size**2, width))
    for number in span.blocks:
        mlp = _experts_flops(arch, tokens) if number in arch.moe_blocks else 2 * linear(tokens, width, arch.hidden_dim)
        total += Flops(linear=linear(tokens, width, 4 * width) + mlp, attention=4.0 * tokens**2 * width)
    total += Flops(linear=sum(linear(tokens, stitch.in_dim, stitch.out_dim) for stitch in stitches))
    return total + (Flops(linear=linear(1, width, arch.num_classes)) if span.is_last else Flops())


def experts_a_token(arch: VMoEArch) -> float:
    """Experts that work on a token, on the average."""
    router = arch.router
    return min(router.capacity_factor, arch.num_experts) if router.kind == "expert_choice" else router.top_k


def _experts_flops(arch: VMoEArch, tokens: int) -> float:
    rows = tokens * experts_a_token(arch)
    up_width = arch.hidden_dim * (2 if arch.activation == "swiglu" else 1)
    router = linear(tokens, arch.embed_dim, arch.num_experts)
    return router + linear(rows, arch.embed_dim, up_width) + linear(rows, arch.hidden_dim, arch.embed_dim)
