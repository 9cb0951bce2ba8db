"""A trainer's link to the teacher server of its own host: the other end of server.py.

Every call under way has a lane of its own (client_lane.py): one that is idle, or a new one. A call that fails closes its lane, so
whatever the server still says to it reaches nobody. Answers are copied out of the segment, into memory that is used again once the last
tensor over it is gone: what a caller holds never changes, and the server gets its segment back at once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import MAX_BUFFERS, MAX_POOL_BYTES, BufferPool
from m2mkd_ds.teacher.protocol.packing import pack, unpack
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Golden, Hello, LinkError, Status, Welcome
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm import socket as shm_socket
from m2mkd_ds.teacher.shm.client_lane import ClientLane, HungUpError
from m2mkd_ds.teacher.shm.frames import FrameError

_KEPT_LANES = 16

_Told = TypeVar("_Told", Welcome, Status)
_Result = TypeVar("_Result")


class ShmConnection:
    """A `Connection` to `unix:PATH`. Nothing is opened before the first call; a server that was started again is found by the next one."""

    def __init__(self, endpoint: str) -> None:
        """Raises ValueError for a path that cannot be a socket's."""
        self._path = endpoint.removeprefix("unix:")
        shm_socket.check_path(self._path)
        self.endpoint, self.carrier = f"unix:{self._path}", "shared memory"
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._idle: list[ClientLane] = []
        self._busy: set[ClientLane] = set()
        self._closed = False
        self._max_answer_bytes = 0
        """What the server's welcome grants."""
        self._name = ""
        """Of the client that said hello."""
        self._pool = BufferPool(MAX_BUFFERS, MAX_POOL_BYTES)

    def hello(self, hello: Hello, deadline_s: float) -> Welcome:
        welcome = self._ask(frames.HELLO, pack(hello), frames.WELCOME, Welcome, deadline_s)
        self._max_answer_bytes, self._name = welcome.limits.max_answer_bytes, hello.client
        return welcome

    def golden(self, request: Golden, deadline_s: float) -> Answer:
        return self._answer(frames.GOLDEN, pack(request), deadline_s)

    def get(self, request: GetBatch, deadline_s: float, accept: codec.Accept | None = None) -> Answer:
        return self._answer(frames.GET, pack(request), deadline_s, accept)

    def status(self, deadline_s: float) -> Status:
        return self._ask(frames.STATUS, self._name.encode(), frames.STATE, Status, deadline_s)

    def close(self) -> None:
        """Calls under way end with LinkError(closed). In a forked child: let go of the parent's sockets, without a word to the server."""
        if os.getpid() != self._pid:
            for lane in (*self._idle, *self._busy):  # no lock: a thread that is not here may have held it
                lane.close()
            return
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for lane in self._busy:
                lane.shut()  # their own threads close them: a number of theirs might be another file's by then
        for lane in idle:
            lane.close()

    def _ask(self, kind: bytes, body: bytes, expected: bytes, told: type[_Told], deadline_s: float) -> _Told:
        def work(lane: ClientLane, deadline: float) -> _Told:
            packed = lane.ask(kind, body, expected, deadline)
            try:
                return unpack(told, packed)
            except FeedError as err:
                raise FrameError(str(err)) from None

        return self._on_a_lane(work, deadline_s)

    def _answer(self, kind: bytes, body: bytes, deadline_s: float, accept: codec.Accept | None = None) -> Answer:
        most = self._max_answer_bytes
        if not most:
            raise FeedError("bad_request", f"{self.endpoint}: say Hello first; it tells how large an answer may be")
        return self._on_a_lane(lambda lane, deadline: lane.ask_answer(kind, body, deadline, self._pool, most, accept), deadline_s)

    def _on_a_lane(self, work: Callable[[ClientLane, float], _Result], deadline_s: float) -> _Result:
        deadline = time.monotonic() + deadline_s
        while True:
            lane = self._take(deadline, deadline_s)
            try:
                result = work(lane, deadline)
            except FeedError:
                self._give(lane)  # refused in good order
                raise
            except HungUpError as err:
                self._drop(lane)
                self._check_open()
                # The server may end a lane that is idle just when we use it. On a new one it means what it says.
                if not lane.used_before:
                    raise LinkError("unreachable", f"{self.endpoint}: the server went away before it had answered ({err})") from None
            except TimeoutError:
                self._drop(lane)
                self._check_open()
                raise LinkError("deadline", f"{self.endpoint}: no answer within {deadline_s:g} s") from None
            except LinkError as err:
                self._drop(lane)
                raise LinkError(err.fault, f"{self.endpoint}: {err}") from None
            except FrameError as err:
                self._drop(lane)
                raise LinkError("corrupt", f"{self.endpoint}: {err}") from None
            except OSError as err:
                self._drop(lane)
                raise LinkError("unreachable", f"{self.endpoint}: the answer could not be taken ({err})") from None
            except BaseException:
                self._drop(lane)
                raise
            else:
                self._give(lane)
                return result

    def _take(self, deadline: float, deadline_s: float) -> ClientLane:
        """An idle lane, or a new one; idle ones that the server has ended are let go, with their segments."""
        self._check_open()
        with self._lock:
            ended = [lane for lane in self._idle if not lane.alive()]
            for old in ended:
                self._idle.remove(old)
                old.close()
            lane = self._idle.pop() if self._idle else None
            if lane is not None:
                self._busy.add(lane)
        return lane or self._open(deadline, deadline_s)

    def _open(self, deadline: float, deadline_s: float) -> ClientLane:
        try:
            lane = ClientLane(self._path, deadline)
        except TimeoutError:
            raise LinkError("deadline", f"{self.endpoint}: the server took no connection within {deadline_s:g} s") from None
        except (FileNotFoundError, ConnectionRefusedError):
            raise LinkError("unreachable", f"{self.endpoint}: nobody listens there; start `m2mkd teacher-server` on this host") from None
        except OSError as err:
            raise LinkError("unreachable", f"{self.endpoint}: no connection can be made ({err.strerror})") from None
        except LinkError as err:
            raise LinkError(err.fault, f"{self.endpoint}: {err}") from None
        with self._lock:
            self._busy.add(lane)
            closed = self._closed
        if closed:
            self._drop(lane)
            self._check_open()
        return lane

    def _give(self, lane: ClientLane) -> None:
        lane.used_before = True
        with self._lock:
            self._busy.discard(lane)
            if not self._closed and len(self._idle) < _KEPT_LANES:
                self._idle.append(lane)
                return
        lane.close()

    def _drop(self, lane: ClientLane) -> None:
        with self._lock:
            self._busy.discard(lane)
        lane.close()

    def _check_open(self) -> None:
        if os.getpid() != self._pid:
            raise LinkError(
                "closed", f"{self.endpoint}: this link is process {self._pid}'s, and {os.getpid()} was forked from it; open a new one there"
            )
        if self._closed:
            raise LinkError("closed", f"{self.endpoint}: this link was closed")
