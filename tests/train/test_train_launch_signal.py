"""A request to stop that comes to the pipeline reaches what it launched, which may save; the same again kills it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = """
import sys
from pathlib import Path
from m2mkd_ds.config import LaunchConfig
from m2mkd_ds.train.launching import launch
from m2mkd_ds.train.ending.outcome import JobRecords
from m2mkd_ds.train.ending.stopping import StopRequested
folder = Path(sys.argv[1])
job = '''
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
(folder / "pid").write_text(str(os.getpid()))
while not (folder / "asked").exists() or "deaf" in sys.argv:
    time.sleep(0.05)
(folder / "saved").touch()
'''
launch.launch_command = lambda config, verb: [sys.executable, "-c", job, str(folder), *sys.argv[2:]]
try:
    launch.run_launched(LaunchConfig(), ["train"], JobRecords(folder / "run", ["m2mkd"], 0.2), folder)
except StopRequested as stop:
    sys.exit(f"{stop}")
"""


@pytest.fixture
def pipeline(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    words = getattr(request, "param", [])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path), *words], stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        yield process
    finally:
        process.kill()
        if Path(f"/proc/{job_of(tmp_path)}").exists():
            os.kill(job_of(tmp_path), signal.SIGKILL)


def job_of(folder: Path) -> int:
    return int((folder / "pid").read_text())


def test_a_request_reaches_the_launched_job_which_ends_in_its_own_time(pipeline: subprocess.Popen[str], tmp_path: Path) -> None:
    pipeline.send_signal(signal.SIGTERM)
    _, said = pipeline.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and not Path(f"/proc/{job_of(tmp_path)}").exists()
    assert "stopped on request in m2mkd at step 0 (SIGTERM); the same command goes on" in said


@pytest.mark.parametrize("pipeline", [["deaf"]], indirect=True)
def test_the_same_request_again_kills_the_job(pipeline: subprocess.Popen[str], tmp_path: Path) -> None:
    pipeline.send_signal(signal.SIGINT)
    time.sleep(2.5)
    assert pipeline.poll() is None and (tmp_path / "asked").exists()
    pipeline.send_signal(signal.SIGINT)
    assert pipeline.wait(timeout=60) == 128 + signal.SIGINT
    deadline = time.monotonic() + 10
    while Path(f"/proc/{job_of(tmp_path)}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{job_of(tmp_path)}").exists() and not (tmp_path / "saved").exists()
