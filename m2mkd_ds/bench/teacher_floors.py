"""The floors of `m2mkd bench teacher` that need nothing but the standard library and torch: what moving the same bytes costs at least.

    tcp    one loopback connection; requests are sent ahead, answers come back in order into reused buffers
    ring   slots of memory without a name (memfd); the server copies a batch in, the client copies it out; a Unix socket carries the turns
    gloo   torch.distributed's send and recv between two ranks, requests ahead, answers into reused buffers

None has a codec, a checksum, limits, or a way to go on when something breaks. All know the sizes beforehand.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from m2mkd_ds.bench.teacher_batches import Batches

TIMEOUT_S = 60.0
_NUMBER = struct.Struct("<q")
_TURN = struct.Struct("<qq")
Take = Callable[[int, Sequence[memoryview]], None]
"""Called with every batch's number and bytes, in order; the bytes are good until it returns."""


class Server(Protocol):
    """One way's sending end."""

    address: str
    """What the other process needs to reach it."""

    def close(self) -> None:
        """Stop within a few seconds."""
        ...


class Client(Protocol):
    """One way's receiving end, in the other process."""

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        """Get these batches with up to `in_flight` requests under way. Raises OSError, RuntimeError or a transport's own error."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...


class TcpServer:
    """Sends what is asked for on its first connection."""

    def __init__(self, batches: Batches) -> None:
        self._batches = batches
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(TIMEOUT_S)
        self.address = str(self._listener.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # closed before anybody came
        with sock:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while asked := sock.recv(_NUMBER.size, socket.MSG_WAITALL):
                for part in self._batches.parts(_NUMBER.unpack(asked)[0]):
                    sock.sendall(part)

    def close(self) -> None:
        self._listener.close()


class TcpClient:
    """Receives into buffers that are used again and again."""

    def __init__(self, address: str, sizes: Sequence[int], in_flight: int) -> None:
        self._buffers = _buffers(sizes, in_flight)
        self._sock = socket.create_connection(("127.0.0.1", int(address)), TIMEOUT_S)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        def ask(number: int) -> None:
            self._sock.sendall(_NUMBER.pack(number))

        def receive(number: int) -> None:
            parts = self._buffers[number % len(self._buffers)]
            for part in parts:
                self._fill(part)
            take(number, parts)

        _ask_ahead(numbers, in_flight, ask, receive)

    def close(self) -> None:
        self._sock.close()

    def _fill(self, room: memoryview) -> None:
        while len(room):
            got = self._sock.recv_into(room)
            if not got:
                raise ConnectionError("the server closed the connection within a batch")
            room = room[got:]


class RingServer:
    """Copies what is asked for into the slot that it is asked into."""

    def __init__(self, batches: Batches, path: Path, slots: int) -> None:
        self._batches, self._slots = batches, slots
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.settimeout(TIMEOUT_S)
        self.address = str(path)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # closed before anybody came
        slot_bytes = _slot_bytes(self._batches.sizes)
        fd = os.memfd_create("bench")
        try:
            os.ftruncate(fd, slot_bytes * self._slots)
            memory = np.frombuffer(_mapped(fd, slot_bytes * self._slots), dtype=np.uint8)
            socket.send_fds(sock, [b"m"], [fd])
        finally:
            os.close(fd)
        with sock:
            while asked := sock.recv(_TURN.size, socket.MSG_WAITALL):
                number, slot = _TURN.unpack(asked)
                at = slot * slot_bytes
                for part in self._batches.parts(number):
                    np.copyto(memory[at : at + len(part)], np.frombuffer(part, dtype=np.uint8))
                    at += len(part)
                sock.sendall(asked)

    def close(self) -> None:
        self._listener.close()


class RingClient:
    """Copies slots into reused buffers."""

    def __init__(self, address: str, sizes: Sequence[int], in_flight: int) -> None:
        self._sizes, self._buffers = sizes, _buffers(sizes, in_flight)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(TIMEOUT_S)
        self._sock.connect(address)
        _, (fd,), _, _ = socket.recv_fds(self._sock, 1, 1)
        try:
            self._memory = np.frombuffer(_mapped(fd, _slot_bytes(sizes) * in_flight), dtype=np.uint8)
        finally:
            os.close(fd)

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        slots = len(self._buffers)

        def ask(number: int) -> None:
            self._sock.sendall(_TURN.pack(number, number % slots))

        def receive(number: int) -> None:
            if self._sock.recv(_TURN.size, socket.MSG_WAITALL) != _TURN.pack(number, number % slots):
                raise ConnectionError("the server closed the connection, or answered out of turn")
            at, parts = number % slots * _slot_bytes(self._sizes), self._buffers[number % slots]
            for part in parts:
                np.copyto(np.frombuffer(part, dtype=np.uint8), self._memory[at : at + len(part)])
                at += len(part)
            take(number, parts)

        _ask_ahead(numbers, in_flight, ask, receive)

    def close(self) -> None:
        self._sock.close()


class GlooServer:
    """Rank 0 of two; joins when rank 1 does."""

    def __init__(self, batches: Batches, path: Path) -> None:
        self._batches = batches
        self.address = str(path)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        group = _gloo_group(self.address, 0)
        asked = torch.empty(1, dtype=torch.int64)
        while True:
            try:
                group.recv([asked], 1, 0).wait()
            except RuntimeError:
                return  # nobody asked for long, or the other rank has gone
            number = int(asked)
            if number < 0:
                return
            for part in self._batches.parts(number):
                group.send([torch.frombuffer(part, dtype=torch.uint8)], 1, 1).wait()

    def close(self) -> None:
        """Ends with the client's goodbye."""


