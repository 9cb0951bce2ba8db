"""One trainer's lane through the socket of server.py, as the server sees it: a request, an answer in the segment, an Ack, and again."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from m2mkd_ds.teacher.protocol.packing import pack, unpack, unpack_name
from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, Answer, FeedError, GetBatch, Golden, Hello
from m2mkd_ds.teacher.server.admission import Caller
from m2mkd_ds.teacher.server.coming import Service
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm.frames import Ready
from m2mkd_ds.teacher.shm.segment import Segment, segment_bytes

log = logging.getLogger("m2mkd_ds")

MESSAGE_S = 10.0
"""How long one message may take from its first byte to its last: nobody holds a lane by dribbling."""
_WAIT_S, _POLL_S = 1.0, 0.02
"""How long an answer that has been made waits for memory before it is refused."""


class Grants:
    """What all lanes share: bytes of segments, and how many requests of one client are being answered or wait for their Ack."""

    def __init__(self, max_bytes: int, max_in_flight: int) -> None:
        self.num_bytes = 0
        self._max_bytes, self._max_in_flight = max_bytes, max_in_flight
        self._in_flight: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> bool:
        """Whether so many bytes more are granted."""
        with self._lock:
            granted = self.num_bytes + num_bytes <= self._max_bytes
            self.num_bytes += num_bytes if granted else 0
            return granted

    def give(self, num_bytes: int) -> None:
        """Bytes that are free again."""
        with self._lock:
            self.num_bytes -= num_bytes

    @contextmanager
    def request(self, client: str) -> Iterator[None]:
        """Counts one request of a client while it lasts. Raises FeedError(retry_later) when there are as many as it may have."""
        with self._lock:
            if self._in_flight[client] >= self._max_in_flight:
                raise FeedError(
                    "retry_later",
                    f"{self._max_in_flight} answers for {client} are being made or were not taken yet; it may have no more at a time",
                    retry_after_s=0.1,
                )
            self._in_flight[client] += 1
        try:
            yield
        finally:
            with self._lock:
                self._in_flight[client] -= 1
                self._in_flight += Counter()  # forgets clients at zero

    def shortage(self, num_bytes: int) -> FeedError:
        """Why bytes were not granted."""
        return FeedError(
            "retry_later",
            f"shared memory: answers hold {self.num_bytes} of {self._max_bytes} bytes, and {num_bytes} more are needed; raise the server's "
            "limit of bytes, or lower teacher.prefetch",
            retry_after_s=0.1,
        )


class Lane:
    """Serves one socket in the calling thread, until it is closed from either side or its client breaks the rules."""

    def __init__(
        self, sock: socket.socket, service: Service, grants: Grants, silence_s: float, make_room: Callable[[], None],
        caller: Callable[[str], Caller],
    ) -> None:  # fmt: skip
        """`make_room` ends some idle lane, for its memory; `caller` says who a client of that name is."""
        self._sock, self._service, self._grants, self._silence_s, self._make_room = sock, service, grants, silence_s, make_room
        self._caller = caller
        self.client = ""
        """Who used it last."""
        self._segment: Segment | None = None
        self._announced = False
        """Whether the client has the segment's descriptor."""
        self.busy = False
        """Whether a request is being answered, or its answer waits for the Ack."""
        self.used_at = time.monotonic()

    @property
    def num_bytes(self) -> int:
        """Of its segment."""
        segment = self._segment
        return segment.num_bytes if segment else 0

    def run(self) -> None:
        """Returns when the lane has ended and its memory is given back."""
        try:
            while self._turn():
                pass
        except frames.FrameError as err:
            self._refuse_quietly(FeedError("bad_request", str(err)))
        except OSError as err:
            log.debug("teacher socket: a lane ended (%s)", err)
        finally:
            self._free()
            self._sock.close()

    def stop(self) -> None:
        """End it from another thread; an answer under way is not waited for."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other side was faster

    def _turn(self) -> bool:
        """One request; False when the client has closed."""
        asked = self._receive()
        if asked is None:
            return False
        self.busy = True
        try:
            self._answer(*asked)
        except FeedError as err:
            self._send(frames.REFUSED, frames.pack_error(err))
        except (OSError, frames.FrameError):
            raise
        except Exception as err:
            log.exception("teacher socket: a request could not be answered")
            self._send(frames.REFUSED, frames.pack_error(FeedError("internal", f"{type(err).__name__}: {err}")))
        finally:
            self.used_at, self.busy = time.monotonic(), False
        return True

    def _answer(self, kind: bytes, body: bytes) -> None:
        service = self._service
        if kind == frames.HELLO:
            hello = unpack(Hello, body)
            self.client = hello.client
            self._send(frames.WELCOME, pack(service.hello(hello, self._caller(hello.client))))
        elif kind == frames.STATUS:
            self.client = unpack_name(body)
            self._send(frames.STATE, pack(service.status(self.client)))
        elif kind == frames.GOLDEN:
            with service.golden_answering(unpack(Golden, body)) as answer:
                ready = self._written(answer)
            del answer
            self._hand_over(ready)
        elif kind == frames.GET:
            request = unpack(GetBatch, body)
            self.client = request.client
            with self._grants.request(request.client):
                # The lease ends with the copy: from then on the segment counts, and not the answer.
                with service.answering(request) as answer:
                    ready = self._written(answer)
                del answer  # its memory need not wait for the client
                self._hand_over(ready)
        else:
            raise frames.FrameError(f"a message of kind {kind!r} where a request belongs")

    def _written(self, answer: Answer) -> Ready:
        """What to say about the answer, once it lies in the lane's segment."""
        return self._fitting_segment(answer).write(answer)

    def _hand_over(self, ready: Ready) -> None:
        """Announce what was written, and wait until it was taken."""
        assert self._segment is not None
        self._send(frames.READY, ready.pack(), () if self._announced else (self._segment.fd,))
        self._announced = True
        told = self._receive()
        if told is None:
            raise ConnectionResetError("the client went away before it had taken its answer")
        if told != (frames.ACK, frames.pack_ack(ready.generation)):
            raise frames.FrameError(f"a message of kind {told[0]!r} where the Ack of answer {ready.generation} belongs")

    def _fitting_segment(self, answer: Answer) -> Segment:
        """The lane's segment, or a new one when it is too small. Raises FeedError when there is no memory for it."""
        most, needed = self._service.options.limits.max_answer_bytes, segment_bytes(answer)
        if answer.num_bytes > most:
            raise FeedError("bad_request", f"an answer of {answer.num_bytes} bytes; this server gives at most {most}: ask for fewer images")
        if self._segment is not None and self._segment.num_bytes >= needed:
            return self._segment
        self._free()
        end = time.monotonic() + _WAIT_S
        while not self._grants.take(needed):
            if time.monotonic() > end:
                raise self._grants.shortage(needed)
            self._make_room()
            time.sleep(_POLL_S)
        try:
            self._segment = Segment(needed)
        except OSError as err:
            self._grants.give(needed)
            raise FeedError("retry_later", f"no shared memory of {needed} bytes ({err.strerror})", retry_after_s=1.0) from None
        return self._segment

    def _free(self) -> None:
        segment, self._segment, self._announced = self._segment, None, False
        if segment is not None:
            segment.close()
            self._grants.give(segment.num_bytes)

    def _receive(self) -> tuple[bytes, bytes] | None:
        message = frames.receive(self._sock, time.monotonic() + self._silence_s, most=MAX_MESSAGE_BYTES, rest_s=MESSAGE_S)
        return None if message is None else message[:2]

    def _send(self, kind: bytes, body: bytes, fds: tuple[int, ...] = ()) -> None:
        frames.send(self._sock, kind, body, time.monotonic() + self._silence_s, fds)

    def _refuse_quietly(self, error: FeedError) -> None:
        """A last word to a client that may not be listening."""
        try:
            frames.send(self._sock, frames.REFUSED, frames.pack_error(error), time.monotonic() + 1.0)
        except OSError:
            pass
