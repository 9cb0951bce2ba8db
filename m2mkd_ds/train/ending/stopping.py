"""Being asked to stop: by SIGTERM, SIGUSR1, SIGINT, or because a launcher's process has died.

    signal, or a launcher gone -> StopFlag of this rank -> (any rank's flag: the step's one sum, loop._agree) -> all ranks save and leave

The first signal asks for a save at the next step boundary and exit code STOP_CODE. The same signal again, later, ends the process at once.
Signals reach a thread through a pipe that C code writes to: the main thread may stand in a collective for minutes, where Python's own
handlers do not run.

It is told to the user once, with the reason that any process knew first hand: by the pipeline, else by rank 0 (`tells_of_stop`).
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from m2mkd_ds.distributed.watch.processes import Process, parent_of, seen
from m2mkd_ds.distributed.watch.watchdog import say
from m2mkd_ds.distributed.world import gather_object

STOP_CODE = 75
"""Exit code of a run that was stopped on request: EX_TEMPFAIL of sysexits.h, the same command goes on."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

UNDER_PIPELINE = "M2MKD_UNDER_PIPELINE"
"""Variable that the pipeline sets for all ranks that it starts, on every host."""

SAME_REQUEST_S = 2.0
"""A signal that comes again so soon is the same request by another way: to the process group, and from the launcher."""

_POLL_S = 1.0
_LAUNCHER = "deepspeed.launcher.launch"


class StopRequested(Exception):  # noqa: N818  # no error: what was asked for
    """The run was stopped on request, with everything saved; the same command goes on."""

    is_told = False
    """Whether another process tells it to the user."""
    exit_code = STOP_CODE

    def __init__(self, phase: str, step: int, why: str) -> None:
        where = f"at step {step}" if step else "before a step of this launch"
        super().__init__(f"stopped on request in {phase} {where} ({why}); the same command goes on")
        self.phase, self.step, self.why = phase, step, why


@dataclass
class StopFlag:
    """Whether this process was asked to stop. Set from any thread."""

    why: str = ""
    """`SIGTERM`, or which launcher process has gone; empty: nobody has asked."""
    leaving: bool = field(default=False)
    """Everything is saved and the process is on its way out: further signals change nothing."""

    def __call__(self) -> bool:
        return bool(self.why)

    def ask(self, why: str) -> None:
        """The first reason stays."""
        self.why = self.why or why


def stop_requested(phase: str, step: int, flag: StopFlag) -> StopRequested:
    """What all ranks raise together, with one reason, when any was asked to stop. Collective."""
    return StopRequested(phase, step, reason_of(gather_object(flag.why, "why to stop")))


def reason_of(reasons: Sequence[str]) -> str:
    """The reason of all ranks, from what each of them knows, in rank order and mostly the same: that of the first one that knows any."""
    rank, why = next(((rank, why) for rank, why in enumerate(reasons) if why), (0, "asked of another rank"))
    return f"rank {rank}: {why}" if rank else why


def tells_of_stop(rank: int, chain: Sequence[Process], environ: Mapping[str, str]) -> bool:
    """Whether this rank tells the user that the job was stopped: rank 0, unless a pipeline does, which alone knows what signal it got.

    `chain`: the launcher's processes; where a pipeline among them has gone, rank 0 speaks for it.
    """
    is_orphan = any(_is_pipeline(process) and not process.is_alive for process in chain)
    return rank == 0 and (UNDER_PIPELINE not in environ or is_orphan)


def end_at_once(number: int) -> None:
    """What a rank does when it is told the same again."""
    say(f"m2mkd_ds: {signal.Signals(number).name} again: ending at once; what was not saved is lost")
    os._exit(128 + number)


@contextmanager
def listening(flag: StopFlag, chain: Sequence[Process], at_once: Callable[[int], None] = end_at_once) -> Iterator[None]:
    """Until the end of the block, signals and the death of a process of `chain` set `flag`; `at_once` gets a signal that comes again.

    In the main thread, where alone signals can be taken over; in another one, the block runs without.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _noted) for number in SIGNALS}
    listener = _Listener(flag, reader, chain, at_once)
    thread = threading.Thread(target=listener.run, name="m2mkd-stop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(writer)  # the thread sees the end of the pipe
        thread.join(5)
        os.close(reader)


def _noted(number: int, frame: FrameType | None) -> None:
    """Python calls it late or never while a collective waits; the wake-up pipe has told the thread already."""


class _Listener:
    """Reads signal numbers from the pipe, and looks at the launcher's processes in between."""

    def __init__(
        self, flag: StopFlag, reader: int, chain: Sequence[Process], at_once: Callable[[int], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._flag, self._reader, self._chain, self._at_once, self._clock = flag, reader, chain, at_once, clock
        self._first: dict[int, float] = {}

    def run(self) -> None:
        while True:
            ready, _, _ = select.select([self._reader], [], [], _POLL_S)
            if ready:
                numbers = os.read(self._reader, 64)
                if not numbers:
                    return
                for number in numbers:
                    self.hear(number)
            self.look()

    def hear(self, number: int) -> None:
        """One signal."""
        if number not in SIGNALS:
            return  # the pipe tells of every signal that has a Python handler
        name, now = signal.Signals(number).name, self._clock()
        first = self._first.setdefault(number, now)
        if now - first > SAME_REQUEST_S and not self._flag.leaving:
            self._at_once(number)
        self._flag.ask(name)

    def look(self) -> None:
        """Whether everybody who started this process is still there."""
        for process in self._chain:
            if not process.is_alive:
                program, _, words = process.command.partition(" ")
                self._flag.ask(f"the launcher's process {process.pid} ({Path(program).name} {words[:60]}) has gone")


def launcher_chain() -> list[Process]:
    """The processes whose death ends the job: the parent, and the parent's parent where the parent is DeepSpeed's launcher.

    On one host that is the `deepspeed` command itself, over ssh the shell that ssh started; above the command, our own pipeline if there
    is one. Whoever has no launcher and was started by nohup, or as a daemon, means to outlive his parent.
    """
    parent = seen(os.getppid())
    if parent is None or parent.pid == 1:
        return []
    if _LAUNCHER not in parent.command:
        is_detached = "RANK" not in os.environ and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        return [] if is_detached else [parent]
    chain = [parent]
    above = seen(parent_of(parent.pid))
    if above is not None and above.pid != 1:
        chain.append(above)
        top = seen(parent_of(above.pid))
        if top is not None and _is_pipeline(top):
            chain.append(top)
    return chain


def _is_pipeline(process: Process) -> bool:
    return "m2mkd" in process.command and " pipeline " in f"{process.command} "
