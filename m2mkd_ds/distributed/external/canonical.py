"""The canonical weights of one MoE layer, as a peer's adapter takes and gives them.

    router.weight [E, D]    experts.up_proj [E, F, D]    experts.up_proj_bias [E, F]    experts.down_proj [E, D, F]
    experts.down_proj_bias [E, D]                                                 = MoELayer.state_dict() without router.bias

Shape letters: E experts, D width, F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from m2mkd_ds.config import RouterConfig

EXPERT_NAMES = ("experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "experts.down_proj_bias")


@dataclass(frozen=True)
class LayerShape:
    """Sizes of a MoE layer with exact-GELU experts and biases."""

    dim: int
    hidden: int
    num_experts: int
    top_k: int

    def names(self) -> dict[str, tuple[int, ...]]:
        """Canonical names and shapes."""
        e, d, f = self.num_experts, self.dim, self.hidden
        shapes: list[tuple[int, ...]] = [(e, f, d), (e, f), (e, d, f), (e, d)]
        return {"router.weight": (e, d), **dict(zip(EXPERT_NAMES, shapes, strict=True))}


def matching_router(top_k: int) -> RouterConfig:
    """Our router with the math that DeepSpeed's and Tutel's gates have while nothing is dropped.

    Both take the softmax over all experts first; for k = 1 the weight stays the raw probability, for k > 1 the kept ones are
    divided by their sum. Neither gate has a bias; balancing losses are left out, because they do not touch the output.
    """
    return RouterConfig(top_k=top_k, softmax="before", renormalize=top_k > 1, bias=False, switch_weight=0.0)


def checked(weights: Mapping[str, Tensor], shape: LayerShape, peer: str) -> dict[str, Tensor]:
    """The tensors of `weights` that the peer has a place for: all but a `router.bias` of zeros.

    Raises ValueError for a router.bias that is not zero (the peer's gate has none), and for missing, unknown or misshapen ones.
    """
    given = dict(weights)
    bias_E = given.pop("router.bias", None)
    if bias_E is not None and bool((bias_E != 0).any()):  # host sync
        raise ValueError(f"router.bias is not zero, and the gate of {peer} has no bias; use router.bias=false for this comparison")
    wanted = shape.names()
    if set(given) != set(wanted):
        raise ValueError(
            f"weights for {peer}: missing {sorted(set(wanted) - set(given))}, unknown {sorted(set(given) - set(wanted))}; "
            "give the state dict of one MoELayer with gelu experts"
        )
    wrong = {name: tuple(given[name].shape) for name in wanted if tuple(given[name].shape) != wanted[name]}
    if wrong:
        raise ValueError(f"weights for {peer}: shapes {wrong}, wanted { ({name: wanted[name] for name in wrong}) }")
    return given
