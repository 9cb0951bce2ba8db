"""The expert feed-forward networks of one layer, stacked: y = down(gelu(up(x))) with the rows of each expert contiguous.

Names and layouts are those of transformers' fused experts ([E, out, in]), so that an export renames nothing.
Shape letters: E experts, D width, F hidden width, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from m2mkd_ds.moe.backends import get_backend


class Experts(nn.Module):
    """E independent two-layer networks with exact (erf) GELU.

    `backend` is a name of `moe.backends`. A wrapper that moves rows between ranks replaces this module by one with the
    same `forward(rows_RD, offsets_E)`.
    """

    def __init__(self, dim: int, hidden: int, num_experts: int, backend: str = "auto", generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.up_proj = nn.Parameter(torch.empty(num_experts, hidden, dim))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.down_proj = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Truncated normal weights (std 0.02), drawn independently per expert, and zero biases."""
        for weight in (self.up_proj, self.down_proj):
            nn.init.trunc_normal_(weight, std=0.02, generator=generator)
        for bias in (self.up_proj_bias, self.down_proj_bias):
            nn.init.zeros_(bias)

    def forward(self, rows_RD: Tensor, offsets_E: Tensor) -> Tensor:
        """Rows [R, D] sorted by expert, int32 end offsets [E] with offsets[E-1] = R -> [R, D].

        Computes in the autocast dtype where autocast is on (torch's grouped matmul ignores it), else in the weights' dtype.
        """
        device_type = rows_RD.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.up_proj.dtype
        _, hidden, dim = self.up_proj.shape
        run = get_backend(self.backend, device=rows_RD.device, dtype=dtype, dim=dim, hidden=hidden)
        return run(
            rows_RD.to(dtype), offsets_E, self.up_proj.to(dtype), self.up_proj_bias.to(dtype),
            self.down_proj.to(dtype), self.down_proj_bias.to(dtype),
        )  # fmt: skip

    def extra_repr(self) -> str:
        num_experts, hidden, dim = self.up_proj.shape
        return f"num_experts={num_experts}, dim={dim}, hidden={hidden}, backend={self.backend!r}"
