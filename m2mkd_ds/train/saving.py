"""Saving the trainees of a job: what a checkpoint's record says, when one is due, and one `Committer` a trainee.

    record = {step, fingerprint (of the node), global_batch_size, stream (where the data goes on), schedule, rng, score, layout, versions,
              commit, lineage, time}

`resume.py` says which of them must agree with the run that goes on; the others are for people and for retention (`score`).

An asynchronous save that fails on any rank stops all ranks at one step: each tells in the sum that every optimizer step makes anyway
(`loop._agree`) whether it knows of a failure, and all raise it there, or at the next save or the end of the phase, if that comes first.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.saves.async_commit import Committer
from m2mkd_ds.checkpoint.saves.attempt import Ranks
from m2mkd_ds.checkpoint.saves.commit import Write
from m2mkd_ds.checkpoint.saves.manifest import FileRecord
from m2mkd_ds.checkpoint.store import StoreError
from m2mkd_ds.distributed.engine import Snapshot
from m2mkd_ds.distributed.world import broadcast_object
from m2mkd_ds.logs import MetricsWriter, logger
from m2mkd_ds.train.job import Job, Trainee
from m2mkd_ds.train.micro_seed import SEED_RULE
from m2mkd_ds.train.nodes import source_commit, versions
from m2mkd_ds.train.schedule import scaled_lr

PATIENCE_S = 10.0
"""How long a rank that stops for another error waits for a save under way: the other ranks may be gone."""


class Saver:
    """Saves of one job. Every rank makes one and calls the same methods at the same steps."""

    def __init__(self, job: Job) -> None:
        self.job = job
        ranks = Ranks(job.world.rank, job.world.size, broadcast_object)
        self._committers = {t.name: Committer(t.folder / "checkpoints", ranks, job.checkpoint) for t in job.trainees}
        self._snapshots: dict[str, Snapshot] = {}
        # One question to git a job, not one a save.
        self._origin = {"versions": versions(), "commit": source_commit()} if job.world.is_main else {}

    def is_due(self, done: int, *, is_evaluated: bool) -> bool:
        """Whether a checkpoint follows the step that made `done`."""
        every = done % self.job.phase.checkpoint_steps == 0 or done == self.job.total_steps
        return every or (is_evaluated and self.job.checkpoint.keep_best > 0)

    def save(self, trainee: Trainee, score: float | None = None) -> None:
        """Save the finished step; collective. `score`: top-1 on the validation images, if it was measured at this step.

        Raises StoreError when this save or, asynchronous, the trainee's one before has failed on any rank.
        """

        def copy() -> Write:
            # The save before has ended: its memory may be written over.
            self._snapshots[trainee.name] = trainee.engine.snapshot(reuse=self._snapshots.get(trainee.name))
            return _with_metrics(self._snapshots[trainee.name].write, trainee.metrics)

        record = {**record_of(trainee, self.job, score), **self._origin} if self.job.world.is_main else {}
        self._committers[trainee.name].save(trainee.step, copy, record)

    def has_failed(self) -> bool:
        """Whether this rank knows that a save under way has failed; does not wait."""
        return any(committer.has_failed() for committer in self._committers.values())

    def raise_failure(self) -> None:
        """For all ranks, when one of them has said `has_failed`. Raises StoreError on each of them."""
        self.wait()
        raise StoreError("a checkpoint could not be saved on another rank (its own message says why)")

    def wait(self) -> None:
        """Return when everything saved so far is committed. Raises StoreError when something is not, as far as this rank knows."""
        for committer in self._committers.values():
            committer.wait()

    def close(self) -> None:
        """End the threads. After `wait` nothing is under way; on other ways out, a save may end, and its error is only told."""
        for name, committer in self._committers.items():
            problem = committer.close(patience_s=PATIENCE_S)
            if problem:
                logger.warning("%s: the checkpoint under way was not saved either: %s", name, problem)


def _with_metrics(write: Write, metrics: MetricsWriter | None) -> Write:
    """`write`, with the lines of metrics up to this step forced to the disk first, on the rank that has them: after a power cut a run goes
    on behind its checkpoint, and what the file lacks then, it lacks for good. Where the state is written, in the thread if there is one,
    because a disk that fails there fails the save on all ranks."""
    if metrics is None:
        return write

    def write_both(folder: Path) -> Mapping[str, FileRecord]:
        metrics.sync()
        return write(folder)

    return write_both


def record_of(trainee: Trainee, job: Job, score: float | None) -> dict[str, Any]:
    """What a checkpoint of the trainee's present step says of itself, but for the versions."""
    layout = job.layout
    return {
        "step": trainee.step,
        "trainee": trainee.name,
        "fingerprint": trainee.fingerprint,
        "global_batch_size": job.global_batch_size,
        "stream": replace(job.stream, position=trainee.step * job.global_batch_size).to_dict(),
        "schedule": schedule_of(job) | {"lr": job.learning_rate(trainee.step - 1)},
        "rng": rng_of(trainee, job),
        "score": score,
        "layout": {
            "ranks": layout.world,
            "micro_batch_size": layout.micro_batch_size,
            "gradient_accumulation_steps": layout.accumulation,
            "ep_size": job.phase.ep_size,
            "ds_config": job.phase.ds_config,
            "precision": job.phase.precision,
        },
        "lineage": dict(job.lineage),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def schedule_of(job: Job) -> dict[str, Any]:
    """What the learning rate of every step follows from."""
    return {
        "total_steps": job.total_steps,
        "warmup_steps": job.warmup_steps,
        "peak_lr": scaled_lr(job.phase, job.global_batch_size),
        "min_lr": job.phase.min_lr,
        "warmup_lr": job.phase.warmup_lr,
    }


def rng_of(trainee: Trainee, job: Job) -> dict[str, Any]:
    """What the randomness of every later micro-batch follows from: there is no generator whose state would have to be kept."""
    return {"seed": job.seed, "phase": job.phase_name, "pair": trainee.pair, "rule": SEED_RULE}
