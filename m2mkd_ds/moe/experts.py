"""The expert feed-forward networks of one layer, stacked: y = down(activation(up(x))) with the rows of each expert contiguous.

Names and layouts are those of transformers' fused experts ([E, out, in]), so that an export renames nothing.
Shape letters: T tokens, K choices a token, R rows, E experts, D width, F hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_ds.moe.backends import Activation, Backend, ExpertWeights, get_backend
from m2mkd_ds.moe.dispatch import DispatchPlan, combine, permute


class Experts(nn.Module):
    """E independent two-layer networks behind one dispatch plan.

    `backend` is a name of `moe.backends`. `distributed.expert_parallel` replaces this module by one that holds a share of the
    experts and has the same `forward`.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        backend: str = "auto",
        activation: Activation = "gelu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend
        self.activation = activation
        up_width = 2 * hidden if activation == "swiglu" else hidden
        self.up_proj = nn.Parameter(torch.empty(num_experts, up_width, dim))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, up_width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights (std 0.02), drawn independently per expert, and zero biases."""
        for weight in (self.up_proj, self.down_proj):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        for bias in (self.up_proj_bias, self.down_proj_bias):
            nn.init.zeros_(bias)

    def prepare(self, x_TD: Tensor) -> tuple[Tensor, ExpertWeights, Backend]:
        """Input and weights in the dtype to compute in, and the backend for it.

        The dtype is autocast's where autocast is on (torch's grouped matmul ignores it), else that of the weights.
        """
        device_type = x_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.up_proj.dtype
        weights = ExpertWeights(
            self.up_proj.to(dtype), self.up_proj_bias.to(dtype), self.down_proj.to(dtype), self.down_proj_bias.to(dtype), self.activation
        )
        backend = get_backend(
            self.backend, device=x_TD.device, dtype=dtype, dim=weights.dim, hidden=weights.hidden, activation=self.activation
        )
        return x_TD.to(dtype), weights, backend

    def forward(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan) -> Tensor:
        """Tokens [T, D] -> weighted sum of each token's experts [T, D]."""
        x_TD, weights, backend = self.prepare(x_TD)
        run_layer = getattr(backend, "run_layer", None)
        if run_layer is not None:
            return run_layer(x_TD, weights_TK, plan, weights)
        rows_RD = backend.run(permute(x_TD, plan), plan.offsets_E, weights)
        return combine(rows_RD, weights_TK, plan)

    def extra_repr(self) -> str:
        num_experts, dim, hidden = self.down_proj.shape
        return f"num_experts={num_experts}, dim={dim}, hidden={hidden}, activation={self.activation!r}, backend={self.backend!r}"
