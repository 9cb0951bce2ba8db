"""TimmVMoE: the whole student behind the methods that timm's users and timm's own tools call.

    images -> forward_features -> tokens [B, L, D] -> forward_head -> logits [B, V]        forward_intermediates -> any block's tokens

Parts, names of weights and arithmetic are VisionMoE's, so logits are the same bits. What differs: `forward` returns logits alone
(timm's training scripts know no router losses; `forward_routed` returns them), and blocks return tokens alone, so that hooks see
tensors. Shape letters: B images, L tokens an image, D width, V classes, h and w patches along the sides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.layers import global_pool_nlc
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import Block, StitchSpec, VisionMoE, VMoEArch, VMoEOutput
from m2mkd_ds.moe.routing import Routing, RoutingStats

POOLS = ("", "token", "avg", "max", "avgmax")
"""What `global_pool` may be. token is the class token, which the model was trained with; '' keeps all tokens."""


class FeatureBlock(Block):
    """A Block whose forward pass returns the tokens alone."""

    def forward(self, x_BLD: Tensor) -> Tensor:  # type: ignore[override]
        return self.routed(x_BLD)[0]

    def routed(self, x_BLD: Tensor) -> tuple[Tensor, Routing | None]:
        """Tokens and the routing decision (None in a dense block)."""
        return super().forward(x_BLD)


class TimmVMoE(VisionMoE):
    """A VisionMoE of all blocks with timm's interface; state-dict names are the canonical ones.

    `arch` and `stitches` may be the plain dicts of `arch_to_dict`, as they lie in a config.json. `seed` fixes fresh weights as in
    VisionMoE; None leaves the parameters on the meta device. Raises ValueError for sizes that the architecture does not have.
    """

    blocks: nn.Sequential  # type: ignore[assignment]

    def __init__(
        self,
        arch: VMoEArch | Mapping[str, Any],
        stitches: Sequence[StitchSpec | Mapping[str, Any]] = (),
        *,
        num_classes: int | None = None,
        global_pool: str = "token",
        img_size: int | Sequence[int] | None = None,
        in_chans: int = 3,
        drop_path_rate: float = 0.0,
        seed: int | None = 0,
    ) -> None:
        known = arch if isinstance(arch, VMoEArch) else arch_from_dict(arch)
        _check_sizes(known, img_size, in_chans)
        if num_classes:
            known = dataclasses.replace(known, num_classes=num_classes)
        specs = tuple(s if isinstance(s, StitchSpec) else StitchSpec(**s) for s in stitches)
        super().__init__(known, StageSpan.whole(known.num_blocks), stitches=specs, drop_path=drop_path_rate, seed=seed)
        self.num_classes = known.num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = known.embed_dim
        self.num_prefix_tokens = 1
        self.grad_checkpointing = False
        self.feature_info: Any = [
            {"module": f"blocks.{i}", "num_chs": known.embed_dim, "reduction": known.patch_size} for i in range(known.num_blocks)
        ]
        self._set_pool(global_pool)
        if num_classes == 0:
            self.reset_classifier(0)

    def _build(self, drop_path: float) -> None:
        super()._build(drop_path)
        arch, last = self.arch, max(self.arch.num_blocks - 1, 1)
        self.blocks = nn.Sequential(*(FeatureBlock(arch, i in arch.moe_blocks, drop_path * i / last) for i in self.span.blocks))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Images [B, 3, S, S] -> logits [B, V], or pooled features where the head was taken off."""
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> tokens [B, L, D] after the final norm, class token first."""
        return self.norm(self._run(x)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens of `forward_features` -> logits; with `pre_logits`, what would go into the head."""
        x = global_pool_nlc(x, pool_type=self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        return x if pre_logits else self.head(x)

    def forward_routed(self, x: Tensor) -> VMoEOutput:
        """Logits with router losses and routing statistics, for training loops that add the losses. Hooks on blocks are not called."""
        x = self._embed(x)
        losses: dict[str, Tensor] = {}
        stats: dict[int, RoutingStats] = {}
        for i, block in enumerate(self.blocks):
            x, routing = block.routed(self._stitch("pre", i, x))  # type: ignore[operator]
            x = self._stitch("post", i, x)
            if routing is not None:
                stats[i] = routing.stats
                for name, loss in routing.losses.items():
                    losses[name] = losses[name] + loss if name in losses else loss
        return VMoEOutput(self.forward_head(self.norm(x)), losses, stats)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """What chosen blocks put out: [B, D, h, w] (`NCHW`) or [B, L-1, D] (`NLC`), the class token left out.

        `indices`: the last n blocks, a list of block numbers (negative ones from the end), None for all; always given in running
        order. `return_prefix_tokens`: pairs (patches, class token [B, 1, D]). `norm`: the final norm on each. `stop_early`: later
        blocks are not run, and the final features are those of the last wanted block. Returns (final features [B, L, D], list), or
        the list alone with `intermediates_only`. A kept stitch layer comes after its block's features. Raises ValueError for
        another format, and for blocks that there are not.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; allowed is 'NCHW' or 'NLC'")
        wanted = _block_numbers(len(self.blocks), indices)
        x, states = self._run(x, wanted, max(wanted) + 1 if stop_early else None)
        taken = [self.norm(state) if norm else state for state in states]
        prefix, found = [t[:, :1] for t in taken], [t[:, 1:] for t in taken]
        if output_fmt == "NCHW":
            side = self.arch.image_size // self.arch.patch_size
            found = [t.reshape(t.shape[0], side, side, -1).permute(0, 3, 1, 2).contiguous() for t in found]
        answer: list[Any] = list(zip(found, prefix, strict=True)) if return_prefix_tokens else list(found)
        return answer if intermediates_only else (self.norm(x), answer)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True) -> list[int]:
        """Drop the blocks behind the last wanted one, and norm and head if asked; returns the wanted numbers."""
        wanted = _block_numbers(len(self.blocks), indices)
        self.blocks = self.blocks[: max(wanted) + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        """The head: a Linear, or an Identity once it was taken off."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head of `num_classes` (torch's initialisation; 0: none), and another pooling if given.

        Raises ValueError for a pooling that the model cannot do.
        """
        if global_pool is not None:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        like = self.cls_token
        head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype) if num_classes else nn.Identity()
        self.head = head.train(self.training)  # type: ignore[assignment]

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimizers must not decay (they leave out vectors by themselves)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers by name, for timm's layer-wise learning-rate decay."""
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [(r"^blocks\.(\d+)", None), (r"^norm|^stitches", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether each block is recomputed in the backward pass instead of kept."""
        self.grad_checkpointing = enable

    def _run(self, x: Tensor, wanted: Sequence[int] = (), num_blocks: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Tokens after the first `num_blocks` blocks (default: all), and what the `wanted` ones put out."""
        x = self._embed(x)
        states = []
        for i, block in enumerate(self.blocks[:num_blocks]):
            x = self._stitch("pre", i, x)
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing and torch.is_grad_enabled() else block(x)
            if i in wanted:
                states.append(x)
            x = self._stitch("post", i, x)
        return x, states

    def _set_pool(self, global_pool: str) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool is {global_pool!r}; allowed is one of {list(POOLS)} (token: the class token)")
        self.global_pool = global_pool


def arch_to_dict(arch: VMoEArch) -> dict[str, Any]:
    """The architecture as plain values that JSON holds. `backend` stays behind: it says how to compute on the training machine."""
    plain = dataclasses.asdict(arch)
    plain["moe_blocks"] = list(arch.moe_blocks)
    del plain["backend"]
    return plain


def arch_from_dict(plain: Mapping[str, Any]) -> VMoEArch:
    """The inverse of `arch_to_dict`. Raises ValueError for fields that are missing or unknown."""
    try:
        fields = {**plain, "moe_blocks": tuple(plain["moe_blocks"]), "router": RouterConfig(**plain["router"])}
        return VMoEArch(**fields)
    except (KeyError, TypeError) as err:
        raise ValueError(f"arch: {err}; give the fields of m2mkd_ds.models.vmoe.VMoEArch") from err


def _block_numbers(num_blocks: int, indices: int | Sequence[int] | None) -> list[int]:
    """timm's `indices` as block numbers. Raises ValueError for those that there are not."""
    if indices is None or isinstance(indices, int):
        count = num_blocks if indices is None else indices
        if not 1 <= count <= num_blocks:
            raise ValueError(f"indices is {count}, the last so many blocks; allowed is 1 to {num_blocks}")
        return list(range(num_blocks - count, num_blocks))
    wrong = [i for i in indices if not -num_blocks <= i < num_blocks]
    if wrong or not indices:
        raise ValueError(f"indices are {list(indices)}; allowed are block numbers from {-num_blocks} to {num_blocks - 1}, at least one")
    return [i % num_blocks for i in indices]


def _check_sizes(arch: VMoEArch, img_size: int | Sequence[int] | None, in_chans: int) -> None:
    sides = (arch.image_size,) * 2
    if img_size is not None and (img_size, img_size) != sides and img_size not in (sides, list(sides)):
        raise ValueError(f"img_size is {img_size}; this model was made for {arch.image_size}, and its positions are not resized")
    if in_chans != 3:
        raise ValueError(f"in_chans is {in_chans}; this model takes 3 channels")
