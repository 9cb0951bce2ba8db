"""Loss-free load balancing (arXiv 2408.15664, algorithm 1): a bias per expert that only the choice sees, moved by the counts.

The training loop calls `balanced_bias` once an optimizer step with counts over all micro-batches and ranks (train/balance.py). Shape
letter: E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def balanced_bias(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean(load) - load). `load_E`: integer counts; compared as E * load and the sum, so exactly."""
    error_E = load_E.sum() - load_E * load_E.numel()
    return bias_E + rate * torch.sign(error_E).to(bias_E.dtype)
