"""Ask every host of a cluster over ssh, all at once and for a bounded time."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from m2mkd_ds.train.launching.cluster_doctor.probe import MARK

SSH = ("ssh", "-n", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=2")
LIMIT_S = 90.0
"""A probe imports torch, on a cold network file system perhaps slowly."""

_NO_SUCH_COMMAND = (126, 127)


@dataclass(frozen=True)
class Answer:
    """What came back from a host: facts, or the stage at which it failed and why."""

    host: str
    facts: Mapping[str, Any] | None
    failed_at: str = ""
    """`ssh`, `python` or `package`; empty when there are facts."""
    reason: str = ""
    clock_s: float = 0.0
    """Its clock minus ours, the least that the two readings allow; 0 when they may agree."""


def ask_hosts(hosts: Sequence[str], request: Mapping[str, str], *, limit_s: float = LIMIT_S) -> list[Answer]:
    """The answers in the order of `hosts`, after `limit_s` seconds at the latest."""
    with ThreadPoolExecutor(max_workers=min(len(hosts), 64)) as pool:
        return list(pool.map(lambda host: _ask(host, request, limit_s), hosts))


def _ask(host: str, request: Mapping[str, str], limit_s: float) -> Answer:
    """The time of a host is read by its first line, before anything slow starts."""
    carried = {name: value for name, value in os.environ.items() if name.startswith("PYTHON") or name == "DS_ACCELERATOR"}
    words = [f"{name}={value}" for name, value in carried.items()]
    probe = [sys.executable, "-m", "m2mkd_ds.train.launching.cluster_doctor.probe", json.dumps(dict(request))]
    command = f"date +%s.%N; exec env {shlex.join([*words, *probe])}"
    before = time.time()
    process = subprocess.Popen([*SSH, host, command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watch = threading.Timer(limit_s, process.kill)
    watch.start()
    try:
        assert process.stdout is not None
        first = process.stdout.readline()
        after = time.time()
        output, errors = process.communicate()
    finally:
        watch.cancel()
        process.kill()
        process.wait()
    if process.returncode < 0:
        return Answer(host, None, "python" if first else "ssh", f"no answer within {limit_s:.0f} s")
    answers = [line for line in output.splitlines() if line.startswith(MARK)]
    if process.returncode == 0 and answers:
        return Answer(host, json.loads(answers[-1].removeprefix(MARK)), clock_s=clock_difference(first, before, after))
    said = next((line.strip() for line in reversed(errors.splitlines()) if line.strip()), f"exit code {process.returncode}, no message")
    if process.returncode == 255:
        return Answer(host, None, "ssh", said)
    return Answer(host, None, "python" if process.returncode in _NO_SUCH_COMMAND else "package", said)


def clock_difference(line: str, before: float, after: float) -> float:
    """Seconds by which a clock that showed `line` is ahead, when ours showed `before` earlier and `after` later; 0 if they may agree."""
    match = re.match(r"(\d+)(\.\d+)?", line)
    if not match:
        return 0.0
    theirs = float(match[0])
    precision = 0.0 if match[2] else 1.0  # a small `date` does not know %N
    if theirs + precision < before:
        return theirs + precision - before
    return max(theirs - after, 0.0)
