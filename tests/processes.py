"""Processes of this host, as /proc tells them: who is below whom, and who is still there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from m2mkd_ds.distributed.watch.processes import Process, parent_of, seen


def descendants(pid: int) -> list[Process]:
    """Children of a process, their children, and so on; zombies left out."""
    parents = {int(folder.name): parent_of(int(folder.name)) for folder in Path("/proc").iterdir() if folder.name.isdecimal()}
    known = {pid}
    while more := {child for child, parent in parents.items() if parent in known} - known:
        known |= more
    return [process for child in sorted(known - {pid}) if (process := seen(child)) is not None]


def still_there(processes: Iterable[Process], patience_s: float) -> list[Process]:
    """Those that have not ended when the time is up."""
    deadline = time.monotonic() + patience_s
    while left := [process for process in processes if process.is_alive]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return left
