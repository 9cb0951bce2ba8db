"""What one training step keeps alive, found by running it on the meta device: the frozen forward passes, then each trainee's step.

    Scene (modules and losses of a phase, planner/scenes.py) -> trace_scene -> SceneTrace(feed, batch, one StepTrace a trainee)

A StepTrace tells how activations rise in the forward pass and fall in the backward pass, from the arrival of one gradient to the next;
gradients that have arrived are not in it, because what becomes of them is the engine's affair (planner/engine_memory.py). All numbers
are bytes; weights are in none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from m2mkd_ds.planner.live_bytes import LiveBytes


@dataclass(frozen=True)
class Arrival:
    """A parameter's gradient is complete."""

    name: str
    grad_bytes: int
    peak: int
    """The most that was alive since the arrival before, this gradient included."""
    left: int
    """Alive at this moment, without the gradient."""


@dataclass(frozen=True)
class StepTrace:
    """One trainee's forward and backward pass over one micro-batch, above what the batch itself takes."""

    forward_peak: int
    saved: int
    """Kept by the forward pass for the backward pass."""
    arrivals: tuple[Arrival, ...]
    end_peak: int
    """From the last arrival to the end."""


@dataclass(frozen=True)
class SceneTrace:
    """A micro-batch of a phase."""

    feed_peak: int
    """While hidden states and teacher logits are computed, the batch included."""
    batch: int
    """Images, targets, hidden states and teacher logits, alive until the step ends."""
    steps: tuple[StepTrace, ...]
    """By trainee, in the order in which they run."""


@dataclass(frozen=True)
class TraineeScene:
    """A module that is trained: on the meta device, in the precision of the run."""

    name: str
    module: nn.Module
    loss: Callable[[Any], Tensor]
    """Batch -> loss."""


@dataclass(frozen=True)
class Scene:
    """A phase, ready to be traced."""

    trainees: tuple[TraineeScene, ...]
    frozen: tuple[nn.Module, ...]
    make_batch: Callable[[int], Any]
    """Images of a micro-batch -> what the feed gives."""


def trace_scene(scene: Scene, micro_batch_size: int) -> SceneTrace:
    """Run one micro-batch of every trainee."""
    modules: Sequence[nn.Module] = [*(trainee.module for trainee in scene.trainees), *scene.frozen]
    given = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    with LiveBytes(given) as live:
        batch = scene.make_batch(micro_batch_size)
        feed_peak, held = live.take_peak(), live.now
        steps = tuple(_trace_step(trainee, batch, live) for trainee in scene.trainees)
    return SceneTrace(feed_peak, held, steps)


def _trace_step(trainee: TraineeScene, batch: Any, live: LiveBytes) -> StepTrace:
    base = live.now
    arrivals: list[Arrival] = []

    def arrived(name: str, parameter: Tensor) -> None:
        grad = parameter.grad
        assert grad is not None
        num_bytes = grad.untyped_storage().nbytes()
        peak, left = live.take_peak() - base, live.now - base - num_bytes
        arrivals.append(Arrival(name, num_bytes, peak, left))
        parameter.grad = grad = None
        live.take_peak()

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(arrived, name))
        for name, parameter in trainee.module.named_parameters()
    ]
    live.take_peak()
    loss = trainee.loss(batch)
    forward_peak, saved = live.take_peak() - base, live.now - base
    loss.backward()
    end_peak = live.take_peak() - base
    for hook in hooks:
        hook.remove()
    del loss
    return StepTrace(forward_peak, saved, tuple(arrivals), end_peak)
