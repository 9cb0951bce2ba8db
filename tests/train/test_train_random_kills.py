"""One run, killed twenty times and always started again by the same command, against the run that nobody disturbed: bit for bit the same.

SIGKILL to the whole job of two ranks, at points drawn with a fixed seed: at a micro-batch, or before an operation on a checkpoint's files,
on either rank, with saves in line and asynchronous by turns.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.logs import read_metrics
from m2mkd_ds.train.pipeline import write_config
from tests.launching import launch
from tests.train import random_kills_job
from tests.train.kill_resume_job import PHASE
from tests.train.random_kills_job import CHECKPOINT_STEPS, STEPS, config_for
from tests.train.test_train_kill_resume import write_noise

SCRIPT = Path(random_kills_job.__file__)
KILLS = 20
TIMES = ("time_s", "images_per_second", "data/wait_share")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # 22 launches


def points() -> list[tuple[str, int, int]]:
    """(kind, rank, count). A save is about 30 operations of rank 0 and 10 of rank 1; a step is two micro-batches."""
    draw = random.Random(20)
    found = []
    for number in range(KILLS):
        rank = draw.randrange(2)
        kind = "batch" if number % 4 == 0 else "file"
        found.append((kind, rank, draw.randint(1, 12) if kind == "batch" else draw.randint(1, (70, 25)[rank])))
    return found


def run_once(out: Path, name: str, kind: str, rank: int, count: int, asynchronous: bool) -> int:
    words = ["train", "--config", str(out / name / "config.yaml"), "--phase", PHASE]
    words += ["--set", f"checkpoint.asynchronous={str(asynchronous).lower()}"]
    return launch(SCRIPT, [str(out), kind, str(rank), str(count), *words], timeout_s=120, check=kind == "none").returncode


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("random_kills")
    write_noise(out / "shards")
    for name in ("straight", "killed"):
        write_config(config_for(out, name))
    run_once(out, "straight", "none", 0, 0, asynchronous=False)
    for log in out.glob("steps.*.txt"):
        log.unlink()
    rounds = []
    for number, (kind, rank, count) in enumerate(points()):
        assert run_once(out, "killed", kind, rank, count, asynchronous=number % 2 == 1) == -9, (number, kind, rank, count)
        assert not (out / "killed" / PHASE / "done.json").exists()
        rounds.append(steps_begun(out))
    run_once(out, "killed", "none", 0, 0, asynchronous=True)
    rounds.append(steps_begun(out))
    (out / "rounds.json").write_text(json.dumps(rounds))
    return out


def steps_begun(out: Path) -> list[int]:
    """Steps of rank 0 in the round that has just ended; the log begins anew."""
    log = out / "steps.0.txt"
    steps = [int(line) for line in log.read_text().split()] if log.exists() else []
    log.unlink(missing_ok=True)
    return steps


def test_the_weights_are_those_of_the_undisturbed_run_bit_for_bit(out: Path) -> None:
    straight, killed = (load_file(out / name / PHASE / "weights.safetensors") for name in ("straight", "killed"))
    assert straight.keys() == killed.keys() and all(torch.equal(straight[name], killed[name]) for name in straight)


def test_the_metrics_are_those_of_the_undisturbed_run(out: Path) -> None:
    straight, killed = (
        [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(out / name / PHASE / "metrics.jsonl")]
        for name in ("straight", "killed")
    )
    assert len(straight) == STEPS and straight == killed


def test_no_kill_costs_more_than_the_save_under_way_and_the_interval_before_it(out: Path) -> None:
    rounds = [steps for steps in json.loads((out / "rounds.json").read_text()) if steps]
    for before, after in zip(rounds, rounds[1:], strict=False):
        assert before[-1] - 2 * CHECKPOINT_STEPS <= after[0] <= before[-1] + 1, (before, after)
    assert sum(before[-1] >= after[0] for before, after in zip(rounds, rounds[1:], strict=False)) > 5  # work was lost, and done again


def test_nothing_is_left_of_the_saves_that_were_cut_off(out: Path) -> None:
    assert sorted(path.name for path in (out / "killed" / PHASE / "checkpoints").iterdir()) == [
        f"step-{STEPS - CHECKPOINT_STEPS:08d}", f"step-{STEPS:08d}"
    ]  # fmt: skip
