"""Trackers get what metrics.jsonl says, once, under one id, and cannot stop a training. W&B and trackio for real, without a network."""

from __future__ import annotations

import errno
import importlib.util
import json
import logging
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import MetricsWriter, read_metrics
from m2mkd_ds.trackers import trackers
from m2mkd_ds.trackers.tracker import TrackedRun
from m2mkd_ds.trackers.trackers import FILE_NAME, Trackers, check_trackers, open_trackers, scalars
from tests.launching import rank_environment
from tests.trackers import wandb_file

CONFIG = {"seed": 3, "data": {"train": "shards"}}
# Part of a phase: steps of two pairs, side by side, from a checkpoint on; killed at its end, or ended well.
STORY = """
import os, signal, sys, time
from pathlib import Path
from m2mkd_ds.logs import MetricsWriter
from m2mkd_ds.trackers.trackers import check_trackers, open_trackers
check_trackers(["wandb", "trackio"])
resume, last, is_killed = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "killed"
folders = [Path(sys.argv[1]) / f"pair_{i}" for i in range(2)]
pairs = [
    (MetricsWriter(folder / "metrics.jsonl", resume_step=resume),
     open_trackers(["wandb", "trackio"], folder, project="tiny", name=f"run {folder.name}",
                   config={"seed": 3, "data": {"train": "shards"}}, resume_step=resume))
    for folder in folders
]
for step in range(resume + 1, last + 1):
    for i, (writer, opened) in enumerate(pairs):
        record = {"step": step, "epoch": step / 4, "loss": 1 / step + i, "moe/0/load": [0.25 / step, 0.5], "moe/0/dead": 0, "note": "x"}
        writer.write(record)
        opened.log(record)
if is_killed:
    time.sleep(3)  # they write once or twice a second
    os.kill(os.getpid(), signal.SIGKILL)
for writer, opened in pairs:
    writer.close()
    opened.finish()
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the story, which ran in a process of its own: trackio reads its folder when it is imported."""
    folder = tmp_path_factory.mktemp("told")
    env = {
        **rank_environment(folder), "WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio"), "HOME": str(folder),
        **{f"WANDB_{what}_DIR": str(folder / "home") for what in ("CONFIG", "CACHE", "DATA")},
        "WANDB_API_KEY": "k" * 40, "https_proxy": "http://127.0.0.1:9",  # whoever asks the network fails
    }  # fmt: skip
    # kill -9 after step 5, of which the checkpoint of step 3 is left; then on to step 8
    for words, code in ((["0", "5", "killed"], -9), (["3", "8", "well"], 0)):
        ended = subprocess.run([sys.executable, "-c", STORY, str(folder), *words], env=env, text=True, capture_output=True, timeout=120)
        assert ended.returncode == code, ended.stderr[-4000:]
        assert ended.stdout == ""
    return folder


