"""A disk that fails, for one process: changes (create, write, fsync, mkdir, rename, unlink, rmdir) are counted and go wrong at one of them.

The functions of `os` and the files that `open` gives are replaced; the code under test is not touched and does not know. Reading works.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """An empty folder on a file system in memory where there is one: a forced write costs milliseconds elsewhere."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


NEEDS_SPACE = ("create", "write", "fsync", "mkdir")


class FaultyDisk:
    """Makes the `at`-th change (from 0) of this process go wrong; `install` it in a process of its own, for it stays.

    `kill`: the process ends before the change, or half-way through a write. `eio`: this change fails, later ones work. `dead`: this one and
    all later ones fail. `enospc`: this one fails, and later ones that need space do.
    """

    def __init__(self, fault: str, at: int) -> None:
        self.fault, self.at = fault, at
        self.changes: list[str] = []

    def install(self) -> None:
        """From now on."""
        for name, kind in (
            ("fsync", "fsync"), ("mkdir", "mkdir"), ("rename", "rename"), ("replace", "rename"), ("unlink", "unlink"), ("rmdir", "rmdir"),
        ):  # fmt: skip
            setattr(os, name, self._changing(getattr(os, name), kind))
        real_open = os.open

        def faulty_open(path: Any, flags: int, *args: Any, **options: Any) -> int:
            if flags & os.O_CREAT:
                self.change("create", path)
            return real_open(path, flags, *args, **options)

        os.open = faulty_open
        io.open = builtins.open = self._open  # type: ignore[assignment]

    def change(self, kind: str, subject: Any, half_way: Callable[[], object] = lambda: None) -> None:
        """Count one change; raises, or ends the process, when it is one that fails."""
        number = len(self.changes)
        name = Path(os.readlink(f"/proc/self/fd/{subject}") if isinstance(subject, int) else os.fsdecode(subject)).name
        self.changes.append(f"{kind} {name}")
        later = number > self.at and (self.fault == "dead" or (self.fault == "enospc" and kind in NEEDS_SPACE))
        if number != self.at and not later:
            return
        half_way()
        if self.fault == "kill":
            os._exit(9)
        code = errno.ENOSPC if self.fault == "enospc" else errno.EIO
        raise OSError(code, os.strerror(code), name)

    def _changing(self, real: Callable[..., Any], kind: str) -> Callable[..., Any]:
        def call(subject: Any, *args: Any, **options: Any) -> Any:
            self.change(kind, subject)
            return real(subject, *args, **options)

        return call

    def _open(self, file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None) -> Any:
        raw = _FaultyFile(self, file, mode.replace("b", "").replace("t", ""))
        if mode[0] == "r":
            buffered: Any = io.BufferedReader(raw)
        else:
            buffered = io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding or "utf-8", errors, newline)


class _FaultyFile(io.FileIO):
    def __init__(self, disk: FaultyDisk, path: Any, mode: str) -> None:
        self._disk, self._name = disk, path
        if mode != "r" and not Path(path).exists():
            disk.change("create", path)
        super().__init__(path, mode)

    def write(self, content: Any) -> int:
        self._disk.change("write", self._name, lambda: super(_FaultyFile, self).write(bytes(content)[: len(content) // 2]))
        return super().write(content)
