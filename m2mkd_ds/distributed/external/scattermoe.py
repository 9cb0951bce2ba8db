"""ScatterMoE's experts (arXiv 2403.08245, package `scattermoe`) as a peer behind our router.

Triton kernels that read and write scattered rows, so there is no permuted copy of the input. Takes the routing as it is: ids [T, K]
and weights [T, K]. Shape letters: T tokens, K choices a token, E experts, D width, F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.distributed.external.canonical import LayerShape


def why_not(*, device: torch.device, dtype: torch.dtype) -> str:
    """Why it cannot run, or an empty string. Imports ScatterMoE where the device could run it."""
    if device.type != "cuda":
        return f"a Triton kernel needs a CUDA device, not {device.type}"
    try:
        import scattermoe.mlp  # noqa: F401
    except ImportError as err:
        return f"{err}; install it from github.com/shawntan/scattermoe"
    return ""


class ScatterMoEExperts(nn.Module):
    """`scattermoe.mlp.MLP` with exact GELU and biases."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        from scattermoe.mlp import MLP

        self.mlp: Any = MLP(shape.dim, shape.hidden, shape.num_experts, shape.top_k, bias=True, activation=F.gelu)

    def forward(self, x_TD: Tensor, weights_TK: Tensor, expert_ids_TK: Tensor) -> Tensor:
        """Tokens [T, D] -> weighted sum of each token's experts [T, D]."""
        return self.mlp(x_TD, weights_TK.to(x_TD.dtype), expert_ids_TK)

    def named(self) -> dict[str, nn.Parameter]:
        """Canonical name -> parameter; the layouts are the canonical ones."""
        up, down = self.mlp.experts, self.mlp.output_experts
        return {
            "experts.up_proj": up.weight,
            "experts.up_proj_bias": up.bias,
            "experts.down_proj": down.weight,
            "experts.down_proj_bias": down.bias,
        }

    def load_canonical(self, weights: Mapping[str, Tensor]) -> None:
        """Copy the experts' weights in; the router's are not looked at."""
        with torch.no_grad():
            for name, parameter in self.named().items():
                parameter.copy_(weights[name])
