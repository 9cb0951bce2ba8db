"""What the loop saves and when, what a checkpoint's record says, and what must agree for a run to go on from it."""

from __future__ import annotations

import gc
import json
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.saves.folders import committed
from m2mkd_ds.checkpoint.saves.manifest import FileRecord, hash_files, read_manifest, write_manifest
from m2mkd_ds.checkpoint.store import StoreError
from m2mkd_ds.config import CheckpointConfig, ConfigError, PhaseConfig
from m2mkd_ds.data.plan import StreamState
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.watch.activity import section, snapshot
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.train import loop
from m2mkd_ds.train.ending.stopping import StopRequested
from m2mkd_ds.train.evaluation.evaluate import Score
from m2mkd_ds.train.nodes import versions
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.resume import resume
from m2mkd_ds.train.saving import Saver
from m2mkd_ds.train.steps import StepOutput
from tests.checkpoint.faulty_disk import folder_in_memory
from tests.left_over import open_files, running

RIGHT = [0.2, 0.6, 0.4]
"""Top-1 of the three evaluations."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


class NumberEngine:
    """Its state is the number of steps; writing it can be made to fail."""

    module = nn.Identity()
    is_collective = False

    def __init__(self) -> None:
        self.steps, self.fails_from, self.snapshots = 0, 10**9, 0

    def backward(self, loss: Tensor) -> None:
        """Nothing to learn."""

    def step(self, lr: float) -> float:
        self.steps += 1
        time.sleep(0.02)  # so that a thread gets its turn between two steps
        return 1.0

    def snapshot(self, reuse: NumberSnapshot | None = None) -> NumberSnapshot:
        self.snapshots += reuse is None
        taken = reuse or NumberSnapshot()
        taken.steps, taken.fails = self.steps, self.steps >= self.fails_from
        return taken

    def load(self, folder: Path) -> None:
        self.steps = int((folder / "state").read_text())


class NumberSnapshot:
    """What `NumberEngine` had done when it was taken."""

    steps, fails = 0, False

    def write(self, folder: Path) -> dict[str, FileRecord]:
        if self.fails:
            raise OSError("the disk is gone")
        (folder / "state").write_text(str(self.steps))
        return {"state": hash_files(folder)["state"]}


class Feed:
    """Two images a batch."""

    def batch(self, request: BatchRequest) -> TeacherBatch:
        return TeacherBatch(
            hidden={0: torch.zeros(2, 3, 4, 4)}, teacher_logits={}, targets_BV=torch.ones(2, 1), slot_ids_B=torch.tensor(request.slots)
        )

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """Nothing to release."""


def make_job(world: World, folder: Path, checkpoint: CheckpointConfig, *, steps: int = 12) -> tuple[loop.Job, NumberEngine]:
    """Twelve steps of two images, three epochs of eight; a checkpoint every fifth step and an evaluation every epoch (4 steps)."""
    engine, rights = NumberEngine(), iter(RIGHT)
    trainee = loop.Trainee(
        name="end_to_end", pair=0, folder=folder, engine=cast(Any, engine), fingerprint="f",
        step_fn=lambda batch, log: StepOutput(torch.tensor(1.0), {"loss": 1.0} if log else {}, {}),
    )  # fmt: skip
    phase = PhaseConfig(
        epochs=3, micro_batch_size=2, lr=1e-3, lr_batch=0, warmup_epochs=1, min_lr=1e-5, log_steps=1, eval_epochs=1, checkpoint_steps=5
    )

    def evaluate(trainees: Any) -> dict[str, Score]:
        return {"end_to_end": cast(Any, _Scored(next(rights)))}

    return loop.Job(
        phase_name="end_to_end", phase=phase, world=world, seed=3, total_steps=steps, num_images=8, trainees=[trainee],
        make_feed=lambda start: cast(Any, Feed()), evaluate=evaluate, with_teacher=False, folder=folder,
        stream=StreamState(seed=3, fingerprint="images", order="global", position=0), max_bad_samples=100, checkpoint=checkpoint,
        lineage={"recipe": "tiny", "input.assemble/weights.safetensors": "ab12"},
    ), engine  # fmt: skip


def asked_in_step(step: int, job: loop.Job, engine: NumberEngine) -> loop.Job:
    """The job, which somebody asks to stop while it works on `step`."""
    step_fn = job.trainees[0].step_fn

    def ask(batch: TeacherBatch, log: bool) -> StepOutput:
        if engine.steps == step - 1:
            job.stop.ask("SIGTERM")
        return step_fn(batch, log)

    job.trainees[0].step_fn = ask
    return job


class _Scored:
    def __init__(self, top1: float) -> None:
        self.top1, self.loss_sum, self.images = top1, 1.0, 1


def kept(folder: Path) -> dict[int, float | None]:
    """step -> score of the checkpoints that are there."""
    return {step: read_manifest(path)["record"]["score"] for step, path in committed(folder / "checkpoints")}


@pytest.mark.parametrize("asynchronous", [False, True])
def test_checkpoints_come_every_so_many_steps_and_at_the_end(world: World, tmp_path: Path, asynchronous: bool) -> None:
    job, engine = make_job(world, tmp_path, CheckpointConfig(asynchronous=asynchronous, keep_last=9))
    threads = running()
    loop.train(job)
    # Step 12 is evaluated, too; 5 and 10 are not.
    assert kept(tmp_path) == {5: None, 10: None, 12: 0.4}
    assert engine.snapshots == 1  # later ones took over the memory of the first
    assert running() <= threads


class PowerCut:
    """What a power cut would leave of a file: its bytes at its last fsync, under the name that it had at the last fsync of its folder."""

    def __init__(self, file: Path) -> None:
        self._file, self._bytes, self._named = file, dict[int, bytes](), 0
        self.at_commits: dict[int, list[int]] = {}
        """Steps of the lines that would be left by the step of the checkpoint that has just got its name."""
        self._fsync, self._rename = os.fsync, os.rename

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if path.is_file():
            self._bytes[path.stat().st_ino] = path.read_bytes()
        elif path.resolve() == self._file.parent:
            self._named = self._file.stat().st_ino

    def rename(self, source: Path, target: Path) -> None:
        self._rename(source, target)
        lines = self._bytes.get(self._named, b"").splitlines()
        self.at_commits[int(target.name.removeprefix("step-"))] = [json.loads(line)["step"] for line in lines]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_power_cut_leaves_no_checkpoint_without_the_metrics_up_to_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    config = CheckpointConfig(asynchronous=asynchronous, keep_last=9)
    with pytest.raises(StopRequested):
        loop.train(asked_in_step(3, *make_job(world, tmp_path, config)))
    power = PowerCut(tmp_path.resolve() / "metrics.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", power.fsync)
        patch.setattr(os, "rename", power.rename)
        loop.train(make_job(world, tmp_path, config)[0])
    assert power.at_commits.keys() == {5, 10, 12}
    for step, lines in power.at_commits.items():
        assert set(range(1, step + 1)) <= set(lines)


def test_with_keep_best_every_evaluation_is_followed_by_a_checkpoint_and_the_best_stays(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig(keep_last=1, keep_best=1, keep_every=10))
    loop.train(job)
    assert kept(tmp_path) == {8: 0.6, 10: None, 12: 0.4}


def test_the_score_of_an_evaluation_that_a_stop_left_out_counts_as_well(world: World, tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=1, keep_best=1)
    job, engine = make_job(world, tmp_path, config)
    with pytest.raises(StopRequested):
        loop.train(asked_in_step(4, job, engine))
    assert kept(tmp_path) == {4: None}
    again, engine = make_job(world, tmp_path, config)
    rights = iter([0.9, 0.2, 0.4])
    loop.train(replace(again, evaluate=lambda trainees: {"end_to_end": cast(Any, _Scored(next(rights)))}))
    assert kept(tmp_path) == {4: 0.9, 12: 0.4} and engine.steps == 12
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))  # the late evaluation has no line of its own
    assert (lines[3]["loss"], lines[3]["eval/top1"]) == (1.0, 0.9) and lines[3].keys() == lines[7].keys()


def test_the_record_says_all_that_the_state_does_not(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig())
    loop.train(job)
    record = read_manifest(tmp_path / "checkpoints" / "step-00000010")["record"]
    assert {key: record[key] for key in ("step", "trainee", "fingerprint", "global_batch_size", "score")} == {
        "step": 10, "trainee": "end_to_end", "fingerprint": "f", "global_batch_size": 2, "score": None
    }  # fmt: skip
    assert record["stream"] == {"seed": 3, "fingerprint": "images", "order": "global", "position": 20, "version": 1}
    # 12 steps, 4 of them warm-up. Step index 9 is the 6th of 8 after the warm-up: min + (peak - min) / 2 * (1 + cos(pi * 5 / 7)).
    schedule = record["schedule"]
    assert {k: v for k, v in schedule.items() if k != "lr"} == {
        "total_steps": 12, "warmup_steps": 4, "peak_lr": 1e-3, "min_lr": 1e-5, "warmup_lr": 1e-6
    }  # fmt: skip
    assert schedule["lr"] == pytest.approx(1e-5 + 0.5 * 9.9e-4 * (1 + -0.6234898), rel=1e-6)
    assert record["rng"]["seed"] == 3 and record["rng"]["phase"] == "end_to_end" and "blake2b" in record["rng"]["rule"]
    assert record["layout"] == {
        "ranks": 1, "micro_batch_size": 2, "gradient_accumulation_steps": 1, "ep_size": 1, "ds_config": "zero1", "precision": "auto"
    }  # fmt: skip
    assert record["versions"] == versions() and record["lineage"]["input.assemble/weights.safetensors"] == "ab12"
    assert record["commit"] and record["time"].endswith("+00:00")


def test_a_failed_asynchronous_save_stops_the_run_a_step_later_and_not_at_the_next_save(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, CheckpointConfig(asynchronous=True))
    job = replace(job, phase=replace(job.phase, checkpoint_steps=4, eval_epochs=0))
    engine.fails_from = 8
    with pytest.raises(StoreError, match="step-00000008: checkpoint not saved .the disk is gone"):
        loop.train(job)
    assert 8 <= engine.steps < 12
    assert kept(tmp_path) == {4: None}
    # The same command goes on from what there is.
    again, engine = make_job(world, tmp_path, CheckpointConfig())
    again = replace(again, phase=job.phase)
    loop.train(again)
    assert engine.steps == 12 and list(kept(tmp_path)) == [8, 12]


def test_a_save_that_fails_at_the_very_end_is_an_error_of_the_phase(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, CheckpointConfig(asynchronous=True))
    engine.fails_from = 12
    with pytest.raises(StoreError, match="step-00000012: checkpoint not saved"):
        loop.train(job)


def test_a_run_is_not_told_to_be_stopped_and_saved_when_its_last_save_has_failed(world: World, tmp_path: Path) -> None:
    job, engine = make_job(world, tmp_path, CheckpointConfig(asynchronous=True))
    engine.fails_from = 3
    with pytest.raises(StoreError, match="step-00000003: checkpoint not saved .the disk is gone"):
        loop.train(asked_in_step(3, job, engine))


def test_another_error_is_not_hidden_by_the_save_under_way(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, engine = make_job(world, tmp_path, CheckpointConfig(asynchronous=True))
    engine.fails_from = 5
    step_fn = job.trainees[0].step_fn

    def fail_in_step_6(batch: TeacherBatch, log: bool) -> StepOutput:
        if engine.steps == 5:
            raise KeyError("a mistake in the model")
        return step_fn(batch, log)

    job.trainees[0].step_fn = fail_in_step_6
    with caplog.at_level(logging.WARNING, "m2mkd_ds"), pytest.raises(KeyError, match="a mistake in the model"):
        loop.train(job)
    assert "the checkpoint under way was not saved either" in caplog.text and "the disk is gone" in caplog.text


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("schedule", "total_steps", 13, r"its schedule has total_steps 13, this run has 12; go on with the version"),
        ("schedule", "peak_lr", 0.5, r"its schedule has peak_lr 0\.5, this run has 0\.001"),
        ("rng", "rule", "another", r"its rng has rule another, this run has torch\.manual_seed"),
        ("rng", "pair", 1, r"its rng has pair 1, this run has 0"),
    ],
)
def test_a_checkpoint_of_other_rules_is_refused(
    world: World, tmp_path: Path, part: str, key: str, value: object, message: str
) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig(keep_last=9))
    loop.train(job)
    change_record(tmp_path / "checkpoints" / "step-00000012", lambda record: record[part].update({key: value}))
    with pytest.raises(ConfigError, match=message):
        resume(make_job(world, tmp_path, CheckpointConfig())[0].trainees[0], job)


def change_record(folder: Path, change: Any) -> None:
    manifest = read_manifest(folder)
    change(manifest["record"])
    files = {name: FileRecord(**sums) for name, sums in manifest["files"].items()}
    write_manifest(folder, manifest["step"], manifest["record"], attempt=manifest["attempt"], files=files, parts=manifest["parts"])


def test_other_versions_go_on_and_are_told(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig(keep_last=9))
    loop.train(job)
    change_record(tmp_path / "checkpoints" / "step-00000012", lambda record: record["versions"].update({"torch": "1.0"}))
    again = make_job(world, tmp_path, CheckpointConfig())[0]
    with caplog.at_level(logging.WARNING, "m2mkd_ds"):
        resume(again.trainees[0], again)
    assert again.trainees[0].step == 12 and f"made with other versions (torch 1.0 -> {versions()['torch']})" in caplog.text


def test_checkpoints_of_one_setting_outlive_a_start_with_a_mistaken_one_and_its_correction(world: World, tmp_path: Path) -> None:
    for fingerprint in ("right", "mistaken", "right", "mistaken"):
        job, _ = make_job(world, tmp_path, CheckpointConfig(), steps=5)
        job.trainees[0].fingerprint = fingerprint
        loop.train(job)
    owners = {
        folder.name: {read_manifest(path)["record"]["fingerprint"] for _, path in committed(folder)}
        for folder in tmp_path.glob("checkpoints*")
    }
    assert owners == {
        "checkpoints": {"mistaken"}, "checkpoints.outdated": {"right"}, "checkpoints.outdated-2": {"mistaken"},
        "checkpoints.outdated-3": {"right"},
    }  # fmt: skip


def test_a_checkpoint_is_read_back_under_the_limit_of_a_save(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(loop, "resume", lambda trainee, job: limits.append(snapshot().limit))
    with section("start", limit="start"):
        loop.train(make_job(world, tmp_path, CheckpointConfig())[0])
    assert limits == ["save"]


def test_a_record_of_a_result_that_cannot_be_read_is_told_as_such(world: World, tmp_path: Path) -> None:
    loop.train(make_job(world, tmp_path, CheckpointConfig())[0])
    (tmp_path / "done.json").write_text('{"half": ')
    job = make_job(world, tmp_path, CheckpointConfig())[0]
    told: list[Any] = []

    def tell(value: Any) -> Any:
        told.append(value)
        return value

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("m2mkd_ds.train.resume.broadcast_object", tell)
        with pytest.raises(StoreError, match="done.json: damaged"):
            resume(job.trainees[0], job)
    assert len(told) == 1  # the other ranks wait for it


def test_when_all_checkpoints_are_broken_the_run_does_not_begin_again(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig())
    loop.train(job)
    for _, folder in committed(tmp_path / "checkpoints"):
        (folder / "state").write_text("x")
    with pytest.raises(StoreError, match=r"no checkpoint is usable .*step-00000012/state: damaged"):
        loop.train(make_job(world, tmp_path, CheckpointConfig())[0])


def test_a_hundred_saves_and_resumes_of_an_engine_leave_nothing_behind(world: World) -> None:
    with folder_in_memory() as folder:
        job = replace(make_job(world, folder, CheckpointConfig(asynchronous=True))[0], total_steps=200)
        net = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64))
        settings = resolve_ds_config("zero1", job.phase, world_size=1, precision="fp32")
        engine = DeepSpeedEngine(net, build_adamw(net, job.phase), settings, world)
        engine.backward(engine(torch.ones(2, 64)).square().mean())
        engine.step(1e-3)
        expected = engine.full_state_dict()
        trainee = loop.Trainee(name="end_to_end", pair=0, folder=folder, engine=engine, fingerprint="f", step_fn=job.trainees[0].step_fn)
        job = replace(job, trainees=[trainee])
        saver, seen = Saver(job), []
        for step in range(1, 111):
            trainee.step = step
            saver.save(trainee)
            saver.wait()
            trainee.step = 0
            resume(trainee, job)
            assert trainee.step == step
            if step in (10, 110):
                gc.collect()
                handlers = len(logging.getLogger("m2mkd_ds").handlers)
                seen.append((open_files(), running(), handlers, resident_bytes()))
        saver.close()
        again = engine.full_state_dict()
        assert all(torch.equal(expected[name], again[name]) for name in expected)
        assert seen[1][0] <= seen[0][0] and seen[1][1] <= seen[0][1] and seen[1][2] == seen[0][2]
        assert seen[1][3] - seen[0][3] < 16 << 20  # the state is 0.4 MB: each cycle keeping it would be 40 MB
        assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000109", "step-00000110"]
        engine.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_a_record_is_small(world: World, tmp_path: Path) -> None:
    job, _ = make_job(world, tmp_path, CheckpointConfig())
    loop.train(job)
    assert len(json.dumps(read_manifest(tmp_path / "checkpoints" / "step-00000012")["record"])) < 3000
