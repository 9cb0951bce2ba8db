"""How answers of hosts become lines; real hosts are asked in tests/cluster."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.train.launching.cluster_doctor.ask import Answer, clock_difference
from m2mkd_ds.train.launching.cluster_doctor.judge import COLUMNS, Expected, format_rows, notes_of, problems_of, table_row
from m2mkd_ds.train.launching.cluster_doctor.probe import MARK

EXPECTED = Expected(
    {"m2mkd_ds": "1", "torch": "2"}, "3.11.7", "/env/bin/python", {"n1": 2}, "token", "/run", {"train": "t", "validation": "v"}
)  # fmt: skip
SOUND: dict[str, Any] = {
    "host": "n1", "python": "3.11.7", "versions": {"m2mkd_ds": "1", "torch": "2"}, "own_name": ["10.0.0.1"], "cores": 2, "gpus": 0,
    "route": {"address": "10.0.0.1", "interface": "eth0"}, "run_dir": {"seen": "token", "free_gib": 50.0}, "train": "t", "validation": "v",
}  # fmt: skip


def with_change(path: str, value: Any) -> Answer:
    facts = copy.deepcopy(SOUND)
    *parents, last = path.split(".")
    place = facts
    for name in parents:
        place = place[name]
    place[last] = value
    return Answer("n1", facts)


def test_a_sound_host_has_no_problem_and_no_note() -> None:
    answer = Answer("n1", SOUND)
    assert problems_of(answer, EXPECTED) == [] and notes_of(answer) == []
    assert dict(zip(COLUMNS, table_row(answer, EXPECTED), strict=True)) == {
        "host": "n1", "slots": "2", "ssh": "yes", "python": "3.11.7", "m2mkd_ds": "1", "torch": "2", "deepspeed": "absent", "clock": "same",
        "GPUs": "0", "cores": "2", "network": "eth0 10.0.0.1", "run folder": "50 GiB free", "shards": "yes",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("python", "3.10.1", "n1: Python 3.10.1 and here 3.11.7; use one environment on all hosts"),
        ("versions.torch", "2.1", "n1: torch 2.1 and here 2; install the same version on all hosts"),
        ("cores", 1, "n1: slots=2 but no GPU and 1 cores; correct the hostfile"),
        ("gpus", 1, "n1: slots=2 but 1 GPUs; correct the hostfile"),
        ("gpus", {"error": "libcuda"}, "n1: torch does not work (libcuda); mend the environment there"),
        ("route", {"error": "MASTER_ADDR x: unknown"}, "n1: MASTER_ADDR x: unknown (route to the first host)"),
        ("run_dir.seen", "else", "n1: run folder /run: another file of the same name there; every host must see one folder"),
        ("run_dir.free_gib", 0.25, "n1: run folder /run: 0.2 GiB free; make room for checkpoints"),
        ("train", "T", "n1: data.train: other shards than here; every host must read the same"),
    ],
)
def test_one_fault_is_one_line(path: str, value: Any, line: str) -> None:
    assert problems_of(with_change(path, value), EXPECTED) == [line]


@pytest.mark.parametrize(
    ("stage", "line"),
    [
        ("ssh", "n1: not reached by ssh (no route); it must be up"),
        ("python", "n1: /env/bin/python cannot be started (no route); the environment must lie"),
        ("package", "n1: m2mkd_ds does not run there (no route); the checkout must lie"),
    ],
)
def test_a_host_that_gives_no_facts_is_told_by_the_stage_that_failed(stage: str, line: str) -> None:
    answer = Answer("n1", None, stage, "no route")
    (problem,) = problems_of(answer, EXPECTED)
    assert problem.startswith(line)
    assert table_row(answer, EXPECTED)[:4] == ("n1", "2", "no" if stage == "ssh" else "yes", "-")


@pytest.mark.parametrize(
    ("line", "difference"),
    [
        ("1000.50\n", 0.0),  # between our two readings
        ("1004.00\n", 3.0),  # after both: at least 3 s ahead of the later
        ("0990.25\n", -9.75),  # before both
        ("1000\n", 0.0),
        ("999.%N\n", 0.0),  # whole seconds: it may be 999.99
        ("995\n", -4.0),
        ("Welcome!\n", 0.0),
    ],
)
def test_clocks_differ_by_the_least_that_the_readings_allow(line: str, difference: float) -> None:
    assert clock_difference(line, before=1000.0, after=1001.0) == pytest.approx(difference)


def test_columns_stand_below_each_other() -> None:
    assert format_rows([("a", "bcd"), ("long", "e")]) == "a     bcd\nlong  e"


def test_the_probe_tells_what_it_sees_and_why_it_sees_not(tmp_path: Path) -> None:
    (tmp_path / ".doctor-abc").write_text("abc")
    request = {"master": "127.0.0.1", "run_dir": str(tmp_path), "token": "abc", "train": str(tmp_path / "none"), "validation": ""}
    command = [sys.executable, "-m", "m2mkd_ds.train.launching.cluster_doctor.probe", json.dumps(request)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=120, check=True)
    facts = json.loads(done.stdout.splitlines()[-1].removeprefix(MARK))
    assert facts["cores"] == len(os.sched_getaffinity(0)) and facts["gpus"] == torch.cuda.device_count()
    assert facts["run_dir"]["seen"] == "abc" and facts["run_dir"]["free_gib"] > 0
    assert str(tmp_path / "none") in facts["train"]["error"] and facts["validation"] is None
    assert [file.name for file in tmp_path.iterdir()] == [".doctor-abc"]
