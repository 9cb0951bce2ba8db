"""One socket and segment to the server of this host (frames.py), as the trainer sees it: one request at a time."""

from __future__ import annotations

import math
import os
import socket
import time

from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import BufferPool
from m2mkd_ds.teacher.protocol.wire import Answer, LinkError
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm import socket as shm_socket
from m2mkd_ds.teacher.shm.segment import SegmentView, largest_segment

_PAUSE_S = 0.005


class HungUpError(Exception):
    """The server closed the lane before it had answered."""


class ClientLane:
    """Used by one thread at a time. After any error but FeedError it is good for closing only."""

    def __init__(self, path: str, deadline: float) -> None:
        """Connect. Raises OSError (TimeoutError among them), LinkError when the server is another user's."""
        self.used_before = False
        self._view: SegmentView | None = None
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _connect(self._sock, path, deadline)
            uid = shm_socket.peer_uid(self._sock)
            if uid != os.geteuid():
                raise LinkError("unreachable", f"the server belongs to user {uid}, you are {os.geteuid()}; start one of your own")
        except BaseException:
            self._sock.close()
            raise

    def ask(self, kind: bytes, body: bytes, expected: bytes, deadline: float) -> bytes:
        """The body of the reply of kind `expected`. Raises FeedError, HungUpError, TimeoutError, FrameError."""
        told, fds = self._exchange(kind, body, expected, deadline)
        _close_all(fds)
        return told

    def ask_answer(
        self, kind: bytes, body: bytes, deadline: float, pool: BufferPool, max_bytes: int, accept: codec.Accept | None = None
    ) -> Answer:
        """A copy of the answer, its head accepted, its sums compared. Raises as `ask` does, and LinkError(corrupt)."""
        told, fds = self._exchange(kind, body, frames.READY, deadline)
        try:
            ready = frames.Ready.unpack(told)
            if ready.segment_bytes > largest_segment(max_bytes):
                raise LinkError("corrupt", f"a segment of {ready.segment_bytes} bytes, for answers of at most {max_bytes}")
            if fds:
                self._let_go()  # gives the memory of the old one back before there is a new one
                self._view = SegmentView(fds[0], ready.segment_bytes)
        finally:
            _close_all(fds)
        if self._view is None or self._view.num_bytes != ready.segment_bytes:
            raise LinkError("corrupt", "an answer in a segment that was never sent")
        answer = self._view.read(ready, pool, max_bytes, accept, wait_s=max(0.0, deadline - time.monotonic()))
        try:
            frames.send(self._sock, frames.ACK, frames.pack_ack(ready.generation), deadline)
        except OSError:
            pass  # the answer is whole; that the server is gone is the next call's matter
        return answer

    def alive(self) -> bool:
        """Whether an idle lane can be used: the server has neither closed it nor said anything unasked."""
        self._sock.setblocking(False)
        try:
            self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def shut(self) -> None:
        """Make the thread that uses it stop waiting."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the server was faster

    def close(self) -> None:
        """Let go of the socket and the segment."""
        self._let_go()
        self._sock.close()

    def _let_go(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def _exchange(self, kind: bytes, body: bytes, expected: bytes, deadline: float) -> tuple[bytes, list[int]]:
        try:
            frames.send(self._sock, kind, body, deadline)
        except ConnectionError:
            pass  # what the server said before it closed can still be read
        try:
            told = frames.receive(self._sock, deadline, most=frames.MAX_READY_BYTES, rest_s=math.inf, max_fds=1)
        except ConnectionError as err:
            raise HungUpError(err.strerror) from None
        if told is None:
            raise HungUpError("it closed the connection")
        got, reply, fds = told
        if got == expected:
            return reply, fds
        _close_all(fds)
        if got == frames.REFUSED:
            raise frames.unpack_error(reply)
        raise frames.FrameError(f"a message of kind {got!r} where {expected!r} belongs")


def _connect(sock: socket.socket, path: str, deadline: float) -> None:
    """Raises OSError, TimeoutError among them."""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline has passed")
        sock.settimeout(left)
        try:
            sock.connect(path)
        except BlockingIOError:  # a full backlog is told at once, not waited for
            time.sleep(min(_PAUSE_S, left))
        else:
            return


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
