"""Stitch layer: carries hidden states from the width of one model to the width of another (arXiv 2402.16918, section 3.2).

    h_i [B, L, D_teacher] -> pre stitch -> student module -> post stitch -> [B, L, D_teacher] -> meta suffix

There is no residual around it, because the two widths differ. Shape letters: B images, L tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn


class Stitch(nn.Module):
    """LayerNorm over `in_dim`, then a linear map to `out_dim`. State-dict keys: `norm.*`, `proj.*`.

    PAPER: the norm's eps is 1e-5, torch's default, as in the authors' release; the blocks around it use 1e-6.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        if in_dim < 1 or out_dim < 1:
            raise ValueError(f"a stitch needs positive widths: in_dim {in_dim}, out_dim {out_dim} were given; use the models' embed_dim")
        self.norm = nn.LayerNorm(in_dim, eps=1e-5)
        self.proj = nn.Linear(in_dim, out_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fresh values from torch's global generator: truncated normal with std 0.02, zero bias, neutral norm."""
        self.norm.reset_parameters()
        nn.init.trunc_normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, in_dim] -> [B, L, out_dim]."""
        return self.proj(self.norm(x_BLD))
