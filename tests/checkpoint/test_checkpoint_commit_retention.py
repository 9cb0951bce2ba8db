"""Which checkpoints stay, worked out by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.saves.commit import commit_checkpoint, latest_checkpoint
from m2mkd_ds.checkpoint.saves.folders import committed
from m2mkd_ds.checkpoint.saves.manifest import FileRecord
from m2mkd_ds.checkpoint.saves.retention import prune
from m2mkd_ds.checkpoint_config import CheckpointConfig

SCORES = {10: 0.5, 20: 0.9, 30: None, 40: 0.7, 50: 0.9, 60: 0.1, 70: 0.2}


def write(folder: Path) -> dict[str, FileRecord]:
    (folder / "state").write_bytes(b"s")
    return {"state": FileRecord(1, hashlib.sha256(b"s").hexdigest())}


def save(root: Path, step: int, config: CheckpointConfig, score: float | None = None) -> None:
    commit_checkpoint(root, step, write, {"step": step, "score": score}, config=config)


def steps(root: Path) -> list[int]:
    return [step for step, _ in committed(root)]


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (CheckpointConfig(), [60, 70]),
        (CheckpointConfig(keep_last=1), [70]),
        (CheckpointConfig(keep_last=9), [10, 20, 30, 40, 50, 60, 70]),
        (CheckpointConfig(keep_every=30), [30, 60, 70]),  # 60 is the last but one as well
        (CheckpointConfig(keep_last=1, keep_every=20), [20, 40, 60, 70]),
        # The two best are 20 and 50; 20 was the best when 50 came, and both stay.
        (CheckpointConfig(keep_last=1, keep_best=2), [20, 50, 70]),
        # One of the two equal scores: the newer.
        (CheckpointConfig(keep_last=1, keep_best=1), [50, 70]),
        (CheckpointConfig(keep_last=1, keep_best=1, keep_every=40), [40, 50, 70]),
    ],
)
def test_the_newest_every_nth_and_the_best_stay(tmp_path: Path, config: CheckpointConfig, left: list[int]) -> None:
    for step, score in SCORES.items():
        save(tmp_path, step, config, score)
    assert steps(tmp_path) == left


def test_a_broken_checkpoint_takes_nobodys_place_and_goes_with_its_age(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2, keep_best=1)
    save(tmp_path, 10, config, 0.5)
    save(tmp_path, 20, config, 0.9)
    (tmp_path / "step-00000020" / "state").unlink()  # the best one
    save(tmp_path, 30, config, 0.1)
    assert steps(tmp_path) == [10, 20, 30]
    save(tmp_path, 40, config, 0.1)
    assert steps(tmp_path) == [10, 30, 40]  # 10 is the best that can be read


def test_a_broken_checkpoint_is_none_of_the_last_ones(tmp_path: Path) -> None:
    config = CheckpointConfig(keep_last=2)
    for step in (10, 20):
        save(tmp_path, step, config)
    (tmp_path / "step-00000020" / "state").unlink()
    save(tmp_path, 30, config)
    assert steps(tmp_path) == [10, 20, 30]  # else 30 would be the only one that can be read


def test_a_step_saved_again_counts_once(tmp_path: Path) -> None:
    for step in (10, 20, 20, 20):
        save(tmp_path, step, CheckpointConfig(keep_last=2))
    assert steps(tmp_path) == [10, 20] and len(list(tmp_path.iterdir())) == 2


def test_settings_may_change_between_saves(tmp_path: Path) -> None:
    for step, score in SCORES.items():
        save(tmp_path, step, CheckpointConfig(keep_last=9), score)
    save(tmp_path, 80, CheckpointConfig(keep_last=1, keep_best=1), 0.3)
    assert steps(tmp_path) == [50, 80]


@pytest.mark.parametrize(("after_done", "left"), [("keep", [10, 20, 30]), ("last", [30]), ("none", [])])
def test_a_finished_phase_keeps_what_it_is_told(tmp_path: Path, after_done: str, left: list[int]) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, CheckpointConfig(keep_last=9))
    prune(tmp_path, after_done)
    assert steps(tmp_path) == left and len(list(tmp_path.iterdir())) == len(left)


def test_the_last_one_that_a_finished_phase_keeps_is_a_good_one(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, CheckpointConfig(keep_last=9))
    (tmp_path / "step-00000030" / "manifest.json").unlink()
    prune(tmp_path, "last")
    found = latest_checkpoint(tmp_path)
    assert steps(tmp_path) == [20] and found is not None and found[1]["step"] == 20
