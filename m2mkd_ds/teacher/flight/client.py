"""A trainer's link to a teacher server on Arrow Flight. Every call has a deadline, which holds while an answer is read, too.

A link belongs to the process that made it: gRPC's threads do not survive a fork, and a call in the child would wait for them for ever.
Parts are checked as they come (codec.py), the head before there is room for tensors; gRPC refuses parts above a few MB by itself.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from m2mkd_ds.teacher.flight.allocator import keep_freed_memory
from m2mkd_ds.teacher.flight.faults import feed_or_link_error, seconds_left, unreachable
from m2mkd_ds.teacher.flight.parts import (
    GET,
    GOLDEN,
    HELLO,
    MAX_PART_BYTES,
    STATUS,
    TOKEN_HEADER,
    TOKEN_PREFIX,
    from_batch,
    import_flight,
    raise_refusal,
    schema,
)  # fmt: skip
from m2mkd_ds.teacher.flight.security import ClientSecurity, join_address, split_address
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import MAX_BUFFERS, MAX_POOL_BYTES, BufferPool
from m2mkd_ds.teacher.protocol.packing import pack, unpack
from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, Answer, FeedError, GetBatch, Golden, Hello, LinkError, Status, Welcome

_Message = TypeVar("_Message", Welcome, Status)
CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),  # a connection of its own: its back-off after a failure is nobody else's
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),  # the default grows to two minutes: a restarted server would stay unseen
    ("grpc.max_receive_message_length", MAX_PART_BYTES + 64 * 1024),
    ("grpc.http2.max_frame_size", 4 * 1024 * 1024),
    ("grpc.enable_http_proxy", 0),
)
"""gRPC's channel arguments."""


