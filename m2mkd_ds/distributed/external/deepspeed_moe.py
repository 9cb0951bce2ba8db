"""DeepSpeed's own MoE layer (`deepspeed.moe.layer.MoE`, 0.19.8) as a peer: same weights, same routing, its code unchanged.

Conventions of its gate, which tests/distributed/test_distributed_external.py holds to:

- Linear gate without bias, in fp32; softmax over all experts. k = 1 keeps the raw probability. k > 1 divides by the sum over
  the choices that *survive* the capacity (Tutel: over all selected), so a token with one choice dropped gets the other at weight 1.
- Capacity of an expert = max(min_capacity, ceil(T / E * capacity_factor * k)), T being this rank's tokens. k = 1 and k = 2 fill it
  in token order, for k = 2 all first choices before all second ones; k > 2 keeps the tokens with the largest probabilities.
  `capacity_factor=None` is drop_tokens=False: the capacity is the largest count over the expert-parallel group (a host sync), so
  every expert computes as many rows as the busiest one.
- Two random parts, which are on by default *also in eval()*, are switched off here: the second expert of k = 2 drawn with Gumbel
  noise, and random token selection for k = 1.
- Its `Experts` makes deep copies of one module: untouched, all experts are equal on all ranks. `load_canonical` gives each one its
  own weights, by its number in the whole layer.

Shape letters: B images, L tokens an image, T tokens, E experts, D width, F expert hidden width.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.distributed.external.canonical import EXPERT_NAMES, LayerShape, checked


class DeepSpeedMoE(nn.Module):
    """`deepspeed.moe.layer.MoE` with two-layer GELU experts. Its weights start meaningless: call `load_canonical`."""

    def __init__(
        self,
        shape: LayerShape,
        *,
        capacity_factor: float | None = None,
        min_capacity: int = 4,
        ep_size: int = 1,
    ) -> None:
        """`ep_size` ranks share the experts, rank r of a group holding E/ep_size consecutive ones; above 1 it needs a joined job.

        Raises ValueError when ep_size does not divide the number of experts.
        """
        super().__init__()
        if shape.num_experts % ep_size:
            raise ValueError(f"ep_size is {ep_size}; it must divide the number of experts, {shape.num_experts}")
        from deepspeed.moe.layer import MoE

        self.shape, self.ep_size = shape, ep_size
        self.capacity_factor, self.min_capacity = capacity_factor, min_capacity
        factor = 1.0 if capacity_factor is None else capacity_factor
        expert = nn.Sequential(nn.Linear(shape.dim, shape.hidden), nn.GELU(), nn.Linear(shape.hidden, shape.dim))
        self.moe: Any = MoE(
            hidden_size=shape.dim,
            expert=expert,
            num_experts=shape.num_experts,
            ep_size=ep_size,
            k=shape.top_k,
            capacity_factor=factor,
            eval_capacity_factor=factor,
            min_capacity=min_capacity,
            drop_tokens=capacity_factor is not None,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        self.first_expert = 0
        if ep_size > 1:
            with contextlib.redirect_stdout(sys.stderr):  # it prints that it makes a group
                self.moe.set_deepspeed_parallelism()  # a collective
            self.first_expert = torch.distributed.get_rank(self._group()) * self.moe.num_local_experts

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, L, D], its balancing loss, int64 [E]: this rank's choices of each expert before any is dropped)."""
        return self.moe(x_BLD)

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the weights of the whole layer in; this rank takes its share of the experts. Raises ValueError as `checked` does."""
        given = checked(weights, self.shape, "DeepSpeed's MoE")
        with torch.no_grad():
            self._gate().weight.copy_(given["router.weight"])
            for local, expert in enumerate(self._experts()):
                for name, parameter in _named(expert).items():
                    parameter.copy_(given[name][self.first_expert + local])

    def to_canonical(self, *, grads: bool = False) -> dict[str, Tensor]:
        """The weights (or with `grads` their gradients, zero where there is none) of the whole layer, detached.

        With ep_size > 1 it is a collective, and the router's gradient is this rank's own.
        """
        experts = [_named(expert) for expert in self._experts()]
        found = {name: torch.stack([_value(expert[name], grads) for expert in experts]) for name in EXPERT_NAMES}
        if self.ep_size > 1:
            found = {name: self._gathered(part) for name, part in found.items()}
        return {"router.weight": _value(self._gate().weight, grads).clone(), **found}

    def capacity(self, num_tokens: int, busiest: int) -> int:
        """Rows that every expert computes for `num_tokens` tokens of a rank, `busiest` being the largest count of an expert."""
        if self.capacity_factor is None:
            return busiest
        factor = self.capacity_factor * self.shape.top_k
        return max(self.min_capacity, math.ceil(num_tokens / self.shape.num_experts * factor))

    def _gate(self) -> nn.Linear:
        return self.moe.deepspeed_moe.gate.wg

    def _experts(self) -> nn.ModuleList:
        return self.moe.deepspeed_moe.experts.deepspeed_experts

    def _group(self) -> Any:
        return self.moe.deepspeed_moe.ep_group

    def _gathered(self, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(self.ep_size)]
        torch.distributed.all_gather(parts, part.contiguous(), group=self._group())
        return torch.cat(parts)


def _named(expert: nn.Module) -> dict[str, nn.Parameter]:
    """Canonical name -> the parameter of one expert. Linear's [out, in] is the canonical layout."""
    return dict(zip(EXPERT_NAMES, expert.parameters(), strict=True))


def _value(parameter: Tensor, grads: bool) -> Tensor:
    if not grads:
        return parameter.detach()
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.detach()
