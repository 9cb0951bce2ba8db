"""How an episode is learnt: a new linear head on frozen features (`linear`), or the whole model (`finetune`). Loads no library.

Both train on all support images at every step, so no episode ends without one. PAPER: arXiv 2402.16918's few-shot runs train the
head only: AdamW, 100 steps, peak 2e-3 (not scaled) after 20 steps of warm-up, weight decay 0.05, label smoothing 0.1, fp32; those are
the defaults. PAPER: they kept mixup, cutmix, RandAugment and drop-path on while the head was trained. Here the frozen trunk is in
evaluation mode and sees every image once, plain: features do not depend on the step, and an episode costs one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

PEAK_LR = {"linear": 2e-3, "finetune": 5e-4}
"""Peak learning rate where none is given."""


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """How an episode is learnt."""

    protocol: Literal["linear", "finetune"] = "linear"
    """linear: a new head on the features of the frozen model. finetune: the whole model, a fresh copy for every episode."""
    steps: int = 100
    """Optimizer steps an episode, each on all support images."""
    warmup_steps: int = 20
    """Steps of linear warm-up, part of `steps`; half a cosine follows."""
    lr: float | None = None
    """Peak learning rate of AdamW; by default 2e-3 (linear) or 5e-4 (finetune)."""
    min_lr: float = 1e-5
    """Learning rate of the last step."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    weight_decay: float = 0.05
    """Not applied to norms, biases, positions and tokens."""
    label_smoothing: float = 0.1
    """Share of a target that is spread over all classes of the episode."""
    drop_path: float = 0.1
    """finetune: stochastic depth of the last block."""
    clip_grad: float = 1.0
    """finetune: largest global gradient norm; 0 for none."""
    augment: bool = False
    """finetune: support images go through the run's training transform, anew at every step."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no training."""
        if self.steps < 1 or not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"steps is {self.steps} and warmup_steps is {self.warmup_steps}: give at least one step and a shorter warm-up")
        if not 0 <= self.min_lr <= self.peak < inf or not 0 <= self.warmup_lr < inf:
            raise ValueError(
                f"lr is {self.peak}, min_lr {self.min_lr}, warmup_lr {self.warmup_lr}: none may be negative, and lr not below min_lr"
            )
        limits = {"weight_decay": 1e9, "label_smoothing": 1.0, "drop_path": 0.99, "clip_grad": 1e9}
        for name, high in limits.items():
            if not 0 <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed is 0 to {high:g}")
        if self.augment and self.protocol == "linear":
            raise ValueError("augment is for --protocol finetune: the linear head learns from features that are computed once")

    @property
    def peak(self) -> float:
        """Peak learning rate."""
        return PEAK_LR[self.protocol] if self.lr is None else self.lr
