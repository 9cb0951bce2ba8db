"""A request to stop that comes to the pipeline reaches what it launched, which may save; the same again kills it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2mkd_ds.train.ending.outcome import read_outcome

SCRIPT = """
import sys
from pathlib import Path
from m2mkd_ds.config import LaunchConfig
from m2mkd_ds.train.launching import launch
from m2mkd_ds.train.ending.outcome import JobRecords
from m2mkd_ds.train.ending.stopping import StopRequested
folder = Path(sys.argv[1])
job = '''
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *_: (folder / "asked").touch())
(folder / "pid").write_text(str(os.getpid()))
while not (folder / "asked").exists() or "deaf" in sys.argv:
    time.sleep(0.05)
(folder / "run/m2mkd").mkdir(parents=True)
outcome = {"state": "stopped", "phase": "m2mkd", "launch": "L", "step": 7, "cause": "SIGTERM", "pid": 5}
(folder / "run/m2mkd/outcome.json").write_text(json.dumps(outcome))
(folder / "told").write_text(os.environ["M2MKD_UNDER_PIPELINE"])
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
    pipeline.send_signal(signal.SIGUSR1)
    _, said = pipeline.communicate(timeout=60)
    assert (tmp_path / "saved").exists() and not Path(f"/proc/{job_of(tmp_path)}").exists()
    assert "stopped on request in m2mkd at step 7 (SIGUSR1); the same command goes on" in said
    # DeepSpeed's launcher dies of others than SIGTERM, so that is what the ranks get, and what they record.
    outcome = read_outcome(tmp_path / "run" / "m2mkd")
    assert outcome is not None and (outcome.cause, outcome.step, outcome.pid) == ("SIGUSR1", 7, 5)
    assert (tmp_path / "told").exists()  # the ranks know that the pipeline speaks for them


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
