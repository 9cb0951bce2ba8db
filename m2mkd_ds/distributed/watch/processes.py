"""Whether a process of this host is still the one that it was: by number and start time, as /proc tells them.

Where there is no /proc (not Linux), nothing is known, and nobody is taken for dead.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process as it was seen once."""

    pid: int
    started: str
    """Field 22 of /proc/<pid>/stat: a number that is used again has another one."""
    command: str
    """Its words, as far as they tell who it is."""

    @property
    def is_alive(self) -> bool:
        """Whether it still runs; a zombie does not."""
        found = _stat(self.pid)
        return found is not None and found[2] == self.started and found[0] not in "ZX"


def seen(pid: int) -> Process | None:
    """The process with this number now; None when there is none."""
    found = _stat(pid)
    if found is None or found[0] in "ZX":
        return None
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        words = []
    return Process(pid, found[2], " ".join(words).strip()[:200])


def parent_of(pid: int) -> int:
    """The number of the parent; 0 when it is not known."""
    found = _stat(pid)
    return int(found[1]) if found is not None else 0


def is_gone(pid: int, started: str) -> bool:
    """Whether a process of this host, seen before with this start time, has ended."""
    return _has_proc() and not Process(pid, started, "").is_alive


def start_time(pid: int) -> str:
    """Of a live process; empty when it is not known."""
    found = _stat(pid)
    return found[2] if found is not None else ""


def number_space() -> str:
    """Where process numbers of this process mean what they mean to it: this start of the machine and this PID namespace. Containers may
    share a host name and nothing else. Empty when it is not known."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str, str] | None:
    """(state, parent, start time)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    fields = text[text.rindex(")") + 2 :].split()  # the name in parentheses may hold blanks and parentheses
    return fields[0], fields[1], fields[19]


def _has_proc() -> bool:
    return os.path.exists("/proc/self/stat")
