"""The teacher server for trainers on its own host: a Unix socket for messages, memory without a name for tensors (docs/teacher_server.md).

One thread accepts, and one serves each lane (lanes.py): read a request, let the service answer, copy the answer into the lane's
segment, say Ready, wait for the Ack. A segment is written again after its Ack only, and freed when its lane ends: when the client closes it
or dies, says nothing for `silence_s`, or breaks the rules. So a slow client holds its own lanes and nothing else.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

from m2mkd_ds.teacher.protocol.wire import FeedError
from m2mkd_ds.teacher.server.admission import Caller
from m2mkd_ds.teacher.server.coming import Service
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm import socket as shm_socket
from m2mkd_ds.teacher.shm.lanes import Grants, Lane

log = logging.getLogger("m2mkd_ds")

_POLL_S = 0.02
_ROOM_S = 1.0
"""How long an idle lane may take to end for a new one; meanwhile nobody else is let in."""
_END_S = 2.0
"""How long threads may take to end once their sockets are shut."""


class ShmTransport:
    """Offers `service` at the Unix socket `path`."""

    def __init__(
        self,
        service: Service,
        path: str | Path,
        *,
        max_lanes: int = 64,
        max_bytes: int | None = None,
        silence_s: float = 60.0,
        peer_uid: Callable[[socket.socket], int] = shm_socket.peer_uid,
    ) -> None:
        """`max_lanes` bounds threads, `max_bytes` all segments together (None: as much as the service allows its answers).

        `silence_s` is how long a lane may be idle, or leave an answer untaken. Only processes of our own user are served; `peer_uid` asks
        the kernel whose a connection is. Raises ValueError for a path that cannot be a socket's.
        """
        self.path = os.fspath(path)
        shm_socket.check_path(self.path)
        self._service, self._max_lanes, self._silence_s, self._peer_uid = service, max_lanes, silence_s, peer_uid
        options = service.options
        self._grants = Grants(options.max_bytes if max_bytes is None else max_bytes, options.limits.max_in_flight)
        self._lanes: dict[Lane, threading.Thread] = {}
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._identity = (0, 0)
        self._stopping = False

    @property
    def endpoint(self) -> str:
        """What trainers are given."""
        return f"unix:{self.path}"

    @property
    def num_lanes(self) -> int:
        """Connections that are open, each with a thread."""
        return len(self._lanes)

    @property
    def num_bytes(self) -> int:
        """Of all segments."""
        return self._grants.num_bytes

    def start(self) -> None:
        """Listen; once only. Raises ValueError when the path is another live server's, no socket, or in no folder."""
        assert self._listener is None and not self._stopping, "a transport starts once"
        self._listener = shm_socket.listen(self.path)
        self._identity = shm_socket.identity_of(self.path)
        self._acceptor = threading.Thread(target=self._accept, args=(self._listener,), name="shm-accept", daemon=True)
        self._acceptor.start()

    def drain(self) -> None:
        """From now on requests are refused as draining; running ones end."""
        self._service.drain()

    def stop(self, grace_s: float = 10.0) -> bool:
        """Drain, wait up to `grace_s` for answers to be taken, close everything, remove the socket. False if answers were cut off."""
        self.drain()
        listener, self._listener = self._listener, None
        if listener is None:
            return True  # not started, or stopped already
        end = time.monotonic() + grace_s
        while any(lane.busy for lane in self._open()) and time.monotonic() < end:
            time.sleep(_POLL_S)
        self._stopping = True
        shm_socket.release(self.path, self._identity)
        listener.shutdown(socket.SHUT_RDWR)  # wakes accept; closing would not
        self._acceptor.join(_END_S)
        listener.close()
        whole = not any(lane.busy for lane in self._open())
        with self._lock:
            left = dict(self._lanes)
        for lane in left:
            lane.stop()
        end = time.monotonic() + _END_S
        for thread in left.values():
            thread.join(max(0.0, end - time.monotonic()))
        return whole and not any(thread.is_alive() for thread in left.values())

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _ = listener.accept()
            except OSError as err:
                if not self._stopping:
                    log.warning("teacher socket %s: cannot take a connection (%s)", self.path, err)
                    time.sleep(10 * _POLL_S)  # too many open files: they do not get fewer by trying at once
                continue
            refused = self._refusal(sock)
            if refused is None:
                self._serve(sock)
            else:
                _turn_away(sock, refused)

    def _refusal(self, sock: socket.socket) -> FeedError | None:
        uid = self._peer_uid(sock)
        if uid != os.geteuid():
            log.warning("teacher socket %s: refused a process of user %d", self.path, uid)
            return FeedError("unauthenticated", f"this server belongs to user {os.geteuid()} and serves no other; you are {uid}")
        if len(self._lanes) >= self._max_lanes and not self._end_idle_lane():
            return FeedError("retry_later", f"all {self._max_lanes} connections of this server are taken", retry_after_s=1.0)
        return None

    def _serve(self, sock: socket.socket) -> None:
        lane = Lane(sock, self._service, self._grants, self._silence_s, self._make_room, self._caller)
        thread = threading.Thread(target=self._run, args=(lane,), name="shm-lane", daemon=True)
        with self._lock:
            self._lanes[lane] = thread
        try:
            thread.start()
        except RuntimeError as err:  # the process may have no more threads
            with self._lock:
                del self._lanes[lane]
            _turn_away(sock, FeedError("retry_later", f"this server cannot take another connection ({err})", retry_after_s=1.0))

    def _run(self, lane: Lane) -> None:
        try:
            lane.run()
        finally:
            with self._lock:
                del self._lanes[lane]

    def _caller(self, client: str) -> Caller:
        return Caller("this host", lambda: any(lane.client == client for lane in self._open()))

    def _make_room(self) -> None:
        """End the lane that has been idle for longest: its memory serves somebody who asks."""
        idle = [lane for lane in self._open() if not lane.busy and lane.num_bytes]
        if idle:
            min(idle, key=lambda lane: lane.used_at).stop()

    def _end_idle_lane(self) -> bool:
        """End the lane that has been idle for longest, for a new one; False when all are at work, or it does not end in time."""
        idle = [lane for lane in self._open() if not lane.busy]
        if not idle:
            return False
        min(idle, key=lambda lane: lane.used_at).stop()
        end = time.monotonic() + _ROOM_S
        while len(self._lanes) >= self._max_lanes and time.monotonic() < end:
            time.sleep(_POLL_S / 4)
        return len(self._lanes) < self._max_lanes

    def _open(self) -> list[Lane]:
        with self._lock:
            return list(self._lanes)


def _turn_away(sock: socket.socket, error: FeedError) -> None:
    try:
        frames.send(sock, frames.REFUSED, frames.pack_error(error), time.monotonic() + 1.0)
    except OSError:
        pass  # it has gone
    finally:
        sock.close()
