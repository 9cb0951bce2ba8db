"""Around one phase on one rank: heartbeats and watchdog while it runs, and a record of how it ended.

    with guarded(config, world, "m2mkd", folder, stop): ...      every rank; the records: outcome.py and distributed/watch/records.py
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.config import ConfigError, WatchConfig
from m2mkd_ds.data.atomic import only_writer
from m2mkd_ds.distributed.watch.activity import CollectiveError, Snapshot, first_line, section, snapshot, where_raised
from m2mkd_ds.distributed.watch.records import Failure, failure_file, heartbeat_file, remove_records, write_record
from m2mkd_ds.distributed.watch.suspects import Observer
from m2mkd_ds.distributed.watch.watchdog import HANG_CODE, Watchdog, Watched
from m2mkd_ds.distributed.world import World, broadcast_object
from m2mkd_ds.logs import logger
from m2mkd_ds.train.ending.outcome import Outcome, read_outcome, write_outcome
from m2mkd_ds.train.ending.stopping import STOP_CODE, StopFlag, StopRequested

_LOST_PEER = re.compile(
    r"connection (closed|reset|refused)|closed by (remote )?peer|broken pipe|timed? ?out waiting|socket (timeout|closed)|nccl|gloo|"
    r"no route to host|network is unreachable|remote process exited",
    re.IGNORECASE,
)
"""What backends say inside DeepSpeed's own collectives, which raise a plain RuntimeError, when another rank has gone."""


LOCK_WAIT_S = 30.0
"""How long a launch waits for the one before it in the same folder, whose ranks may be leaving still."""


class PeerLostError(RuntimeError):
    """This rank cannot go on because another one has gone or failed; the message names it, as far as it is known."""

    exit_code = 1


@dataclass(frozen=True)
class _Guard:
    phase: str
    folder: Path
    launch: str
    world: World
    heartbeat_s: float

    def failure(self, kind: str, cause: str, where: Snapshot, code: int) -> Failure:
        facts = where.facts
        return Failure(
            launch=self.launch, rank=self.world.rank, host=socket.gethostname(), pid=os.getpid(), time=time.time(), kind=kind, cause=cause,
            where=where.describe(), step=where.step, slots=str(facts.get("slots", "")), exit_code=code,
        )  # fmt: skip

    def record(self, failure: Failure) -> None:
        """failed-<r>.json, and on rank 0 outcome.json. A disk that takes no record must not hide the failure itself."""
        try:
            write_record(failure_file(self.folder, self.world.rank), failure)
            self.outcome(Outcome(
                state="failed", phase=self.phase, launch=self.launch, step=failure.step, cause=failure.cause, exit_code=failure.exit_code
            ))  # fmt: skip
        except (OSError, StoreError) as err:
            logger.warning("the failure of rank %d could not be recorded in %s: %s", self.world.rank, self.folder, err)

    def outcome(self, outcome: Outcome) -> None:
        """outcome.json, which rank 0 writes; not over that of a launch which has begun since, in the same folder."""
        if not self.world.is_main:
            return
        there = read_outcome(self.folder)
        if there is None or there.launch == self.launch:
            write_outcome(self.folder, outcome)

    def ended_by_watchdog(self, text: str, where: Snapshot, code: int) -> None:
        """What the watchdog leaves before it ends the process."""
        self.record(self.failure("hang" if code == HANG_CODE else "peer", text, where, code))

    def lost_peer(self, error: BaseException, where: Snapshot) -> str:
        """Who is missing: looked for until it is certain, or until everybody who lives must have been heard of."""
        observer = Observer(self.folder, self.launch, self.world.rank, self.world.size, self.heartbeat_s)
        while not (observer.is_certain or observer.has_looked_long_enough):
            time.sleep(0.1)
        observer.close()
        return f"{observer.suspect(where)}; this rank ({self.world.rank}) lost it in {where.describe()}: {first_line(error)}"


