"""The experts of a V-MoE and the layer around them. Shipped beside the weights; needs torch and transformers only.

    tokens [T, D] -> router -> rows in the order of their experts [R, D] -> two grouped layers -> weighted sums [T, D]

Shape letters: B images, L tokens an image, T = B*L tokens, D width, F expert hidden width, E experts, K experts a token, R <= T*K rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .configuration_vmoe import VMoEConfig
from .routing_vmoe import VMoERouter


class VMoEExperts(nn.Module):
    """E two-layer networks, stacked [E, out, in]: exact GELU, or SwiGLU with the gate in the first half of up_proj."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        e, d = config.num_experts, config.hidden_size
        hidden = int(d * config.mlp_ratio)
        if config.expert_activation not in ("gelu", "swiglu"):
            raise ValueError(f"expert_activation is {config.expert_activation!r}; allowed is gelu or swiglu")
        self.activation = config.expert_activation
        self.backend = config.expert_backend
        up_width = 2 * hidden if self.activation == "swiglu" else hidden
        self.up_proj = nn.Parameter(torch.empty(e, up_width, d))
        self.up_proj_bias = nn.Parameter(torch.empty(e, up_width))
        self.down_proj = nn.Parameter(torch.empty(e, d, hidden))
        self.down_proj_bias = nn.Parameter(torch.empty(e, d))

    def forward(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, max_rows: int | None) -> Tensor:
        """Weighted sum of each token's experts; id E stands for no expert, and at most `max_rows` ids are less (None: all are)."""
        device_type = x_TD.device.type
        autocast = torch.is_autocast_enabled(device_type)  # torch's grouped matmul does not see autocast
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.up_proj.dtype
        # 1. Rows in the order of their experts. 2. Both layers. 3. Back to tokens, weighted, choice 0 first.
        num_experts = self.up_proj.shape[0]
        sorted_N, order_N = ids_TK.reshape(-1).sort(stable=True)
        ends_E = torch.searchsorted(sorted_N, torch.arange(num_experts, device=sorted_N.device), right=True)
        experts_R, order_R = sorted_N[:max_rows].clamp(max=num_experts - 1), order_N[:max_rows]
        # Rows at the end may be nobody's.
        owned_R1 = None if max_rows is None else torch.arange(len(order_R), device=order_R.device)[:, None] < ends_E[-1]
        layout = (experts_R, ends_E, owned_R1, self._path(dtype))
        rows = x_TD.to(dtype).index_select(0, order_R // ids_TK.shape[1])
        rows = self._activate(self._linear(rows, self.up_proj.to(dtype), self.up_proj_bias.to(dtype), *layout))
        rows = self._linear(rows, self.down_proj.to(dtype), self.down_proj_bias.to(dtype), *layout)
        kept_TK, rows_TK = ids_TK < num_experts, order_N.argsort().view_as(ids_TK)
        rows_TKD = rows.index_select(0, torch.where(kept_TK, rows_TK, 0).reshape(-1)).view(*ids_TK.shape, x_TD.shape[1])
        rows_TKD = torch.where(kept_TK[..., None], rows_TKD, 0)
        total_TD = rows_TKD[:, 0] * weights_TK[:, 0, None]
        for k in range(1, ids_TK.shape[1]):
            total_TD = total_TD + rows_TKD[:, k] * weights_TK[:, k, None]
        return total_TD.to(dtype)

    def _activate(self, up: Tensor) -> Tensor:
        if self.activation == "gelu":
            return F.gelu(up)
        gate, value = up.chunk(2, dim=-1)
        return F.silu(gate) * value

    @staticmethod
    def _linear(rows: Tensor, weight: Tensor, bias: Tensor, experts_R: Tensor, ends: Tensor, owned_R1: Tensor | None, path: str) -> Tensor:
        """Each row times its expert's weight^T, plus its expert's bias; zero for nobody's rows."""
        if path == "loop":
            stops = ends.tolist()
            pieces = zip([0, *stops[:-1]], stops, weight.unbind(0), bias.unbind(0), strict=True)
            owned = torch.cat([rows[start:stop] @ w.t() + b for start, stop, w, b in pieces])
            return F.pad(owned, (0, 0, 0, len(rows) - stops[-1]))
        if path == "dense":
            out = rows.new_zeros(rows.shape[0], weight.shape[1])
            for e, (w, b) in enumerate(zip(weight.unbind(0), bias.unbind(0), strict=True)):
                out = torch.where((experts_R == e)[:, None], rows @ w.t() + b, out)
            return out if owned_R1 is None else torch.where(owned_R1, out, 0)
        # The operator leaves nobody's rows uninitialised, forward and backward: masks on both sides keep NaN out.
        rows = rows if owned_R1 is None else torch.where(owned_R1, rows, 0)
        out = _grouped_mm()(rows, weight.transpose(-2, -1), offs=ends.to(torch.int32)) + bias[experts_R]
        return out if owned_R1 is None else torch.where(owned_R1, out, 0)

    def _path(self, dtype: torch.dtype) -> str:
        """How the experts are computed here: grouped, loop or dense."""
        if self.backend not in ("auto", "grouped", "loop", "dense"):
            raise ValueError(f"expert_backend is {self.backend!r}; allowed is auto, grouped, loop or dense")
        if self.backend in ("loop", "dense"):
            return self.backend
        _, d, hidden = self.down_proj.shape
        multiple = 16 // dtype.itemsize  # every stride must be a multiple of 16 bytes
        device = self.up_proj.device
        able = (
            _grouped_mm() is not None
            and dtype in (torch.float32, torch.bfloat16, torch.float16)
            and d % multiple == 0
            and hidden % multiple == 0
            and (device.type == "cpu" or (device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)))
            # The operator computes float32, but refuses to be traced with it.
            and not (dtype == torch.float32 and torch.compiler.is_compiling())
        )
        if self.backend == "grouped" and not able:
            raise ValueError(
                f"expert_backend=grouped cannot run for {dtype} on {device} with widths {d} and {hidden}"
                f"{', compiled' if torch.compiler.is_compiling() else ''}; use loop or dense"
            )
        return "grouped" if able else "loop"


def _grouped_mm():  # type: ignore[no-untyped-def]
    """torch's operator under its public or its older private name."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class VMoELayer(nn.Module):
    """Router and experts."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__()
        self.router = VMoERouter(config)
        self.experts = VMoEExperts(config)

    def forward(self, x_BLD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        ids_TK, weights_TK, max_rows, loss = self.router(x_TD)
        return self.experts(x_TD, ids_TK, weights_TK, max_rows).view(x_BLD.shape), loss


__all__ = ["VMoEExperts", "VMoELayer"]
