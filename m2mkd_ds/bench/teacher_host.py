"""The other process of `m2mkd bench teacher`: it holds every row's server, so that client and server share no interpreter and no CPU clock.

One process for all servers: those that are not asked cost nothing, and what a row costs is the growth of the process's CPU time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from m2mkd_ds.bench.teacher_batches import Batches, Shape, StandIn
from m2mkd_ds.bench.teacher_certificates import Certificates
from m2mkd_ds.bench.teacher_flight import FlightClient, FlightServer, JoinedFlightClient
from m2mkd_ds.bench.teacher_floors import Client, GlooClient, GlooServer, RingClient, RingServer, Server, TcpClient, TcpServer
from m2mkd_ds.bench.teacher_options import FEEDS, OURS, Feed, Peer, TeacherBench
from m2mkd_ds.bench.teacher_ours import OurClient, RemoteServer, ShmServer

START_S, STOP_S = 180.0, 10.0
ENCRYPTED: tuple[Peer, ...] = ("flight_mtls", "remote_mtls")


@dataclass(frozen=True)
class Task:
    """What the other process has to serve."""

    options: TeacherBench
    folder: Path
    """Sockets and certificates."""
    step_shape: Shape | None
    """Of the training step's batches; None: there is none."""
    no_certificates: str
    """Why there are none; empty: they lie in the folder."""


@dataclass(frozen=True)
class Started:
    """What the other process says once it serves."""

    addresses: dict[Peer, str]
    absent: dict[Peer, str]
    """Why a row cannot be measured here."""
    feeds: dict[Feed, str]
    """Addresses for the training step."""
    absent_feeds: dict[Feed, str]


class Host:
    """The process, as the client sees it. Ends with the block."""

    def __init__(self, task: Task) -> None:
        """Raises RuntimeError when it cannot be started."""
        context = multiprocessing.get_context("spawn")  # pyarrow's and gloo's threads survive no fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(task, theirs), name="bench-teacher-server", daemon=True)
        self._process.start()
        theirs.close()
        self.started: Started = self._told("start its servers", START_S)
        assert self._process.pid is not None
        self._clock = (~self._process.pid << 3) | 2

    def cpu_s(self) -> float:
        """CPU seconds of the process so far, all its threads."""
        # Linux: another process's CPU clock; good to a nanosecond where /proc counts in 10 ms.
        return time.clock_gettime(self._clock)

    def set_pace(self, pace_s: float) -> None:
        """Seconds a batch of the training step's producer."""
        self._pipe.send(pace_s)
        self._told("change its pace", STOP_S)

    def close(self) -> None:
        """End the process, by force if it does not."""
        try:
            self._pipe.send(None)
        except OSError:
            pass  # it has ended
        self._process.join(STOP_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(STOP_S)

    def _told(self, what: str, timeout_s: float) -> Started:
        try:
            if self._pipe.poll(timeout_s):
                told: Started = self._pipe.recv()
                return told
        except EOFError:
            pass
        self.close()
        raise RuntimeError(f"bench teacher: the server process did not {what} (exit code {self._process.exitcode}); its output says why")


def open_client(peer: Peer, address: str, shape: Shape, sizes: list[int], folder: Path) -> Client:
    """The receiving end of a row."""
    in_flight = shape.num_contents - 1
    certificates = Certificates.in_folder(folder) if peer in ENCRYPTED else None
    floors: dict[str, Callable[[str, list[int], int], Client]] = {
        "tcp": TcpClient, "ring": RingClient, "gloo": GlooClient, "flight_joined": JoinedFlightClient,
    }  # fmt: skip
    if peer in floors:
        return floors[peer](address, sizes, in_flight)
    if peer in ("flight", "flight_mtls"):
        return FlightClient(address, sizes, in_flight, certificates)
    return OurClient(address, shape, in_flight, certificates)


def _serve(task: Task, pipe: Connection) -> None:
    """The other process: start everything, say where, change the pace when told, end when told or when nobody is there any more."""
    torch.set_num_threads(1)
    servers = _Servers(task)
    pipe.send(servers.started)
    try:
        while (pace_s := pipe.recv()) is not None:
            servers.set_pace(pace_s)
            pipe.send(None)
    except EOFError:
        pass
    servers.close()


class _Servers:
    """All that was asked for and can be had."""

    def __init__(self, task: Task) -> None:
        self.started = Started({}, {}, {}, {})
        self._task, self._servers = task, list[Server]()
        self._paced = StandIn(Batches(task.step_shape)) if task.step_shape is not None else None
        batches = Batches(Shape.of_transfer(task.options))
        for peer in task.options.peers:
            self._start(peer, partial(_server, peer, batches, task.folder, task.options.in_flight))
        if self._paced is not None:
            for feed in (feed for feed in FEEDS if feed in task.options.feeds and feed != "colocated"):
                self._start_feed(feed, self._paced)

    def set_pace(self, pace_s: float) -> None:
        """Of the training step's producer."""
        assert self._paced is not None, "only the training step has a pace"
        self._paced.pace_s = pace_s

    def close(self) -> None:
        """Stop all."""
        for server in self._servers:
            server.close()

    def _start(self, peer: Peer, make: Callable[[], Server]) -> None:
        reason = (self._task.no_certificates if peer in ENCRYPTED else "") or why_not(peer)
        if reason:
            self.started.absent[peer] = reason
            return
        self._servers.append(server := make())
        self.started.addresses[peer] = server.address

    def _start_feed(self, feed: Feed, paced: StandIn) -> None:
        reason = why_not("shm" if feed == "shm" else "remote")
        if reason:
            self.started.absent_feeds[feed] = reason
            return
        in_flight = self._task.options.in_flight
        server = ShmServer(paced, self._task.folder / "step.sock", in_flight) if feed == "shm" else RemoteServer(paced, in_flight)
        self._servers.append(server)
        self.started.feeds[feed] = server.address


def _server(peer: Peer, batches: Batches, folder: Path, in_flight: int) -> Server:
    certificates = Certificates.in_folder(folder) if peer in ENCRYPTED else None
    if peer == "tcp":
        return TcpServer(batches)
    if peer == "ring":
        return RingServer(batches, folder / "ring.sock", in_flight)
    if peer == "gloo":
        return GlooServer(batches, folder / "gloo")
    if peer in ("flight", "flight_joined", "flight_mtls"):
        return FlightServer(batches, certificates)
    if peer == "shm":
        return ShmServer(StandIn(batches), folder / "shm.sock", in_flight)
    return RemoteServer(StandIn(batches), in_flight, certificates)


def why_not(peer: Peer) -> str:
    """Why a way cannot be gone here, as far as that can be told without trying; or an empty string."""
    if peer == "gloo":
        from torch import distributed

        return "" if distributed.is_available() and distributed.is_gloo_available() else "this torch is built without gloo"
    if peer in ("tcp", "ring"):
        return ""
    wanted = (["pyarrow.flight"] if peer != "shm" else []) + (["xxhash"] if peer in OURS else [])
    missing = [name for name in wanted if not _can_import(name)]
    return f"{' and '.join(missing)} cannot be imported: pip install m2mkd_ds[teacher]" if missing else ""


def _can_import(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError:
        return False
    return True
