"""Memory of one rank in one phase: the engines of all trainees, the frozen modules and the activations, moment by moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_ds.planner.engine_memory import FP32, EngineSettings, make_engine
from m2mkd_ds.planner.ledger import Ledger, Moment
from m2mkd_ds.planner.partition import Partition
from m2mkd_ds.planner.step_trace import SceneTrace


@dataclass(frozen=True, kw_only=True)
class Statics:
    """What is there besides the engines."""

    frozen: int
    """Bytes of frozen modules."""
    average_copies: tuple[int, ...]
    """Bytes of each trainee's copy for evaluation, with all experts; empty without ema_decay."""


def phase_peak(
    trace: SceneTrace, parts: Sequence[Partition], names: Sequence[str], statics: Statics, settings: EngineSettings, accumulation: int
) -> Moment:
    """The fullest moment of a training step (from the second on, when the optimizer's state is there)."""
    ledger = Ledger()
    ledger.add("frozen", statics.frozen)
    engines = [make_engine(settings, part, ledger, name) for part, name in zip(parts, names, strict=True)]
    for engine in engines:
        engine.hold()
    if statics.average_copies:
        ledger.add("average", sum(statics.average_copies) + sum(FP32 * part.part for part in parts))
    for number in sorted({0, accumulation - 1}):
        # The batch before goes only when the next one is there.
        ledger.mark("frozen modules", activations=trace.batch + trace.feed_peak)
        with ledger.held("activations", trace.batch):
            for engine, step in zip(engines, trace.steps, strict=True):
                engine.backward(step, is_first=number == 0, is_last=number + 1 == accumulation)
    with ledger.held("activations", trace.batch):
        for engine in engines:
            engine.update()
    return ledger.peak
