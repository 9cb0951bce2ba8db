"""Backend `loop`: one dense feed-forward network after the other, in the dtype of the run, with torch's own autograd.

The plainest form there is, and with a few large experts hard to beat; what every other backend is measured against.
Shape letters: R rows, E experts, D width, F hidden width.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.moe.backends.contract import Activation, ExpertWeights, activate

NAME = "loop"


def why_not(*, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> str:
    """Runs everywhere."""
    return ""


def run(rows_RD: Tensor, offsets_E: Tensor, weights: ExpertWeights) -> Tensor:
    """Contract in `moe.backends.contract`. Host sync: the offsets are read."""
    ends = offsets_E.tolist()
    sizes = [end - start for start, end in pairwise([0, *ends])]
    tail = rows_RD.shape[0] - (ends[-1] if ends else 0)
    # split and unbind, not indexing: their backward is one cat or stack, not E zero-filled copies of the whole.
    *segments, nobody = rows_RD.split([*sizes, tail])
    experts = zip(segments, *(w.unbind(0) for w in weights[:4]), strict=True)
    out = [F.linear(activate(F.linear(rows, up, up_b), weights.activation), down, down_b) for rows, up, up_b, down, down_b in experts]
    return torch.cat([*out, torch.zeros_like(nobody)])
