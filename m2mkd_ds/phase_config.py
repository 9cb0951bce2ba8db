"""PhaseConfig: length, batch, learning rate and layout of one training phase. A branch of the tree in config.py, which re-exports it."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

PHASE_LIMITS: dict[str, tuple[float, float]] = {
    "micro_batch_size": (1, inf), "gradient_accumulation_steps": (1, inf), "checkpoint_steps": (1, inf), "log_steps": (1, inf),
    "ep_size": (1, inf), "max_steps": (0, inf), "lr_batch": (0, inf), "min_lr": (0, inf), "warmup_lr": (0, inf), "weight_decay": (0, inf),
    "clip_grad": (0, inf), "eval_epochs": (0, inf), "drop_path": (0, 0.99), "ema_decay": (0, 0.999999),
}  # fmt: skip
"""Smallest and largest allowed value by field."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training phase."""

    epochs: float = 100.0
    """Passes over the training images. steps = round(epochs * images / global batch), at least 1."""
    max_steps: int = 0
    """Upper bound on optimizer steps; 0 for none."""
    micro_batch_size: int = 128
    """Images of one forward pass on one rank."""
    gradient_accumulation_steps: int = 1
    """Forward-backward passes an optimizer step. global batch = micro_batch_size * this * ranks."""
    lr: float = 5e-4
    """Peak learning rate for `lr_batch` images; the scaled value is logged, this field is never edited."""
    lr_batch: int = 512
    """Linear scaling: peak = lr * global_batch / lr_batch. 0 switches scaling off."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine (not scaled)."""
    warmup_lr: float = 1e-6
    """Learning rate of the first warm-up step (not scaled)."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up from `warmup_lr` to the peak, part of `epochs`."""
    weight_decay: float = 0.05
    """Not applied to norms, biases, positions, tokens and layer scales."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    eps: float = 1e-8
    """AdamW's term in the denominator."""
    clip_grad: float = 0.0
    """Largest global gradient norm, in every precision, per teaching pair; 0 for none."""
    drop_path: float = 0.0
    """Stochastic depth of the last block of the whole model; the ramp is global, not per module."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0 for none. With it, the averaged weights are the phase's result."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware has bf16 units, else fp32."""
    ds_config: str = "zero1"
    """Name of a file in ds_configs/ (without .json), or a path."""
    ep_size: int = 1
    """Expert parallelism: neighbouring ranks that share the experts of every MoE layer, each holding num_experts / ep_size of them.
    Must divide the ranks and the experts. 1: every rank holds all experts, which is faster as long as they fit."""
    eval_epochs: float = 10.0
    """Evaluate every so many epochs, and always at the end; 0: only at the end."""
    checkpoint_steps: int = 500
    """Save a resumable checkpoint every so many steps, and at the end."""
    log_steps: int = 20
    """Write a line to metrics.jsonl every so many steps."""