def expected(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl, a list as single numbers."""
    lines = read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 9))
    return [
        {
            "step": line["step"], "epoch": line["epoch"], "loss": line["loss"], "moe/0/load/0": line["moe/0/load"][0],
            "moe/0/load/1": line["moe/0/load"][1], "moe/0/dead": line["moe/0/dead"],
        }
        for line in lines
    ]  # fmt: skip


@pytest.mark.parametrize("pair", ["pair_0", "pair_1"])
def test_wandb_has_every_line_once_under_one_id(told: Path, pair: str) -> None:
    ids, config, lines = wandb_file.read(told / pair)
    assert ids == {json.loads((told / pair / FILE_NAME).read_text())["id"]}
    assert {key: config[key] for key in CONFIG} == CONFIG
    ours = [{("step" if key == "_step" else key): value for key, value in line.items() if key not in ("_runtime", "_timestamp")}
            for line in lines]  # fmt: skip
    assert ours == expected(told / pair)


@pytest.mark.parametrize("pair", ["pair_0", "pair_1"])
def test_trackio_has_every_line_once_under_one_name(told: Path, pair: str) -> None:
    name = f"run {pair} {json.loads((told / pair / FILE_NAME).read_text())['id']}"
    with sqlite3.connect(told / "trackio" / "tiny.db") as base:
        rows = base.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)).fetchall()
        configs = base.execute("SELECT config FROM configs WHERE run_name = ?", (name,)).fetchall()
    assert [{"step": step, **json.loads(metrics)} for step, metrics in rows] == expected(told / pair)
    assert {key: value for key, value in json.loads(configs[0][0]).items() if key in CONFIG} == CONFIG and len(configs) == 1


def test_no_key_gets_into_what_is_written(told: Path) -> None:
    written = [file for file in told.rglob("*") if file.is_file()]
    assert len(written) > 10 and not any(b"k" * 40 in file.read_bytes() for file in written)


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    opened = open_trackers(["tensorboard"], tmp_path, project="p", name="n", config={}, resume_step=0)
    assert opened is not None
    for step in (1, 2):
        opened.log({"step": step, "loss": 0.5 / step, "moe/0/load": [0.75, 0.25]})
    opened.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]} == {
        "loss": [(1, 0.5), (2, 0.25)], "moe/0/load/0": [(1, 0.75), (2, 0.75)], "moe/0/load/1": [(1, 0.25), (2, 0.25)],
    }  # fmt: skip


def test_a_line_becomes_its_numbers() -> None:
    record = {"step": 3, "moe/0/load": [0.75, 0.25], "moe/0/drop_rate": 0.125, "moe/0/dead": 0, "note": "x"}
    assert scalars(record) == {"moe/0/load/0": 0.75, "moe/0/load/1": 0.25, "moe/0/drop_rate": 0.125, "moe/0/dead": 0}


class Fragile:
    """Fails in one step, and keeps what it got before."""

    def __init__(self, run: TrackedRun, fails_at: int) -> None:
        self.run, self.fails_at = run, fails_at
        self.got: list[int] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.fails_at:
            raise ConnectionError("the server is\ngone")
        self.got.append(step)

    def finish(self) -> None:
        """Nothing to flush."""


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made: dict[str, Fragile] = {}

    def opener(name: str, fails_at: int) -> Any:
        return lambda run: made.setdefault(name, Fragile(run, fails_at))

    def broken(run: TrackedRun) -> Fragile:
        raise OSError("no room")

    monkeypatch.setattr(trackers, "OPENERS", {"wandb": opener("wandb", 2), "trackio": opener("trackio", 99), "tensorboard": broken})
    run = TrackedRun(project="p", name="run pair 0", id="i", folder=tmp_path, config={})
    with caplog.at_level(logging.WARNING, logger="m2mkd_ds"):
        opened = Trackers(["wandb", "trackio", "tensorboard"], run)
        for step in range(1, 5):
            opened.log({"step": step, "loss": 1.0})
        opened.finish()
    assert (made["wandb"].got, made["trackio"].got) == ([1], [1, 2, 3, 4])
    assert [record.getMessage() for record in caplog.records] == [
        "run pair 0: the tracker tensorboard failed and gets nothing more (OSError: no room); metrics.jsonl has everything",
        "run pair 0: the tracker wandb failed and gets nothing more (ConnectionError: the server is gone); metrics.jsonl has everything",
    ]


def test_a_tracker_that_does_not_end_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()

    class Stuck(Fragile):
        def finish(self) -> None:
            never.wait()

    monkeypatch.setattr(trackers, "FINISH_S", 0.1)
    monkeypatch.setattr(trackers, "OPENERS", {"wandb": lambda run: Stuck(run, 99)})
    opened = Trackers(["wandb"], TrackedRun(project="p", name="n", id="i", folder=tmp_path, config={}))
    opened.finish()
    never.set()


def test_a_phase_that_begins_again_gets_another_id_and_one_that_goes_on_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Fragile] = []

    def opener(run: TrackedRun) -> Fragile:
        made.append(Fragile(run, 99))
        return made[-1]

    monkeypatch.setattr(trackers, "OPENERS", {"wandb": opener})
    # killed after 5; goes on from 3, killed again in 4; goes on from 3; begins again
    for resume, steps in ((0, range(1, 6)), (3, range(4, 5)), (3, range(4, 8)), (0, range(1, 3))):
        opened = open_trackers(["wandb"], tmp_path, project="p", name="n", config={}, resume_step=resume)
        assert opened is not None
        for step in steps:
            opened.log({"step": step})
    assert [tracker.got for tracker in made] == [[1, 2, 3, 4, 5], [], [6, 7], [1, 2]]
    ids = [tracker.run.id for tracker in made]
    assert len(set(ids[:3])) == 1 and ids[3] != ids[0]


def test_a_tracker_that_is_not_here_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("wandb", "trackio", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
        with pytest.raises(ConfigError, match=rf"trackers has {name}, which is not here .*pip install 'm2mkd_ds\[{name}\]'"):
            check_trackers([name])


def test_wandb_without_a_key_is_refused_before_it_would_ask_for_one(tmp_path: Path) -> None:
    folders = {f"WANDB_{what}_DIR": str(tmp_path) for what in ("CONFIG", "CACHE", "DATA")}
    env = {**rank_environment(tmp_path), "HOME": str(tmp_path), **folders}
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        env.pop(name, None)
    check = "from m2mkd_ds.trackers.trackers import check_trackers; check_trackers(['wandb'])"
    ended = subprocess.run([sys.executable, "-c", check], env=env, text=True, capture_output=True, timeout=60, stdin=subprocess.DEVNULL)
    assert ended.returncode == 1 and "there is no key for it here: run `wandb login`" in ended.stderr


def test_auto_is_tensorboard_where_it_is_and_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(["auto"])
    assert open_trackers(["auto"], tmp_path, project="p", name="n", config={}, resume_step=0) is None
    assert not (tmp_path / FILE_NAME).exists()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert trackers.chosen(["auto", "trackio", "tensorboard"]) == ("tensorboard", "trackio")


def test_the_file_of_metrics_is_written_without_any_tracker(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0)
    writer.write({"step": 1, "loss": 2.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]


def test_a_line_that_cannot_be_amended_stays_and_the_file_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl", resume_step=0)
    writer.write({"step": 1, "loss": 2.0})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(os, "replace", full)
        writer.amend({"step": 1, "top1": 50.0})
    writer.write({"step": 2, "loss": 1.0})
    writer.amend({"step": 2, "top1": 60.0})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "top1": 60.0}]
