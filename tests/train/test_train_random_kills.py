"""One run, killed twenty times and always started again by the same command, against the run that nobody disturbed: bit for bit the same.

SIGKILL to all ranks at once, at points drawn with a fixed seed: at a micro-batch, or before an operation on a checkpoint's files, counted
on either rank, with saves in line and asynchronous by turns.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.logs import read_metrics
from tests.launching import rank_environment
from tests.train import random_kills_job
from tests.train.kill_resume_job import PHASE
from tests.train.random_kills_job import CHECKPOINT_STEPS, STEPS
from tests.train.test_train_kill_resume import write_noise

SEED, KILLS = 20, 20
TIMES = ("time_s", "images_per_second", "data/wait_share")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random_kills")
    write_noise(out / "shards")
    with (out / "output.txt").open("w") as text:
        command = [sys.executable, str(Path(random_kills_job.__file__)), str(out), str(SEED), str(KILLS)]
        job = subprocess.run(
            command, env=rank_environment(tmp_path_factory.mktemp("scratch")), stdout=text, stderr=text, timeout=1200, check=False
        )
    assert job.returncode == 0, (out / "output.txt").read_text()[-4000:]
    return out


@pytest.fixture(scope="module")
def rounds(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "rounds.json").read_text())["rounds"]


def test_every_round_but_the_last_was_ended_by_a_kill(out: Path, rounds: list[dict[str, Any]]) -> None:
    assert [entry["ended"] for entry in rounds] == [[-9, -9]] * KILLS + [[0, 0]], (out / "output.txt").read_text()[-4000:]
    assert len({(entry["point"]["kind"], entry["point"]["rank"], entry["point"]["asynchronous"]) for entry in rounds[:-1]}) >= 6


def test_the_weights_are_those_of_the_undisturbed_run_bit_for_bit(out: Path) -> None:
    straight, killed = (load_file(out / name / PHASE / "weights.safetensors") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)


def test_the_metrics_are_those_of_the_undisturbed_run(out: Path) -> None:
    straight, killed = (
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(out / name / PHASE / "metrics.jsonl")]
        for name in ("straight", "killed")
    )
    assert len(straight) == STEPS and straight == killed


def test_no_kill_costs_more_than_the_save_under_way_and_the_interval_before_it(rounds: list[dict[str, Any]]) -> None:
    begun = [entry["steps"] for entry in rounds if entry["steps"]]
    for before, after in zip(begun, begun[1:], strict=False):
        assert before[-1] - 2 * CHECKPOINT_STEPS <= after[0] <= before[-1] + 1, (before, after)
    assert sum(before[-1] >= after[0] for before, after in zip(begun, begun[1:], strict=False)) > 5  # work was lost, and done again


def test_nothing_is_left_of_the_saves_that_were_cut_off(out: Path) -> None:
    assert sorted(path.name for path in (out / "killed" / PHASE / "checkpoints").iterdir()) == [
        f"step-{STEPS - CHECKPOINT_STEPS:08d}", f"step-{STEPS:08d}"
    ]  # fmt: skip
