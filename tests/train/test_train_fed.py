"""What the loop makes of its batches: waiting and fallbacks become metrics, a batch that is lost stops the job before the step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.saves.manifest import FileRecord, hash_files
from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.plan import StreamState
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.train import loop
from m2mkd_ds.train.bad_samples import BadDataError
from m2mkd_ds.train.ledger import SlotLedgerError
from m2mkd_ds.train.steps import StepOutput

GONE = BadSample("io", "shard-000000.tar", "key-7", 7, 4, -1, "cannot read")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


class CountingEngine:
    """Counts optimizer steps and learns nothing."""

    module = nn.Identity()
    is_collective = False

    def __init__(self) -> None:
        self.steps = 0

    def backward(self, loss: Tensor) -> None:
        """Nothing to learn."""

    def step(self, lr: float) -> float:
        self.steps += 1
        return 1.0

    def snapshot(self, reuse: object = None) -> CountingEngine:
        return self

    def write(self, folder: Path) -> dict[str, FileRecord]:
        (folder / "state").write_text("s")
        return hash_files(folder)


class Feed:
    """Two images a batch that say to have cost 0.05 s and one fallback; from step `lost_at` on, none."""

    def __init__(self, lost_at: int, tells: bool, twice_at: int = -1) -> None:
        self.lost_at, self.tells, self.twice_at = lost_at, tells, twice_at

    def batch(self, request: BatchRequest) -> TeacherBatch:
        lost = request.step >= self.lost_at
        slots_B = torch.tensor(request.slots) - 2 * (request.step == self.twice_at)
        return TeacherBatch(
            hidden={0: torch.zeros(2, 3, 4, 4)}, teacher_logits={}, targets_BV=torch.ones(2, 1), slot_ids_B=slots_B,
            bad=(GONE,) if lost and self.tells else (), lost="the disk is gone" if lost else "", wait_s=0.05, fallbacks=1,
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing to release."""


def make_job(
    world: World, folder: Path, *, lost_at: int = 99, loss: float = 1.0, tells: bool = True, twice_at: int = -1
) -> tuple[loop.Job, CountingEngine]:
    engine = CountingEngine()
    trainee = loop.Trainee(
        name="end_to_end", pair=0, folder=folder, engine=cast(Any, engine), fingerprint="f",
        step_fn=lambda batch, log: StepOutput(torch.tensor(loss if not batch.lost else math.nan), {"loss": loss} if log else {}, {}),
    )  # fmt: skip
    phase = PhaseConfig(micro_batch_size=2, gradient_accumulation_steps=2, lr=1e-3, lr_batch=0, warmup_epochs=0, log_steps=2, eval_epochs=0)
    return loop.Job(
        phase_name="end_to_end", phase=phase, world=world, seed=0, total_steps=5, num_images=8, trainees=[trainee],
        make_feed=lambda start: cast(Any, Feed(lost_at, tells, twice_at)), evaluate=lambda trainees: {}, with_teacher=False, folder=folder,
        stream=StreamState(seed=0, fingerprint="", order="global", position=0), max_bad_samples=100,
    ), engine  # fmt: skip


def test_waiting_and_fallbacks_are_those_of_the_interval(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path)
    loop.train(job)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    # Two micro-batches a step with one fallback each; lines after steps 1, 3 and 5 cover 1, 2 and 2 steps.
    assert [(line["step"], line["data/fallbacks"]) for line in lines] == [(1, 2), (3, 4), (5, 4)]
    for line, steps in zip(lines, (1, 2, 2), strict=True):
        seconds = 4 * steps / line["images_per_second"]  # of the interval: 4 images a step
        assert line["data/wait_share"] * seconds == pytest.approx(steps * 2 * 0.05, rel=1e-5)


class Copy:
    """A tracker's lines."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.finished = 0

    def log(self, record: dict[str, Any]) -> None:
        self.lines.append(dict(record))

    def finish(self) -> None:
        self.finished += 1


def test_trackers_get_the_lines_of_the_file_and_are_closed(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path)
    copy = Copy()
    loop.train(replace(job, open_trackers=lambda trainee: cast(Any, copy)))
    assert copy.lines == read_metrics(tmp_path / "metrics.jsonl") and len(copy.lines) == 3 and copy.finished == 1


def test_a_lost_batch_stops_the_job_before_the_step_and_after_the_list_is_written(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, lost_at=3)
    # The loss of such a batch means nothing: that it is NaN is not what is told.
    with pytest.raises(BadDataError, match="end_to_end: a batch could not be had at step 4: the disk is gone"):
        loop.train(job)
    assert engine.steps == 7  # two for each of three steps, and the micro-step of the fourth that only adds up gradients
    assert [(record["step"], record["sample"]) for record in read_metrics(tmp_path / "bad_samples.jsonl")] == [(4, 7), (4, 7)]


def test_a_lost_batch_stops_the_job_also_without_a_damaged_sample_to_list(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, lost_at=3, tells=False)  # as with a damaged file of stored logits
    with pytest.raises(BadDataError, match=r"a batch could not be had at step 4: the disk is gone\. Check that"):
        loop.train(job)
    assert engine.steps == 7


def test_slots_used_twice_stop_the_job_before_weights_are_saved(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, twice_at=1)  # two micro-batches of step 1 repeat the ones before them
    job = replace(job, phase=replace(job.phase, checkpoint_steps=2))
    with pytest.raises(SlotLedgerError, match="steps 0 to 1 should have used 8 slots"):
        loop.train(job)
    assert engine.steps == 4 and not list(tmp_path.glob("checkpoints/step-*"))
