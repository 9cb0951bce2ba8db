"""scripts/quickstart.sh: which commands it gives, in which order, and what it does when the images cannot be had.

The package is played by a shell script: what the real commands do is tested where they are.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Start = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for python3 and for the environment's python. Writes each call of the package to LOG; `shards write` makes index files.
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") ;;
    "-m m2mkd_ds")
        echo "${*:3}" >> "$LOG"
        [ "$3" != "$FAILS" ] || exit 1
        if [ "$3" = shards ]; then
            [ "$6" != "$ABSENT" ] || { echo "m2mkd: no copy of $6" >&2; exit 1; }
            for part in train validation; do mkdir -p "$8/$part"; touch "$8/$part/index.json"; done
        fi ;;
    *classify.py*) echo "classify ${*:2} PYTHONPATH=[$PYTHONPATH]" >> "$LOG" ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


@pytest.fixture
def start(tmp_path: Path, repo_root: Path) -> Start:
    """Run the script with words; gives (finished process, calls of this run)."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def run(*words: str, absent: str = "", fails: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        own = {"M2MKD_CACHE": str(tmp_path / "cache"), "PYTHON": str(python), "LOG": str(log), "ABSENT": absent, "FAILS": fails}
        done = subprocess.run(
            ["bash", str(repo_root / "scripts/quickstart.sh"), *words],
            env={**os.environ, **own, "REAL_PYTHON": sys.executable}, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return done, log.read_text().replace(f"{tmp_path}/", "").splitlines()

    return run


def test_the_steps_stand_in_order(start: Start) -> None:
    done, calls = start("run")
    assert done.returncode == 0, done.stderr
    assert calls[:2] == [
        "shards write --source fashion_mnist --out run/data/fashion_mnist",
        "pipeline --recipe fashion --run-dir run --set data.train=run/data/fashion_mnist/train "
        "data.validation=run/data/fashion_mnist/validation data.source=fashion_mnist",
    ]
    # Whoever gets the exported folder does not have our package: it must not be importable there.
    assert calls[2].endswith("classify run/export/model run/data/fashion_mnist/validation PYTHONPATH=[]")
    assert calls[3:] == ["report run"]


def test_the_second_run_does_not_fetch_images_again(start: Start) -> None:
    start("run")
    done, calls = start("run", absent="fashion_mnist")
    assert done.returncode == 0
    assert [call.split()[0] for call in calls] == ["pipeline", "classify", "report"]


def test_without_fashion_mnist_it_takes_the_digits_and_says_so(start: Start) -> None:
    done, calls = start("run", absent="fashion_mnist")
    assert done.returncode == 0
    assert "no copy of fashion_mnist" in done.stderr
    assert "DIGITS" in done.stderr
    assert calls[1] == "shards write --source digits --out run/data/digits"
    assert "data.train=run/data/digits/train" in calls[2]
    # A later start, when the images can be had, does not change the data of this run.
    _, calls = start("run")
    assert "data.train=run/data/digits/train" in calls[0]


def test_a_word_that_is_no_override_is_refused_before_anything_runs(start: Start) -> None:
    done, calls = start("run", "nonsense")
    assert (done.returncode, calls) == (2, [])
    assert "nonsense: expected KEY=VALUE" in done.stderr


def test_it_stops_where_a_step_fails(start: Start) -> None:
    done, calls = start("run", fails="pipeline")
    assert done.returncode == 1
    assert [call.split()[0] for call in calls] == ["shards", "pipeline"]


def test_overrides_reach_the_pipeline_once(start: Start) -> None:
    _, calls = start("run", "--set", "m2mkd.lr=1e-3", "--set", "seed=3")
    assert calls[1].endswith("data.source=fashion_mnist m2mkd.lr=1e-3 seed=3")
    assert calls[1].count("--set") == 1
