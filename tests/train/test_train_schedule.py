"""Learning rate by step, and the number of steps: hand-worked."""

from __future__ import annotations

import math

import pytest

from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.train.schedule import lr_at, num_steps, num_warmup_steps, scaled_lr

RUN = {"total_steps": 11, "warmup_steps": 4, "peak": 1.0, "min_lr": 0.1, "warmup_lr": 0.2}


def test_warmup_is_linear_from_warmup_lr_to_the_peak() -> None:
    # 0.2 + 0.8 * step / 4
    assert [lr_at(step, **RUN) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], abs=1e-12)


def test_cosine_falls_from_the_peak_to_min_lr_at_the_last_step() -> None:
    # Steps 4..10: 0.1 + 0.45 * (1 + cos(pi * (step - 4) / 6)); cos(60 deg) = 1/2, cos(90 deg) = 0, cos(120 deg) = -1/2.
    assert lr_at(6, **RUN) == pytest.approx(0.1 + 0.45 * 1.5)
    assert lr_at(7, **RUN) == pytest.approx(0.1 + 0.45)
    assert lr_at(8, **RUN) == pytest.approx(0.1 + 0.45 * 0.5)
    assert lr_at(9, **RUN) == pytest.approx(0.1 + 0.45 * (1 - math.sqrt(3) / 2))
    assert lr_at(10, **RUN) == 0.1


def test_without_warmup_the_first_step_has_the_peak() -> None:
    run = {**RUN, "warmup_steps": 0}
    assert lr_at(0, **run) == 1.0
    assert lr_at(10, **run) == 0.1


def test_a_warmup_up_to_the_last_step_still_ends_at_min_lr() -> None:
    run = {**RUN, "total_steps": 3, "warmup_steps": 2}
    assert [lr_at(step, **run) for step in range(3)] == pytest.approx([0.2, 0.6, 0.1])
    assert lr_at(0, **{**RUN, "total_steps": 1, "warmup_steps": 0}) == 0.1


@pytest.mark.parametrize("step", [-1, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=f"step {step} is outside the run of 11 steps, numbered 0 to 10"):
        lr_at(step, **RUN)


def test_a_warmup_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps is 11; .* less than the 11 steps"):
        lr_at(0, **{**RUN, "warmup_steps": 11})


def test_learning_rate_scales_with_the_global_batch() -> None:
    # DeiT: 5e-4 for 512 images, so 1e-3 for 1024.
    assert scaled_lr(PhaseConfig(lr=5e-4, lr_batch=512), 1024) == pytest.approx(1e-3)
    assert scaled_lr(PhaseConfig(lr=5e-4, lr_batch=0), 1024) == 5e-4


def test_a_peak_below_min_lr_is_refused() -> None:
    # 5e-4 * 8 / 512 = 7.8e-6 < 1e-5
    with pytest.raises(ValueError, match="scaled to a global batch of 8 .* is 7.81e-06, below min_lr 1e-05"):
        scaled_lr(PhaseConfig(lr=5e-4, lr_batch=512, min_lr=1e-5), 8)


def test_number_of_steps() -> None:
    # 2.5 * 1000 / 64 = 39.06; a tenth of an epoch of 10 images at 64 rounds to 0, but there is always one step.
    assert num_steps(PhaseConfig(epochs=2.5), 1000, 64) == 39
    assert num_steps(PhaseConfig(epochs=0.1), 10, 64) == 1
    assert num_steps(PhaseConfig(epochs=2.5, max_steps=7), 1000, 64) == 7
    assert num_steps(PhaseConfig(epochs=2.5, max_steps=70), 1000, 64) == 39


def test_warmup_keeps_its_share_when_the_run_is_cut() -> None:
    # 10 epochs * 640 / 64 = 100 steps, 2 epochs of warm-up = 20; cut to 30 steps: 6.
    assert num_warmup_steps(PhaseConfig(epochs=10, warmup_epochs=2), 640, 64) == 20
    assert num_warmup_steps(PhaseConfig(epochs=10, warmup_epochs=2, max_steps=30), 640, 64) == 6
    # 1 step at 9/10: rounds to 1, which would leave no step after the warm-up.
    assert num_warmup_steps(PhaseConfig(epochs=10, warmup_epochs=9, max_steps=1), 640, 64) == 0


def test_a_warmup_as_long_as_the_phase_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_epochs is 10.* less than epochs = 10"):
        num_warmup_steps(PhaseConfig(epochs=10, warmup_epochs=10), 640, 64)
