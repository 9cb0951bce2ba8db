"""What a launcher started on this host is found by its mark, whatever session it is in, and nothing else is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from m2mkd_ds.train.launching.connections import MARK, cut_connections, marked_processes

# As pdsh does: a child in a session of its own, which outlives its parent and which no signal to a group reaches.
STARTER = "import subprocess, sys; subprocess.Popen(['sleep', '60'], start_new_session=True); print('ready', flush=True); sys.stdin.read()"


def start(mark: str) -> subprocess.Popen[bytes]:
    job = subprocess.Popen(
        [sys.executable, "-c", STARTER], env={**os.environ, MARK: mark}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    assert job.stdout is not None and job.stdout.readline() == b"ready\n"
    return job


def test_a_job_s_processes_are_cut_and_another_s_are_not() -> None:
    ours, other = start("mark-a"), start("mark-b")
    try:
        deadline = time.monotonic() + 20
        while len(marked_processes("mark-a")) < 2 or len(marked_processes("mark-b")) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(ours.pid, signal.SIGKILL)
        ours.wait(20)
        assert len(marked_processes("mark-a")) == 1  # the child is left
        cut_connections("mark-a")
        assert marked_processes("mark-a") == []
        assert len(marked_processes("mark-b")) == 2 and other.poll() is None
        assert marked_processes("mark") == []  # the whole mark counts
    finally:
        for mark, job in (("mark-a", ours), ("mark-b", other)):
            cut_connections(mark)
            job.wait(20)


def test_without_such_a_job_nothing_happens() -> None:
    cut_connections("nobody")