class FlightConnection:
    """A `Connection` (connection.py) to HOST:PORT."""

    def __init__(self, endpoint: str, security: ClientSecurity, pool: BufferPool | None = None) -> None:
        """Connects nothing yet. `pool` lends the memory of micro-batches; without one, the link has its own. Adjusts malloc (allocator.py).

        Raises ConfigError for certificates or a token that cannot be used.
        """
        self._pid, self._closed = os.getpid(), False
        self._host, self._port = split_address(endpoint)
        self.endpoint = join_address(self._host, self._port)
        self._keys = keys = security.load()
        self.carrier = ("mutual TLS" if keys.cert else "TLS") if keys.authority else "plain TCP"
        self._max_answer_bytes, self._name = 0, ""
        self._pool = pool or BufferPool(MAX_BUFFERS, MAX_POOL_BYTES)
        self._streams: set[Any] = set()
        self._lock = threading.Lock()
        keep_freed_memory()
        tls = {"tls_root_certs": keys.authority, "cert_chain": keys.cert or None, "private_key": keys.key or None} if keys.authority else {}
        scheme = "grpc+tls" if keys.authority else "grpc"
        self._client: Any = import_flight().FlightClient(f"{scheme}://{self.endpoint}", generic_options=list(CHANNEL), **tls)

    def hello(self, hello: Hello, deadline_s: float) -> Welcome:
        """Must come first; the welcome's limits hold for the calls after it."""
        welcome = self._action(Welcome, HELLO, pack(hello), deadline_s)
        self._max_answer_bytes, self._name = welcome.limits.max_answer_bytes, hello.client
        return welcome

    def status(self, deadline_s: float) -> Status:
        """How the server is; after a hello, a sign of life of its client."""
        return self._action(Status, STATUS, self._name.encode(), deadline_s)

    def golden(self, request: Golden, deadline_s: float) -> Answer:
        """Outputs for the synthetic images."""
        return self._fetch(GOLDEN + pack(request), deadline_s, None)

    def get(self, request: GetBatch, deadline_s: float, accept: codec.Accept | None = None) -> Answer:
        """One micro-batch, its head accepted, checksums compared."""
        return self._fetch(GET + pack(request), deadline_s, self._pool, accept)

    def close(self) -> None:
        """End calls under way: those that wait for a server that lives at once, those to a frozen one at their deadline."""
        self._closed = True
        if os.getpid() != self._pid:
            return
        with self._lock:
            streams, self._streams = list(self._streams), set()
        for stream in streams:
            stream.cancel()
        self._client = None  # threads in a call hold it until they leave: closing it under them would free what they use

    def __del__(self) -> None:
        client = getattr(self, "_client", None)
        if client is not None and os.getpid() != self._pid:
            # In a forked child the destructor would wait for gRPC's threads, which are not there: give the object away for good.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(client))

    def _action(self, kind: type[_Message], name: str, body: bytes, deadline_s: float) -> _Message:
        flight = import_flight()
        with self._call(deadline_s) as (client, options):
            results = [result.body for result in client.do_action(flight.Action(name, body), options)]
        if len(results) != 1 or results[0].size > 4 * MAX_MESSAGE_BYTES:
            raise LinkError("corrupt", f"{self.endpoint}: {len(results)} results instead of one message")
        packed = results[0].to_pybytes()
        raise_refusal(packed)
        try:
            return unpack(kind, packed)
        except FeedError as err:
            raise LinkError("corrupt", f"{self.endpoint}: its answer to {name} cannot be read ({err})") from None

    def _fetch(self, ticket: bytes, deadline_s: float, pool: BufferPool | None, accept: codec.Accept | None = None) -> Answer:
        if not self._max_answer_bytes:
            raise RuntimeError("say hello() first: it brings the limits that answers are held to")
        flight = import_flight()
        with self._call(deadline_s) as (client, options):
            stream = client.do_get(flight.Ticket(ticket), options)
            try:
                self._enter(stream)
                if stream.schema != schema():
                    raise LinkError("corrupt", f"{self.endpoint}: the stream has another form than ours")
                reader = codec.FrameReader(max_bytes=self._max_answer_bytes, pool=pool, accept=accept, wait_s=deadline_s)
                return _read(_parts(stream), reader)
            finally:
                self._leave(stream)

    def _enter(self, stream: Any) -> None:
        with self._lock:
            self._streams.add(stream)
        if self._closed:  # close() may have come before the stream was there to be cancelled
            raise LinkError("closed", f"{self.endpoint}: this link was closed")

    def _leave(self, stream: Any) -> None:
        """Whatever was not read is not wanted: the server stops sending."""
        with self._lock:
            self._streams.discard(stream)
        stream.cancel()

    @contextmanager
    def _call(self, deadline_s: float) -> Iterator[tuple[Any, Any]]:
        """Client and options of one call; errors of pyarrow become FeedError or LinkError."""
        flight = import_flight()
        import pyarrow as pa

        client = self._checked()
        deadline = time.monotonic() + deadline_s
        if deadline_s <= 0:
            raise LinkError("deadline", f"{self.endpoint}: no time is left for this call")
        headers = [(TOKEN_HEADER.encode(), TOKEN_PREFIX + self._keys.token.encode())] if self._keys.token else []
        try:
            yield client, flight.FlightCallOptions(timeout=deadline_s, headers=headers)
        except LinkError as err:
            raise LinkError(err.fault, str(err) if str(err).startswith(self.endpoint) else f"{self.endpoint}: {err}") from None
        except (flight.FlightError, pa.ArrowException, OSError) as err:
            if self._closed:
                raise LinkError("closed", f"{self.endpoint}: this link was closed") from None
            if isinstance(err, flight.FlightUnavailableError) and not _was_connected(err):
                raise unreachable(self._host, self._port, self._keys, seconds_left(deadline)) from None
            raise feed_or_link_error(err, self.endpoint, deadline_s) from None

    def _checked(self) -> Any:
        if os.getpid() != self._pid:
            raise LinkError(
                "closed",
                f"{self.endpoint}: this link was made in process {self._pid} and cannot be used in its forked child; make a link in "
                "the process that uses it, and start workers with `spawn`",
            )
        client = self._client
        if self._closed or client is None:
            raise LinkError("closed", f"{self.endpoint}: this link was closed")
        return client


def _parts(stream: Any) -> Iterator[memoryview]:
    """The stream's parts; Raises LinkError(corrupt) for an empty one."""
    while True:
        try:
            batch = stream.read_chunk().data
        except StopIteration:
            return
        if batch is None or not batch.num_rows:
            raise LinkError("corrupt", "an empty part")
        yield from_batch(batch)


def _read(parts: Iterator[memoryview], reader: codec.FrameReader) -> Answer:
    """The answer in a stream of parts, the last of which is the tail. Raises the refusal that stands in its place."""
    first = next(parts, None)
    if first is None:
        raise LinkError("corrupt", "an empty stream")
    raise_refusal(first)
    reader.head(first)
    held: memoryview | None = None
    for part in parts:
        if held is not None:
            reader.piece(held)
        held = part
    if held is None:
        raise LinkError("corrupt", "the answer ended after its head")
    return reader.tail(held)


def _was_connected(err: Exception) -> bool:
    return "Stream removed" in str(err) or "Broken pipe" in str(err)
