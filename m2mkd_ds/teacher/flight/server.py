"""A teacher server on Arrow Flight: hello and status are actions, golden and get are DoGet; see parts.py for the bytes.

pyarrow's server has no time limits of its own: it cannot cancel a call, and its shutdown() waits for every handler. So this file counts
the calls under way and, where one must end, cuts its TCP connection: gRPC then fails the blocked write, and the handler returns. That
bounds both a client that stopped reading (its answer would stay in memory) and `stop`.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.flight.gate import FailureLimit, host_of, make_middleware
from m2mkd_ds.teacher.flight.parts import (
    GET,
    GOLDEN,
    HELLO,
    MAX_TICKET_BYTES,
    PIECE_BYTES,
    STATUS,
    import_flight,
    pack_refusal,
    schema,
    to_batch,
)  # fmt: skip
from m2mkd_ds.teacher.flight.security import Keys, ServerSecurity, join_address, split_address
from m2mkd_ds.teacher.flight.sockets import cut_connection, is_connected
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.packing import pack, unpack, unpack_name
from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, Answer, FeedError, GetBatch, Golden, Hello
from m2mkd_ds.teacher.server.admission import Caller, Lease
from m2mkd_ds.teacher.server.coming import Service

MAX_CALLS = 256
"""Calls at a time, of all clients; each holds a thread."""
STALL_S = 60.0
"""A client that takes no part for so long is cut off."""
CUT_S = 5.0
"""How long gRPC may take to notice cut connections."""


@dataclass(eq=False)
class _Call:
    """One call under way."""

    peer: str
    sending: bool = False
    """Whether the answer is made and on its way."""
    moved: float = 0.0
    """When the client last took a part."""


class FlightTransport:
    """Listens on HOST:PORT (port 0: any free one) and calls the service."""

    def __init__(
        self, service: Service, listen: str, security: ServerSecurity, *, max_calls: int = MAX_CALLS, stall_s: float = STALL_S
    ) -> None:
        """Raises ConfigError when the security does not fit the address."""
        self._service, self._max_calls, self._stall_s = service, max_calls, stall_s
        self._host, self._port = split_address(listen)
        self._keys = security.load(self._host)
        self._server: Any = None
        self._failures = FailureLimit()
        self._calls: set[_Call] = set()
        self._changed = threading.Condition()
        self._stopping, self._hard = threading.Event(), threading.Event()
        self._watching = threading.Thread(target=self._watch, name="flight stalls", daemon=True)

    @property
    def port(self) -> int:
        """The port that is listened on; known after `start`."""
        return int(self._server.port) if self._server else self._port

    @property
    def endpoint(self) -> str:
        """What trainers write into teacher.endpoints."""
        return join_address(self._host, self.port)

    def start(self) -> None:
        """Listen and serve in threads. Raises OSError when the address cannot be had."""
        server = _make_server(self, self._keys, join_address(self._host, self._port))
        self._watching.start()
        self._server = server

    def stop(self, grace_s: float) -> None:
        """Refuse new calls, wait up to `grace_s` for those under way, cut the rest off. Ends within `grace_s` and a few seconds."""
        self._stopping.set()
        if self._server is None:
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._calls, grace_s)
        self._hard.set()
        ending = threading.Thread(target=self._server.shutdown, name="flight shutdown", daemon=True)
        ending.start()
        deadline = time.monotonic() + CUT_S
        while ending.is_alive() and time.monotonic() < deadline:
            self._cut(lambda call: True)
            ending.join(0.1)
        self._watching.join()
        if ending.is_alive():
            logger.warning("%d answers on %s are still being computed; the port is closed", len(self._calls), self.endpoint)

    def action(self, context: Any, kind: str, body: Any) -> bytes:
        """The packed answer to an action, or the refusal."""
        try:
            with self._call(context):
                if kind not in (HELLO, STATUS) or body.size > MAX_MESSAGE_BYTES:
                    raise FeedError("bad_request", f"action {kind[:40]!r} of {body.size} bytes; allowed: {HELLO}, {STATUS} up to 64 KB")
                told, peer = body.to_pybytes(), context.peer()
                if kind == STATUS:
                    return pack(self._service.status(unpack_name(told)))
                return pack(self._service.hello(unpack(Hello, told), Caller(host_of(peer), lambda: is_connected(peer))))
        except FeedError as err:
            return pack_refusal(err)

    def stream(self, context: Any, ticket: bytes) -> Iterator[Any]:
        """Record batches of the answer to a ticket, or of the refusal. The work is done when the first one is asked for.

        So the client has its stream at once, and can cancel while it waits.
        """
        peer, gate = context.peer(), context.get_middleware("gate")
        return self._parts(peer, gate.authorised, ticket)

    def _parts(self, peer: str, authorised: bool, ticket: bytes) -> Iterator[Any]:
        try:
            with self._counted(peer, authorised) as call:
                with self._answer(ticket) as answer:
                    frame = codec.encode(answer, PIECE_BYTES)
                    call.moved, call.sending = time.monotonic(), True
                    parts = frame.parts()
                    for part in islice(parts, frame.num_parts - 1):
                        yield to_batch(part)
                        call.moved = time.monotonic()
                        if self._hard.is_set():
                            raise ConnectionAbortedError("the server stops")
                # Not under the lease: who has the tail may ask for the next answer, and shall not be told that this one is in flight.
                yield to_batch(next(parts))
        except FeedError as err:
            yield to_batch(pack_refusal(err))

    def _answer(self, ticket: bytes) -> Lease[Answer]:
        """The answer to a ticket, whose bytes count until it is sent. Raises FeedError."""
        if len(ticket) > MAX_TICKET_BYTES:
            raise FeedError("bad_request", f"a ticket of {len(ticket)} bytes; at most {MAX_TICKET_BYTES} are allowed")
        if ticket.startswith(GET):
            return self._service.answering(unpack(GetBatch, ticket[len(GET) :]))
        if ticket.startswith(GOLDEN):
            return self._service.golden_answering(unpack(Golden, ticket[len(GOLDEN) :]))
        raise FeedError("bad_request", "a ticket begins with `get` or `golden`")

    @contextmanager
    def _call(self, context: Any) -> Iterator[_Call]:
        with self._counted(context.peer(), context.get_middleware("gate").authorised) as call:
            yield call

    @contextmanager
    def _counted(self, peer: str, authorised: bool) -> Iterator[_Call]:
        """One call, from its checks to its last part. Raises FeedError for what may not be, and for a bug, which is logged."""
        if not authorised:
            self._failures.check(peer)
            self._failures.count(peer)
            raise FeedError("unauthenticated", "wrong or no token: give teacher.token_file the file that the server was started with")
        if self._stopping.is_set():
            raise FeedError("draining", "this server is about to stop", endpoints=self._service.options.endpoints)
        call = _Call(peer)
        with self._changed:
            if len(self._calls) >= self._max_calls:
                raise FeedError("retry_later", f"{self._max_calls} calls are under way", retry_after_s=0.5)
            self._calls.add(call)
        try:
            yield call
        except (FeedError, ConnectionAbortedError):
            raise
        except Exception as err:  # whatever it is, the trainer hears of it and the server goes on
            logger.exception("teacher server: a call of %s failed", peer)
            raise FeedError("internal", f"{type(err).__name__}: {err}") from err
        finally:
            with self._changed:
                self._calls.discard(call)
                self._changed.notify_all()

    def _all_calls(self) -> list[_Call]:
        with self._changed:
            return list(self._calls)

    def _cut(self, which: Callable[[_Call], bool]) -> None:
        for call in self._all_calls():
            if which(call) and call.sending and cut_connection(call.peer):
                logger.warning("teacher server: cut off %s", call.peer)

    def _watch(self) -> None:
        """Cut clients off that take nothing."""
        while not self._hard.wait(min(1.0, self._stall_s / 4)):
            self._cut(lambda call: call.moved < time.monotonic() - self._stall_s)


def _make_server(transport: FlightTransport, keys: Keys, address: str) -> Any:
    """A running FlightServerBase that passes calls on; what it does not override, and what `gate` stops, is refused."""
    flight = import_flight()
    import pyarrow as pa

    class Server(flight.FlightServerBase):  # type: ignore[name-defined]
        def do_action(self, context: Any, action: Any) -> list[bytes]:
            return [transport.action(context, action.type, action.body)]

        def do_get(self, context: Any, ticket: Any) -> Any:
            return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema(), transport.stream(context, ticket.ticket)))

    tls = {"tls_certificates": [(keys.cert, keys.key)], "verify_client": bool(keys.authority), "root_certificates": keys.authority or None}
    try:
        return Server(f"{'grpc+tls' if keys.cert else 'grpc'}://{address}", middleware=make_middleware(keys), **(tls if keys.cert else {}))
    except (flight.FlightError, pa.ArrowException, OSError) as err:
        raise OSError(f"cannot listen on {address}: {_why_not_bound(address) or str(err).splitlines()[0]}") from err


def _why_not_bound(address: str) -> str:
    """The system's word for it, which gRPC keeps to its own log."""
    try:
        host, port = split_address(address)
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return ""
    except OSError as err:
        return f"{err.strerror or err}; choose another address or port"
