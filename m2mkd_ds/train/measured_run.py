"""A small run whose phases are watched: what `m2mkd bench memory` starts on every rank.

    teacher (fresh weights) -> split -> pretrain_meta -> m2mkd (watched) -> assemble -> end_to_end (watched)

The phases are the trainer's own jobs, loader, feed, evaluation and checkpoints included; only marks are set between batches.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.config import RunConfig
from m2mkd_ds.distributed.world import World, barrier
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import build_stage
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.train.context import open_run
from m2mkd_ds.train.evaluation.evaluate import Score
from m2mkd_ds.train.job import Job, Trainee
from m2mkd_ds.train.loop import train
from m2mkd_ds.train.nodes import find_node, fingerprint
from m2mkd_ds.train.phases.end_to_end import end_to_end
from m2mkd_ds.train.phases.finish import finish_node, finish_trainee
from m2mkd_ds.train.phases.m2mkd import m2mkd
from m2mkd_ds.train.run_phase import run_in_world

WATCHED = ("m2mkd", "end_to_end")


class Marks(Protocol):
    """Who is told where the run is."""

    def mark(self, name: str) -> None:
        """A window begins: `step N` with the first batch of step N (from 0), `evaluate` behind the last step."""
        ...


def run_watched(config: RunConfig, world: World, watch: Callable[[str], AbstractContextManager[Marks]]) -> None:
    """The chain above; `watch(phase)` is entered around each watched phase. Collective."""
    if world.is_main:
        _make_teacher(config, world)
    barrier()
    for name in ("split", "pretrain_meta"):
        run_in_world(config, world, name)
    _watched(config, world, "m2mkd", watch)
    run_in_world(config, world, "assemble")
    _watched(config, world, "end_to_end", watch)


def _make_teacher(config: RunConfig, world: World) -> None:
    arch = open_run(config, world).teacher_arch
    span = StageSpan.whole(sum(config.teacher.depths))
    save_weights(Path(config.teacher.weights), build_stage(arch, span, seed=1).state_dict())


def _watched(config: RunConfig, world: World, phase: str, watch: Callable[[str], AbstractContextManager[Marks]]) -> None:
    gc.collect()
    barrier()
    with watch(phase) as marks:
        ctx = open_run(config, world)
        job = m2mkd(ctx, tuple(pair.index for pair in ctx.pairs)) if phase == "m2mkd" else end_to_end(ctx)
        train(_marked(job, marks))
    node, started = find_node(config, phase), time.time()
    print_ = fingerprint(config, node, ctx.root, ctx.data_fingerprints)
    facts = {"steps": job.total_steps, "images": job.total_steps * job.global_batch_size, "world_size": world.size, "wall_s": 0.0}
    for trainee in job.trainees:
        finish_trainee(ctx, node, trainee, facts)
        trainee.engine.close()
    if node.per_pair:
        finish_node(ctx, node, print_, started)


def _marked(job: Job, marks: Marks) -> Job:
    def evaluate(trainees: list[Trainee]) -> dict[str, Score]:
        marks.mark("evaluate")
        return job.evaluate(trainees)

    return replace(job, make_feed=lambda start: _MarkedFeed(job.make_feed(start), marks), evaluate=evaluate)


class _MarkedFeed:
    """Passes everything on to the job's own feed."""

    def __init__(self, feed: TeacherFeed, marks: Marks) -> None:
        self._feed, self._marks, self._step = feed, marks, -1

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The feed's batch; marks the first one of a step."""
        if request.step != self._step:
            self._step = request.step
            self._marks.mark(f"step {request.step}")
        return self._feed.batch(request)

    def metrics(self) -> dict[str, float]:
        """The feed's."""
        return self._feed.metrics()

    def close(self) -> None:
        """Close the feed."""
        self._feed.close()
