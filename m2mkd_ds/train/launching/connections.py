"""The ssh connections of a job over a hostfile: found and cut, so that its ranks on all hosts see their launcher's shell end.

A launcher that is killed leaves them: pdsh goes on without it, and each ssh that pdsh starts is the leader of a session of its own, which
no signal to a process group reaches. So the launcher gets a mark into its environment, which its children inherit and no other host sees.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

MARK = "M2MKD_LAUNCH_MARK"
"""Variable of the launcher and all that it starts on this host."""

_LIMIT_S = 10.0


def marked_processes(mark: str) -> list[int]:
    """Processes of this user on this host whose environment holds the mark. Empty on systems without /proc."""
    entry = f"{MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if entry in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # another user's, or it has just ended
    return found


def cut_connections(mark: str) -> None:
    """SIGKILL to the launcher with this mark and all that it started on this host: they save nothing, and ranks have other parents."""
    deadline = time.monotonic() + _LIMIT_S
    while (found := marked_processes(mark)) and time.monotonic() < deadline:
        for number in found:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