@contextmanager
def guarded(watch: WatchConfig, world: World, phase: str, folder: Path, stop: StopFlag) -> Iterator[None]:
    """Watch and record what happens in the block. Collective at its start. Rank 0 holds the folder's lock until the end of the block.

    Raises ConfigError on every rank while another launch holds it. Errors pass through, after the record of this rank is written; one
    that means the loss of another rank becomes a PeerLostError that names it.
    """
    with ExitStack() as held:
        guard = _open(watch, world, phase, folder, held)
        with _watched(guard, watch, stop):
            yield


@contextmanager
def _watched(guard: _Guard, watch: WatchConfig, stop: StopFlag) -> Iterator[None]:
    world, phase, folder = guard.world, guard.phase, guard.folder
    limits_s = {
        "start": watch.start_s, "first": watch.first_step_s, "step": watch.step_s, "eval": watch.eval_s, "save": watch.save_s
    }  # fmt: skip
    watchdog = Watchdog(
        Watched(folder, guard.launch, world.rank, world.size, limits_s, watch.heartbeat_s, guard.ended_by_watchdog, stop)
    )  # fmt: skip
    watchdog.start()
    ended_well = False
    try:
        with section("start", limit="start", may_wait=True):
            yield
            last_step = snapshot().step
        guard.outcome(Outcome(state="done", phase=phase, launch=guard.launch, step=last_step))
        ended_well = True
    except StopRequested as stopped:
        guard.outcome(Outcome(
            state="stopped", phase=phase, launch=guard.launch, step=stopped.step, cause=stopped.why, exit_code=STOP_CODE
        ))  # fmt: skip
        ended_well = True
        raise
    except BaseException as error:
        where = where_raised(error)
        if _means_lost_peer(error) and world.size > 1:
            text = guard.lost_peer(error, where)
            guard.record(guard.failure("peer", text, where, PeerLostError.exit_code))
            raise PeerLostError(text) from error
        cause = f"{type(error).__name__}: {error}"
        guard.record(guard.failure("own", cause, where, exit_code(error)))
        raise
    finally:
        watchdog.stop()
        if ended_well:  # a heartbeat that stays is a sign that its rank did not end well
            heartbeat_file(folder, world.rank).unlink(missing_ok=True)


def _open(watch: WatchConfig, world: World, phase: str, folder: Path, held: ExitStack) -> _Guard:
    """Rank 0 takes the folder, and clears what earlier starts have left before any rank writes something new."""
    launch, problem = secrets.token_hex(8), ""
    if world.is_main:
        problem = _take(folder, held)
        if not problem:
            remove_records(folder)
            write_outcome(folder, Outcome(state="running", phase=phase, launch=launch))
    launch, problem = broadcast_object((launch, problem), what=f"start of {phase}")
    if problem:
        raise ConfigError(problem)
    return _Guard(phase, folder, launch, world, watch.heartbeat_s)


def _take(folder: Path, held: ExitStack) -> str:
    """Take the folder's lock until `held` is closed. Returns why not, when another launch keeps it: two of them would delete each other's
    unfinished checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    there = read_outcome(folder)
    who = f"process {there.pid} on {there.host}" if there else "another process"
    busy = ConfigError(f"{folder}: another launch is at work here ({who}); wait for its end, stop it, or give this run another --run-dir")
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            held.enter_context(only_writer(folder, busy))
        except ConfigError:
            if time.monotonic() > deadline:
                return str(busy)
            time.sleep(0.5)
        else:
            return ""


def _means_lost_peer(error: BaseException) -> bool:
    if isinstance(error, (CollectiveError, torch.distributed.DistError)):
        return True
    return type(error) is RuntimeError and _LOST_PEER.search(str(error)) is not None


def exit_code(error: BaseException) -> int:
    """Of a rank that ends by this error; the command line (cli/) maps them in the same way."""
    named = getattr(error, "exit_code", None)
    if isinstance(named, int):
        return named
    return 2 if isinstance(error, (ValueError, FileNotFoundError)) else 1

