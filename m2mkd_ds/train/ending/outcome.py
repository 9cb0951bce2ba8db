"""How a launched job ended: RUN/<phase>/outcome.json, by rank 0, beside the failed-<r>.json and heartbeats of distributed/watch/records.py.

    state   running -> done | stopped (on request, saved) | failed

Exit codes do not prove an end: launchers turn them into others, and return 0 for jobs that were killed. These records say what the job
itself knew; only done.json (nodes.py) proves that a result is there.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from m2mkd_ds.checkpoint.atomic import StoreError, read_json, write_json_atomic
from m2mkd_ds.distributed.watch.processes import seen
from m2mkd_ds.distributed.watch.records import Failure, Heartbeat, read_failures, read_heartbeats, remove_records
from m2mkd_ds.distributed.watch.suspects import Observer
from m2mkd_ds.logs import logger

FILE_NAME = "outcome.json"

State = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What outcome.json holds; rank, host and pid are the writer's."""

    state: State
    phase: str
    launch: str
    """Name of this start of the job."""
    step: int = 0
    """Optimizer steps that are saved (stopped), or the last step that this start worked on (done, failed), from 1; 0: none."""
    cause: str = ""
    exit_code: int = 0
    rank: int = 0
    host: str = ""
    pid: int = 0
    time: float = 0.0
    """Wall clock, seconds since 1970."""
    launcher: str = ""


def write_outcome(folder: Path, outcome: Outcome) -> None:
    """Replace the record. Raises StoreError."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "launcher": launcher_name()}
    write_json_atomic(folder / FILE_NAME, asdict(outcome) | facts)


def read_outcome(folder: Path) -> Outcome | None:
    """The record of the newest start; None when there is none that this version can read."""
    try:
        return Outcome(**read_json(folder / FILE_NAME))
    except (StoreError, TypeError):
        return None


def launcher_name() -> str:
    """Who started this process, for the record."""
    parent = seen(os.getppid())
    if parent is not None and "deepspeed.launcher" in parent.command:
        return "deepspeed"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "RANK" in os.environ:
        return "srun" if "SLURM_PROCID" in os.environ else "environment"
    return "none"


@dataclass(frozen=True)
class Ending:
    """What the records of a job say about its end."""

    state: State
    phase: str
    step: int
    text: str
    """One sentence for people; `why` alone when it was stopped on request."""
    code: int


class JobRecords:
    """The records of the phases that one launch runs, for whoever launched it."""

    def __init__(self, root: Path, names: Sequence[str], heartbeat_s: float) -> None:
        self._root, self._names, self._heartbeat_s = root, tuple(names), heartbeat_s

    def clear(self) -> None:
        """Before the launch: what is found afterwards is its own."""
        for name in self._names:
            remove_records(self._root / name)
            (self._root / name / FILE_NAME).unlink(missing_ok=True)

    def await_end(self, patience_s: float) -> None:
        """After the launcher's end: wait for ranks that it has left behind, which save and leave, as long as they show signs of life."""
        name = self._unfinished()
        outcome = read_outcome(self._root / name)
        if outcome is None or outcome.state != "running":
            return
        observer = Observer(self._root / name, outcome.launch, -1, 0, self._heartbeat_s)
        deadline = time.monotonic() + patience_s
        time.sleep(1.0)  # the observer's first look
        while observer.living() and time.monotonic() < deadline:
            time.sleep(0.2)
        observer.close()

    def ending(self) -> Ending:
        """Of the first phase that is not done."""
        name = self._unfinished()
        folder = self._root / name
        outcome = read_outcome(folder)
        # A rank of an earlier launch may write its last word when that launch is long forgotten.
        launch = outcome.launch if outcome is not None else ""
        failures = read_failures(folder, launch)
        if failures:
            first = root_cause(list(failures.values()))
            return Ending("failed", name, first.step, f"{_failed(name, first)}", first.exit_code or 1)
        if outcome is None:
            return Ending("running", name, 0, f"{name} left no record: it ended before its first step; its log is above", 1)
        if outcome.state == "running":
            return Ending("running", name, outcome.step, _without_a_word(name, list(read_heartbeats(folder, launch).values())), 1)
        return Ending(outcome.state, name, outcome.step, outcome.cause, outcome.exit_code)

    def correct_cause(self, why: str) -> None:
        """Of a job that was stopped through its launcher: its ranks got SIGTERM or lost their connection, whatever was asked of it."""
        file = self._root / self._unfinished() / FILE_NAME
        outcome = read_outcome(file.parent)
        if outcome is None or outcome.state != "stopped":
            return
        try:
            write_json_atomic(file, asdict(replace(outcome, cause=why)))
        except StoreError as err:  # no reason to hide that everything is saved
            logger.warning("%s keeps another reason of the stop (%s)", file, err)

    def _unfinished(self) -> str:
        outcomes = {name: read_outcome(self._root / name) for name in self._names}
        return next((name for name, outcome in outcomes.items() if outcome is None or outcome.state != "done"), self._names[-1])


def root_cause(failures: list[Failure]) -> Failure:
    """The failure that explains the others: an own error before a hang, a hang before the loss of a peer; the earliest of its kind."""
    return min(failures, key=lambda failure: (("own", "hang", "peer").index(failure.kind), failure.time))


def _failed(phase: str, failure: Failure) -> str:
    at = f" at step {failure.step}" if failure.step else ""
    slots = f" (slots {failure.slots})" if failure.slots else ""
    return f"m2mkd_ds {phase} failed on rank {failure.rank} (host {failure.host}){at}, in {failure.where}{slots}: {failure.cause}"


def _without_a_word(phase: str, beats: list[Heartbeat]) -> str:
    if not beats:
        return f"{phase} ended without a record, and no rank has left a heartbeat: killed by a signal?"
    last = min(beats, key=lambda beat: beat.time)
    age_s = max(time.time() - last.time, 0.0)
    return (
        f"{phase} ended without a record: killed by a signal? last heartbeat of {last.who}, {age_s:.0f} s ago: at step {last.step}, in "
        f"{last.describes}"
    )
