"""What ranks tell each other, and whoever started them, through files of the phase's folder:

    heartbeats/rank-<r>.json     every few seconds: where the rank is          heartbeats/stack-<r>.txt    all threads of one that hung
    failed-<r>.json              why a rank ended                              outcome.json                train/ending/outcome.py

Files, because they need no process group, outlive their writer, and are seen from every host. `launch` is the name of this start of the
job: files of an earlier one are never taken for its own. On NFS another host may see a new file half a minute late.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from m2mkd_ds.distributed.watch.activity import Snapshot
from m2mkd_ds.distributed.watch.processes import is_gone, number_space, start_time

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """One rank at one moment."""

    launch: str
    rank: int
    host: str
    pid: int
    pid_started: str
    space: str
    """In which `pid` is its number (`processes.number_space`)."""
    beat: int
    """Grows with every heartbeat."""
    time: float
    """Wall clock of its host."""
    step: int
    """The step that it works on, from 1; 0 before the first."""
    section: str
    """Name of the innermost section."""
    describes: str
    """`forward` of step 12, pair 0."""
    may_wait: bool
    """Whether it may be others that hold it up there."""
    since_s: float
    """Seconds that it had been in this section."""

    @property
    def who(self) -> str:
        return f"rank {self.rank} on {self.host}"

    @property
    def is_gone(self) -> bool:
        """Whether it is known, where its process would be seen, that it has ended."""
        return self.host == socket.gethostname() and self.space == number_space() and is_gone(self.pid, self.pid_started)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended."""

    launch: str
    rank: int
    host: str
    pid: int
    time: float
    kind: str
    """own: an error of this rank. peer: it lost another one. hang: its watchdog ended it."""
    cause: str
    """`ValueError: shard-000003.tar: ...`"""
    where: str
    """The sections that it was in."""
    step: int
    slots: str
    """Of the micro-batch that it worked on."""
    exit_code: int


def beat_of(launch: str, rank: int, beat: int, now: Snapshot) -> Heartbeat:
    """This process's heartbeat."""
    return Heartbeat(
        launch=launch, rank=rank, host=socket.gethostname(), pid=os.getpid(), pid_started=start_time(os.getpid()),
        space=number_space(), beat=beat, time=time.time(), step=now.step, section=now.name, describes=now.describe(),
        may_wait=now.may_wait, since_s=round(time.monotonic() - now.changed, 3),
    )  # fmt: skip


def heartbeat_file(folder: Path, rank: int) -> Path:
    return folder / "heartbeats" / f"rank-{rank}.json"


def stack_file(folder: Path, rank: int) -> Path:
    return folder / "heartbeats" / f"stack-{rank}.txt"


def failure_file(folder: Path, rank: int) -> Path:
    return folder / f"failed-{rank}.json"


def write_record(file: Path, record: Heartbeat | Failure | Mapping[str, Any]) -> None:
    """Replace the file at once; not forced to disk, since it is of use only while the host is up. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    body = dict(record) if isinstance(record, Mapping) else asdict(record)
    temporary.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def read_heartbeats(folder: Path, launch: str = "") -> dict[int, Heartbeat]:
    """The newest heartbeat of every rank of this launch (empty: of any), by rank."""
    return _read(folder / "heartbeats", "rank-*.json", launch, lambda body: Heartbeat(**body))


def read_failures(folder: Path, launch: str = "") -> dict[int, Failure]:
    """The failures of this launch (empty: of any), by rank."""
    return _read(folder, "failed-*.json", launch, lambda body: Failure(**body))


def remove_records(folder: Path) -> None:
    """Forget earlier launches."""
    for file in [*folder.glob("failed-*.json"), *folder.glob("heartbeats/*")]:
        file.unlink(missing_ok=True)


def _read(folder: Path, pattern: str, launch: str, make: Callable[[dict[str, Any]], T]) -> dict[int, T]:
    """Files of another version, or half-written ones of a foreign program, are left out: they tell nothing that could be used."""
    found: dict[int, T] = {}
    for file in sorted(folder.glob(pattern)):
        try:
            body = json.loads(file.read_text(encoding="utf-8"))
            record = make(body)
        except (OSError, ValueError, TypeError):
            continue
        if not launch or body["launch"] == launch:
            found[int(body["rank"])] = record
    return found
