"""scripts/venv.sh: one environment a set of requirements, and never a half-made one. pip is played by a shell script."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAKE_PYTHON = """#!/usr/bin/env bash
# Stands for python3: `-m venv DIR` makes a directory with a copy of this file, `-m pip` writes what it was asked to LOG.
case "$1 $2" in
    "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip") echo "$3" >> "$LOG"; [ "$3" != "$FAIL_AT" ] || exit 7; [ "$3" != freeze ] || echo torch==2.15.0 ;;
    *) exec "$REAL_PYTHON" "$@" ;;
esac
"""


class Machine:
    """A cache folder, a fake python and a checkout that holds only setup.py and the scripts."""

    def __init__(self, root: Path, checkout: Path) -> None:
        self.cache, self.log, self.python, self.checkout = root / "cache", root / "pip.log", root / "python", root / "checkout"
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)
        (self.checkout / "scripts").mkdir(parents=True)
        for name in ("setup.py", "scripts/venv.sh", "scripts/requirements.py"):
            (self.checkout / name).write_text((checkout / name).read_text())

    def venv(self, fail_at: str = "") -> subprocess.CompletedProcess[str]:
        own = {"M2MKD_CACHE": str(self.cache), "PYTHON": str(self.python), "LOG": str(self.log)}
        env = {**os.environ, **own, "REAL_PYTHON": sys.executable, "FAIL_AT": fail_at}
        return subprocess.run(
            ["bash", str(self.checkout / "scripts/venv.sh")], env=env, capture_output=True, text=True, timeout=60, check=False
        )

    def installs(self) -> int:
        return self.log.read_text().split().count("install") if self.log.exists() else 0


@pytest.fixture
def machine(tmp_path: Path, repo_root: Path) -> Machine:
    return Machine(tmp_path, repo_root)


def test_the_second_call_reuses_the_environment(machine: Machine) -> None:
    first, second = machine.venv(), machine.venv()
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert Path(first.stdout.strip()).is_relative_to(machine.cache)
    assert machine.installs() == 1


def test_an_interrupted_install_is_started_again(machine: Machine) -> None:
    broken = machine.venv(fail_at="install")
    assert broken.returncode != 0
    assert broken.stdout == ""  # no path of an unusable environment
    again = machine.venv()
    assert again.returncode == 0
    assert "left unfinished" in again.stderr
    assert machine.installs() == 2


def test_packages_that_contradict_each_other_are_no_environment(machine: Machine) -> None:
    assert machine.venv(fail_at="check").returncode != 0
    machine.venv()
    assert machine.installs() == 2


def test_a_changed_requirement_makes_another_environment(machine: Machine) -> None:
    before = machine.venv().stdout
    setup = machine.checkout / "setup.py"
    setup.write_text(setup.read_text().replace('"torch>=2.11"', '"torch>=2.12"'))
    after = machine.venv()
    assert after.stdout != before
    assert Path(before.strip()).parents[1].as_posix() in after.stderr  # says which one may be deleted
    assert machine.installs() == 2


def test_a_lost_interpreter_makes_the_environment_anew(machine: Machine) -> None:
    python = Path(machine.venv().stdout.strip())
    python.unlink()
    assert machine.venv().returncode == 0
    assert machine.installs() == 2


def test_two_starts_at_once_install_once(machine: Machine) -> None:
    own = {"M2MKD_CACHE": str(machine.cache), "PYTHON": str(machine.python), "LOG": str(machine.log), "FAIL_AT": ""}
    env = {**os.environ, **own, "REAL_PYTHON": sys.executable}
    command = ["bash", str(machine.checkout / "scripts/venv.sh")]
    started = [subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0] for process in started}
    assert len(paths) == 1
    assert machine.installs() == 1


def test_an_old_python_is_refused_with_the_way_out(machine: Machine) -> None:
    machine.python.write_text('#!/usr/bin/env bash\ncase "$2" in *version_info\\ \\<*) exit 1 ;; esac\nexec "$REAL_PYTHON" "$@"\n')
    done = machine.venv()
    assert done.returncode == 1
    assert "Python 3.10 or newer is needed" in done.stderr
    assert not machine.cache.exists()


def test_setup_py_reads_its_own_lists(repo_root: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(repo_root / "scripts/requirements.py"), "INSTALL_REQUIRES"], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert "deepspeed>=0.19.8,<0.20" in lines
    assert not any(line.startswith("pytest") for line in lines)
