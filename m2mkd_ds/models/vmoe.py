"""VisionMoE: the V-MoE student. One class for a module of a teaching pair and for the whole model, told apart by its span.

    image -> patches + class token + positions -> blocks (attention, then MoE or dense MLP) -> norm -> head

The ViT around the experts follows timm's vit/deit (pre-norm, LayerNorm eps 1e-6, qkv bias, learned positions, class-token
pooling, global drop-path ramp), so a VisionMoE without MoE blocks is a timm ViT, key by key. Shape letters: B images,
C channels, L tokens an image, D width, H heads, V classes. PAPER: arXiv 2402.16918, section 4 (V-MoE-B: MoE in every block).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import MoEConfig, RouterConfig, RunConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.stitch import Stitch
from m2mkd_ds.moe.backends import Activation
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routing import Routing, RoutingStats

LAYER_NORM_EPS = 1e-6


@dataclass(frozen=True)
class VMoEArch:
    """Everything that fixes the shapes and the math of a whole VisionMoE."""

    image_size: int
    patch_size: int
    num_classes: int
    embed_dim: int
    num_heads: int
    mlp_ratio: float
    num_blocks: int
    moe_blocks: tuple[int, ...]
    """Numbers of the blocks with experts, ascending; the others have a dense MLP."""
    num_experts: int
    router: RouterConfig
    backend: str = "auto"
    """Expert compute (`moe.backends`); does not change weights or names."""
    activation: Activation = "gelu"
    """Inside the experts; dense MLPs have GELU. swiglu makes the experts' first map twice as tall."""

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if tuple(sorted(set(self.moe_blocks))) != self.moe_blocks or not set(self.moe_blocks) <= set(range(self.num_blocks)):
            raise ValueError(f"moe_blocks {list(self.moe_blocks)} must be ascending block numbers from 0 to {self.num_blocks - 1}")

    @property
    def num_tokens(self) -> int:
        """L: patches and the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1

    @property
    def hidden_dim(self) -> int:
        """Width inside an MLP and inside each expert."""
        return int(self.embed_dim * self.mlp_ratio)


def moe_block_numbers(moe: MoEConfig, num_blocks: int) -> tuple[int, ...]:
    """Blocks that get experts. all: every block; every: n-1, 2n-1, ...; last: the last n.

    Raises ValueError when placement_n does not fit.
    """
    if moe.placement == "all":
        return tuple(range(num_blocks))
    n = moe.placement_n
    if not 1 <= n <= num_blocks:
        raise ValueError(f"student.moe.placement_n is {n}; allowed is 1 to the student's {num_blocks} blocks")
    if moe.placement == "every":
        return tuple(range(n - 1, num_blocks, n))
    return tuple(range(num_blocks - n, num_blocks))


def arch_from_config(config: RunConfig) -> VMoEArch:
    """The student of a run."""
    student = config.student
    num_blocks = sum(student.depths)
    return VMoEArch(
        image_size=config.data.image_size,
        patch_size=student.patch_size,
        num_classes=config.data.num_classes,
        embed_dim=student.embed_dim,
        num_heads=student.num_heads,
        mlp_ratio=student.mlp_ratio,
        num_blocks=num_blocks,
        moe_blocks=moe_block_numbers(student.moe, num_blocks),
        num_experts=student.moe.num_experts,
        router=student.moe.router,
        backend=student.moe.backend,
        activation=student.moe.activation,
    )


@dataclass(frozen=True)
class StitchSpec:
    """A stitch layer of teaching pair `pair`: `pre` runs before block `block`, `post` after it."""

    pair: int
    kind: Literal["pre", "post"]
    block: int
    in_dim: int
    out_dim: int


class VMoEOutput(NamedTuple):
    """What a forward pass returns. A tuple, because ZeRO-3 looks for the tensors of a module's output in tuples."""

    output: Tensor
    """Logits [B, V] if the span holds the last block, else hidden states [B, L, D] (after the post stitch, if any)."""
    router_losses: dict[str, Tensor]
    """Weighted auxiliary losses by name, summed over the MoE blocks; add them to the task loss."""
    stats: dict[int, RoutingStats]
    """Routing statistics by block number."""


class PatchEmbed(nn.Module):
    """Image [B, 3, S, S] -> patches [B, L-1, D] by a strided convolution."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one fused qkv map."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, length, d = x_BLD.shape
        qkv = self.qkv(x_BLD).reshape(b, length, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed_BHLd = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(mixed_BHLd.transpose(1, 2).reshape(b, length, d))


class Mlp(nn.Module):
    """Dense feed-forward network with exact (erf) GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BLD)))