class GlooClient:
    """Rank 1; receives into reused buffers."""

    def __init__(self, address: str, sizes: Sequence[int], in_flight: int) -> None:
        self._buffers = _buffers(sizes, in_flight)
        self._group = _gloo_group(address, 1)

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        # gloo moves nothing before both sides have said so: the room for an answer is offered together with the question.
        under_way: dict[int, tuple[torch.Tensor, list[Any]]] = {}

        def ask(number: int) -> None:
            asked = torch.tensor([number])
            works = [self._group.send([asked], 0, 0)]
            rooms = self._buffers[number % len(self._buffers)]
            works += [self._group.recv([torch.frombuffer(room, dtype=torch.uint8)], 0, 1) for room in rooms]
            under_way[number] = (asked, works)

        def receive(number: int) -> None:
            for work in under_way.pop(number)[1]:
                work.wait()
            take(number, self._buffers[number % len(self._buffers)])

        _ask_ahead(numbers, in_flight, ask, receive)

    def close(self) -> None:
        """Say goodbye, unless the other rank has gone."""
        try:
            self._group.send([torch.tensor([-1])], 0, 0).wait()
        except RuntimeError:
            pass


def _ask_ahead(numbers: range, in_flight: int, ask: Callable[[int], None], receive: Callable[[int], None]) -> None:
    """Keep up to `in_flight` requests sent and not yet received; receive in order."""
    waiting: deque[int] = deque()
    for number in numbers:
        ask(number)
        waiting.append(number)
        if len(waiting) == in_flight:
            receive(waiting.popleft())
    while waiting:
        receive(waiting.popleft())


def _buffers(sizes: Sequence[int], count: int) -> list[list[memoryview]]:
    """Memory for `count` batches, touched once: nobody's first batch pays for its pages."""
    return [[memoryview(np.ones(size, dtype=np.uint8)) for size in sizes] for _ in range(count)]  # type: ignore[arg-type]


def _slot_bytes(sizes: Sequence[int]) -> int:
    return -(-sum(sizes) // mmap.PAGESIZE) * mmap.PAGESIZE


def _mapped(fd: int, num_bytes: int) -> mmap.mmap:
    return mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _gloo_group(path: str, rank: int) -> Any:
    """Two ranks over loopback, found by a file; no default group of the process is touched."""
    from torch import distributed

    gloo: Any = distributed.ProcessGroupGloo
    options = gloo._Options()  # what init_process_group makes; it has no public name
    options._devices = [gloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=TIMEOUT_S)
    return gloo(distributed.FileStore(path, 2), rank, 2, options)
