"""Logger set-up, rank filter, progress with ETA, and the JSON-lines metrics writer (the source of truth for every curve).

On a terminal, progress is a live bar; elsewhere (a log file, pdsh output) it is a plain line now and then, because a
redrawn bar makes garbage there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

logger = logging.getLogger("m2mkd_ds")

T = TypeVar("T")

PLAIN_INTERVAL_S = 15.0
"""Seconds between two plain progress lines."""


def setup_logging(rank: int = 0, level: int = logging.INFO) -> None:
    """Send the package's log to stderr; ranks above 0 only warn, with their number in front."""
    handler = _CurrentStderr()
    prefix = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    logger.handlers[:] = [handler]
    logger.setLevel(level if rank == 0 else logging.WARNING)
    logger.propagate = False


class _CurrentStderr(logging.StreamHandler[Any]):
    """Writes to whatever sys.stderr is at the moment: a live progress bar puts a proxy there that prints above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def format_seconds(seconds: float) -> str:
    """`75` -> `1:15`; `3700` -> `1:01:40`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """A bar (terminal) or a line now and then (elsewhere) for `total` units of work; silent when `enabled` is false.

    Use as a context manager; `advance(n, note)` moves it and shows `note` (for example the loss) beside the ETA.
    """

    def __init__(self, total: int, what: str, *, enabled: bool = True, start: int = 0) -> None:
        self.total, self.what, self.done, self.enabled = total, what, start, enabled
        self._start_done, self._started = start, time.monotonic()
        self._last_line = self._started
        self._bar: RichProgress | None = None
        self._note = ""

    def __enter__(self) -> Progress:
        if self.enabled and sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True), transient=False)
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done, note="")
        return self

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count `n` more units as done."""
        self.done += n
        if self._bar is not None:
            self._note = note or self._note
            self._bar.update(self._task, advance=n, note=self._note)
            return
        now = time.monotonic()
        if self.enabled and now - self._last_line >= PLAIN_INTERVAL_S:
            self._last_line = now
            worked = self.done - self._start_done
            eta = (now - self._started) / max(worked, 1) * (self.total - self.done)
            logger.info("%s %d/%d (%.0f %%), ETA %s %s", self.what, self.done, self.total, 100 * self.done / max(self.total, 1),
                        format_seconds(eta), note)  # fmt: skip

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def progress(iterable: Iterable[T], *, total: int, what: str, enabled: bool = True) -> Iterator[T]:
    """Yield from `iterable` while showing how far it is."""
    with Progress(total, what, enabled=enabled) as bar:
        for item in iterable:
            yield item
            bar.advance()


class MetricsWriter:
    """Appends one JSON object a line. On resume, lines of steps that will be done again are cut off first."""

    def __init__(self, path: Path, *, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = _replaced(path, [line for line in _complete_lines(path) if json.loads(line)["step"] <= resume_step])

    def write(self, record: dict[str, Any]) -> None:
        """Append `record` (must hold `step`)."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def amend(self, record: dict[str, Any]) -> None:
        """Put `record` into the last line when that is of the same step, else append it: readers may take every line for a step of its
        own. Reads and writes the whole file."""
        lines = _complete_lines(self._path)
        last = json.loads(lines[-1]) if lines else {}
        if last.get("step") != record["step"]:
            self.write(record)
            return
        replaced = _replaced(self._path, [*lines[:-1], json.dumps(last | record)])  # may fail; then what was there stays open
        self._file.close()
        self._file = replaced

    def sync(self) -> None:
        """Force what was written to the disk. From any thread: every line has left this process already. Raises OSError."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush to disk and close."""
        self._file.flush()
        self.sync()
        self._file.close()


def _replaced(path: Path, lines: list[str]) -> TextIO:
    """The file with these lines instead, open for more; bytes and name are on the disk, so that a power cut brings no old one back.

    As `checkpoint.atomic.replacing`, which a room that everyone imports may not import.
    """
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        file.writelines(line + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return path.open("a")


def _complete_lines(path: Path) -> list[str]:
    """Lines of the file that end in a newline: a killed writer may have left half a line."""
    if not path.exists():
        return []
    return [line[:-1] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete records of a metrics.jsonl file, in order."""
    return [json.loads(line) for line in _complete_lines(path)]