class DropPath(nn.Module):
    """Stochastic depth: in training, drop a residual branch for a whole image with probability `rate`, scale the kept ones."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x_BLD: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x_BLD
        keep_B11 = x_BLD.new_empty(x_BLD.shape[0], 1, 1).bernoulli_(1 - self.rate)
        return x_BLD * keep_B11.div_(1 - self.rate)


class Block(nn.Module):
    """x + attn(norm1(x)), then x + ffn(norm2(x)); the ffn is `moe` or `mlp`, by which the two kinds' keys differ."""

    def __init__(self, arch: VMoEArch, is_moe: bool, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(arch.embed_dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(arch.embed_dim, arch.num_heads)
        self.norm2 = nn.LayerNorm(arch.embed_dim, eps=LAYER_NORM_EPS)
        if is_moe:
            self.moe = MoELayer(arch.embed_dim, arch.hidden_dim, arch.num_experts, arch.router, arch.backend, arch.activation)
        else:
            self.mlp = Mlp(arch.embed_dim, arch.hidden_dim)
        self.is_moe = is_moe
        self.drop_path = DropPath(drop_path)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Routing | None]:
        x_BLD = x_BLD + self.drop_path(self.attn(self.norm1(x_BLD)))
        routing: Routing | None = None
        if self.is_moe:
            y_BLD, routing = self.moe(self.norm2(x_BLD))
        else:
            y_BLD = self.mlp(self.norm2(x_BLD))
        return x_BLD + self.drop_path(y_BLD), routing


class VisionMoE(nn.Module):
    """The blocks of `span` and what belongs to them: patch embedding, tokens and positions with the first block, norm and
    head with the last. State-dict keys carry block numbers of the whole model, so modules' state dicts are disjoint.

    `seed` fixes the fresh weights: each tensor depends on (seed, its name) only, so block 3 starts the same in a module and in
    the whole model. `seed=None` leaves all parameters on the meta device, for shapes or for loading.
    """

    def __init__(
        self,
        arch: VMoEArch,
        span: StageSpan,
        *,
        stitches: Sequence[StitchSpec] = (),
        drop_path: float = 0.0,
        seed: int | None,
    ) -> None:
        super().__init__()
        if span.num_blocks != arch.num_blocks:
            raise ValueError(f"span is of a model of {span.num_blocks} blocks, the student has {arch.num_blocks}")
        _check_stitches(arch, span, stitches)
        self.arch = arch
        self.span = span
        self.stitch_specs = tuple(stitches)
        with torch.device("meta"):
            self._build(drop_path)
        if seed is not None:
            self.to_empty(device="cpu")
            init_weights_(self, seed)

    def _build(self, drop_path: float) -> None:
        arch, span = self.arch, self.span
        if span.is_first:
            self.patch_embed = PatchEmbed(arch.patch_size, arch.embed_dim)
            self.cls_token = nn.Parameter(torch.empty(1, 1, arch.embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, arch.num_tokens, arch.embed_dim))
        last = max(arch.num_blocks - 1, 1)
        self.blocks = nn.ModuleDict({str(i): Block(arch, i in arch.moe_blocks, drop_path * i / last) for i in span.blocks})
        if span.is_last:
            self.norm = nn.LayerNorm(arch.embed_dim, eps=LAYER_NORM_EPS)
            self.head = nn.Linear(arch.embed_dim, arch.num_classes)
        if self.stitch_specs:
            self.stitches = nn.ModuleDict({str(pair): nn.ModuleDict() for pair in sorted({s.pair for s in self.stitch_specs})})
            for s in self.stitch_specs:
                self.stitches[str(s.pair)][s.kind] = Stitch(s.in_dim, s.out_dim)  # type: ignore[operator]

    def forward(self, x: Tensor) -> VMoEOutput:
        """Images [B, 3, S, S] if the span holds block 0, else hidden states [B, L, D] (teacher width before a pre stitch)."""
        if self.span.is_first:
            x = self._embed(x)
        router_losses: dict[str, Tensor] = {}
        stats: dict[int, RoutingStats] = {}
        for i in self.span.blocks:
            x = self._stitch("pre", i, x)
            x, routing = self.blocks[str(i)](x)
            if routing is not None:
                stats[i] = routing.stats
                for name, loss in routing.losses.items():
                    router_losses[name] = router_losses[name] + loss if name in router_losses else loss
            x = self._stitch("post", i, x)
        if self.span.is_last:
            x = self.head(self.norm(x[:, 0]))
        return VMoEOutput(x, router_losses, stats)

    def _embed(self, images_BCHW: Tensor) -> Tensor:
        size = self.arch.image_size
        if images_BCHW.ndim != 4 or images_BCHW.shape[1:] != (3, size, size):
            raise ValueError(f"VisionMoE expects images [B, 3, {size}, {size}], given {list(images_BCHW.shape)}")
        patches_BLD = self.patch_embed(images_BCHW)
        tokens_BLD = torch.cat([self.cls_token.expand(patches_BLD.shape[0], -1, -1), patches_BLD], dim=1)
        return tokens_BLD + self.pos_embed

    def _stitch(self, kind: str, block: int, x: Tensor) -> Tensor:
        for s in self.stitch_specs:
            if s.kind == kind and s.block == block:
                x = self.stitches[str(s.pair)][kind](x)  # type: ignore[index]
        return x


def _check_stitches(arch: VMoEArch, span: StageSpan, stitches: Sequence[StitchSpec]) -> None:
    """Follow the width through the span; raises ValueError where a stitch is misplaced or widths do not meet."""
    place = {(s.kind, s.block): s for s in stitches}
    if len(place) != len(stitches) or len({(s.pair, s.kind) for s in stitches}) != len(stitches):
        raise ValueError(f"stitches {list(stitches)}: more than one of a kind at a block or in a pair")
    for s in stitches:
        if s.block not in span.blocks:
            raise ValueError(f"{s}: block is outside the span {span.first_block}..{span.last_block}")
        if (s.kind == "pre" and s.block == 0) or (s.kind == "post" and s.block == arch.num_blocks - 1):
            raise ValueError(f"{s}: the first block takes the image (no pre stitch), the last one feeds the head (no post stitch)")
    width: int | None = arch.embed_dim if span.is_first else None  # None: whatever comes in
    for i in span.blocks:
        pre, post = place.get(("pre", i)), place.get(("post", i))
        if pre is not None:
            if width is not None and pre.in_dim != width:
                raise ValueError(f"{pre}: in_dim does not meet the width {width} before block {i}")
            width = pre.out_dim
        if width is not None and width != arch.embed_dim:
            raise ValueError(
                f"block {i} has width {arch.embed_dim} and gets {width}; a kept post stitch needs the pre stitch of the next pair"
            )
        width = arch.embed_dim
        if post is not None:
            if post.in_dim != width:
                raise ValueError(f"{post}: in_dim does not meet the width {width} after block {i}")
            width = post.out_dim


def init_weights_(model: nn.Module, seed: int) -> None:
    """Fill every parameter in place; each gets its own generator seeded by (seed, name), so order and span do not matter. Buffers
    (the routers' balance biases) become zero.

    As timm's ViT: truncated normal (std 0.02) for matrices and positions, ones for norms, zero biases, class token almost
    zero, patch convolution uniform in +-1/sqrt(fan_in).
    """
    for name, p in model.named_parameters():
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        with torch.no_grad():
            _fill(name, p, generator)
    for buffer in model.buffers():
        buffer.zero_()


def _fill(name: str, p: Tensor, generator: torch.Generator) -> None:
    if name == "patch_embed.proj.weight":
        bound = 1 / math.sqrt(p[0].numel())
        p.uniform_(-bound, bound, generator=generator)
    elif name == "cls_token":
        p.normal_(std=1e-6, generator=generator)
    elif name.endswith("bias"):
        p.zero_()
    elif p.ndim == 1:  # all other vectors are LayerNorm scales
        p.fill_(1.0)
    else:
        nn.init.trunc_normal_(p, std=0.02, generator=generator)


def parameter_shapes(arch: VMoEArch, span: StageSpan, *, stitches: Sequence[StitchSpec] = ()) -> dict[str, torch.Size]:
    """Canonical names and shapes of all tensors of a VisionMoE (a router's balance bias too), without memory for the weights."""
    return {name: t.shape for name, t in VisionMoE(arch, span, stitches=stitches, seed=None).state_dict().items()}


def count_parameters(arch: VMoEArch, *, stitches: Sequence[StitchSpec] = ()) -> tuple[int, int]:
    """(all parameters, parameters that one token uses: top_k of the num_experts experts of each MoE block; with expert choice
    capacity_factor of them, on the average)."""
    model = VisionMoE(arch, StageSpan.whole(arch.num_blocks), stitches=stitches, seed=None)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    experts = sum(n for name, n in sizes.items() if ".moe.experts." in name)
    total = sum(sizes.values())
    router = arch.router
    used = min(router.capacity_factor, arch.num_experts) if router.kind == "expert_choice" else router.top_k
    return total, total - experts + int(experts * used / arch.num_experts)
