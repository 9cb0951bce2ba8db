"""What an expert backend is: a pure function on rows grouped by expert, and the weights that it gets.

    rows_RD sorted by expert, offsets_E, ExpertWeights  ->  rows_RD        differentiable in rows and weights

Shape letters: R rows, E experts, D width, F expert hidden width, G = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from m2mkd_ds.moe.dispatch import DispatchPlan

Activation = Literal["gelu", "swiglu"]
"""gelu: down(gelu(up(x))), the exact erf form. swiglu: up gives gate and value, gate first; down(silu(gate) * value)."""


def activate(up_RG: Tensor, activation: Activation) -> Tensor:
    """The nonlinearity between the two maps: [R, G] -> [R, F]."""
    if activation == "gelu":
        return F.gelu(up_RG)
    gate_RF, value_RF = up_RG.chunk(2, dim=-1)
    return F.silu(gate_RF) * value_RF


class ExpertWeights(NamedTuple):
    """The stacked weights of E feed-forward networks, all of one dtype."""

    up_EGD: Tensor
    up_bias_EG: Tensor
    down_EDF: Tensor
    down_bias_ED: Tensor
    activation: Activation = "gelu"

    @property
    def num_experts(self) -> int:
        return self.down_EDF.shape[0]

    @property
    def dim(self) -> int:
        return self.down_EDF.shape[1]

    @property
    def hidden(self) -> int:
        """F, the width between the two maps."""
        return self.down_EDF.shape[2]


class Backend(Protocol):
    """A module of `moe.backends`.

    Rows of expert e are offsets[e-1]..offsets[e]-1 (int32 end offsets, offsets[-1] <= R). Rows at and beyond offsets[-1] belong to
    nobody: a backend never reads them, neither among the inputs nor among the incoming gradients, and what it leaves there, in the
    output and in the gradient of the rows, is unspecified (it may be NaN). An expert without rows gets a gradient of exact zeros.
    """

    NAME: str

    def why_not(self, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
        """Why this backend cannot run so, or an empty string."""
        ...

    def run(self, rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
        """Rows [R, D] -> [R, D], contiguous, in the dtype of the weights."""
        ...


class LayerBackend(Backend, Protocol):
    """A backend that also does dispatch and combine. `Experts` calls `run_layer` where the module has it.

    Same values as permute -> run -> combine: sums over choices in the dtype of `weights_TK`, choice 0 first.
    """

    def run_layer(self, x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
        """Tokens [T, D] and combine weights [T, K] -> [T, D] in the dtype of the weights; differentiable in x, weights_TK, weights."""
        ...
