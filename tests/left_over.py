"""What this process holds: compared as sets, since what earlier tests have left may go meanwhile, and would hide as much that is new."""

from __future__ import annotations

import os
import threading
from contextlib import suppress


def open_files() -> set[tuple[str, str]]:
    """(number, what it is) of every descriptor; sockets, pipes and memory have numbers of their own in it."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one by which they were listed
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return found


def running() -> set[threading.Thread]:
    """Threads that were started from Python."""
    return set(threading.enumerate())
