"""Tutel's MoE layer (`tutel.moe.moe_layer`, 0.3) as a peer: same weights, same routing, its code unchanged.

Conventions, which tests/distributed/test_distributed_external.py holds to where Tutel is installed:

- Linear gate without bias, here with fp32_gate; softmax over all experts. k = 1 keeps the raw probability. k > 1 divides by the sum
  over *all selected* choices, dropped ones included (DeepSpeed: over the survivors).
- Capacity of an expert = k * int(capacity_factor * ceil(T / E)), filled in token order, first choices before second ones.
  `capacity_factor=None` is Tutel's 0: the largest count over the group (a host sync), nothing dropped.
- Expert compute is batched matmuls over [E, C, D] padded buffers; the second map is stored transposed, [E, F, D].
- On CPU fp32 only in effect: its dispatch kernels know fp32 and fp64, and it rounds fp64 to fp32 on the way.

Tutel is not on PyPI and its last release is of January 2025. Shape letters: B images, L tokens an image, T tokens, E experts,
C slots an expert, D width, F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.distributed.external.canonical import LayerShape, checked
from m2mkd_ds.moe.backends.tutel_dispatch import HOW_TO_GET


def why_not(*, device: torch.device, dtype: torch.dtype) -> str:
    """Why the layer cannot run, or an empty string. Imports Tutel."""
    try:
        import tutel.moe  # noqa: F401
    except ImportError as err:
        return f"{err}; {HOW_TO_GET}"
    if device.type == "cpu" and dtype is not torch.float32:
        return f"Tutel's CPU kernels have no {dtype}, only torch.float32"
    return ""


class TutelMoE(nn.Module):
    """`tutel.moe.moe_layer` with its built-in `ffn` experts and exact GELU, all experts on this rank."""

    def __init__(self, shape: LayerShape, *, capacity_factor: float | None = None) -> None:
        """Raises ValueError for an odd width, which Tutel does not take, and ImportError, with what to do, without Tutel."""
        super().__init__()
        if shape.dim % 2:
            raise ValueError(f"dim is {shape.dim}; Tutel takes even widths only")
        try:
            from tutel.moe import moe_layer
        except ImportError as err:
            raise ImportError(f"{err}; {HOW_TO_GET}") from err
        self.shape, self.capacity_factor = shape, capacity_factor
        self.moe: Any = moe_layer(
            gate_type={"type": "top", "k": shape.top_k, "capacity_factor": capacity_factor or 0.0, "fp32_gate": True},
            model_dim=shape.dim,
            experts={
                "type": "ffn",
                "num_experts_per_device": shape.num_experts,
                "hidden_size_per_expert": shape.hidden,
                "activation_fn": F.gelu,
            },
            # A group of this rank alone: in a job of several ranks Tutel would share the experts over all of them.
            group=_own_group() if _several_ranks() else None,
        )

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(output [B, L, D], its balancing loss, integers [E]: choices of each expert before any is dropped)."""
        y_BLD = self.moe(x_BLD)
        return y_BLD, y_BLD.l_aux, self.moe.dispatch_count

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the layer's weights in. Raises ValueError as `checked` does."""
        given = checked(weights, self.shape, "Tutel")
        with torch.no_grad():
            for name, parameter in self._named().items():
                parameter.copy_(_swapped(name, given[name]))

    def to_canonical(self, *, grads: bool = False) -> dict[str, Tensor]:
        """The weights (or with `grads` their gradients, zero where there is none), detached."""
        found = {}
        for name, parameter in self._named().items():
            value = parameter.detach() if not grads else parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            found[name] = _swapped(name, value.detach()).clone(memory_format=torch.contiguous_format)
        return found

    def capacity(self, num_tokens: int, busiest: int) -> int:
        """Rows that every expert computes for `num_tokens` tokens, `busiest` being the largest count of an expert."""
        if not self.capacity_factor:
            return busiest
        return self.shape.top_k * int(self.capacity_factor * -(-num_tokens // self.shape.num_experts))

    def _named(self) -> dict[str, nn.Parameter]:
        experts = self.moe.experts
        return {
            "router.weight": self.moe.gates[0].wg.weight,
            "experts.up_proj": experts.batched_fc1_w,
            "experts.up_proj_bias": experts.batched_fc1_bias,
            "experts.down_proj": experts.batched_fc2_w,
            "experts.down_proj_bias": experts.batched_fc2_bias,
        }


def _swapped(name: str, value: Tensor) -> Tensor:
    """Between canonical and Tutel's layout; the same both ways."""
    return value.transpose(1, 2) if name == "experts.down_proj" else value


def _own_group() -> Any:
    # By local synchronisation: every rank names another list of ranks, and no rank takes part in the others' groups.
    return torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)


def _several_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
