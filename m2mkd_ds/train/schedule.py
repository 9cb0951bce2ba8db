"""Learning rate as a pure function of the step, and the numbers it is made from."""

from __future__ import annotations

import math

from m2mkd_ds.config import PhaseConfig


def lr_at(step: int, *, total_steps: int, warmup_steps: int, peak: float, min_lr: float, warmup_lr: float) -> float:
    """Learning rate of optimizer step `step`, 0..total_steps-1.

    Linear from `warmup_lr` (step 0) to `peak` (step `warmup_steps`), then half a cosine that is exactly `min_lr` at the last
    step. A run of one step uses `min_lr`. Raises ValueError for a step outside the run or a warm-up as long as the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside the run of {total_steps} steps, numbered 0 to {total_steps - 1}")
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must be at least 0 and less than the {total_steps} steps of the run")
    if step < warmup_steps:
        return warmup_lr + (peak - warmup_lr) * step / warmup_steps
    last = total_steps - 1
    if step == last:
        return min_lr  # the formula below rounds, and divides by zero when the warm-up ends here
    return min_lr + 0.5 * (peak - min_lr) * (1.0 + math.cos(math.pi * (step - warmup_steps) / (last - warmup_steps)))


def scaled_lr(phase: PhaseConfig, global_batch: int) -> float:
    """Peak learning rate: `lr` * global_batch / `lr_batch`, or `lr` itself when `lr_batch` is 0.

    Raises ValueError when it lies below `min_lr`, because the cosine would then rise.
    """
    peak = phase.lr * global_batch / phase.lr_batch if phase.lr_batch else phase.lr
    if peak < phase.min_lr:
        raise ValueError(
            f"lr {phase.lr} scaled to a global batch of {global_batch} (lr_batch {phase.lr_batch}) is {peak:.3g}, below min_lr "
            f"{phase.min_lr}: lower min_lr, raise lr, or set lr_batch=0"
        )
    return peak


def num_steps(phase: PhaseConfig, num_images: int, global_batch: int) -> int:
    """Optimizer steps of the phase: round(epochs * images / global batch), at least 1, at most `max_steps` if that is set.

    `num_images` is the number of images in the shards, also with `data.augment.repeats`: an epoch is as many *uses* as there are images.
    """
    steps = max(1, round(phase.epochs * num_images / global_batch))
    return min(steps, phase.max_steps) if phase.max_steps else steps


def num_warmup_steps(phase: PhaseConfig, num_images: int, global_batch: int) -> int:
    """Warm-up steps: the share warmup_epochs / epochs of `num_steps`, so that a run cut by `max_steps` keeps its shape.

    Raises ValueError when the warm-up is as long as the phase.
    """
    if not 0.0 <= phase.warmup_epochs < phase.epochs:
        raise ValueError(f"warmup_epochs is {phase.warmup_epochs}; it must be at least 0 and less than epochs = {phase.epochs}")
    steps = num_steps(phase, num_images, global_batch)
    return min(round(steps * phase.warmup_epochs / phase.epochs), steps - 1)
