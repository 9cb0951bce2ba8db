"""Plain Arrow Flight as a peer of `m2mkd bench teacher`: what its users get who write a DoGet of ready-made record batches.

No codec, no checksum, no deadline; pieces of up to 3 MB, because one message of a whole batch costs more (docs/benchmarks.md).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from m2mkd_ds.bench.teacher_batches import Batches
from m2mkd_ds.bench.teacher_certificates import HOST, Certificates
from m2mkd_ds.bench.teacher_floors import Take

PIECE_BYTES = 3 * 2**20


class FlightServer:
    """Tables made beforehand, one a content."""

    def __init__(self, batches: Batches, certificates: Certificates | None = None) -> None:
        import pyarrow as pa
        from pyarrow import flight

        contents = [_table(pa, batches.parts(number)) for number in range(batches.shape.num_contents)]

        class Server(flight.FlightServerBase):
            def do_get(self, context: Any, ticket: Any) -> Any:
                return flight.RecordBatchStream(contents[int(ticket.ticket) % len(contents)])

        tls: dict[str, Any] = {}
        if certificates is not None:
            pair = (_read(certificates.server_cert), _read(certificates.server_key))
            tls = {"tls_certificates": [pair], "verify_client": True, "root_certificates": _read(certificates.authority)}
        self._server: Any = Server(f"{'grpc+tls' if tls else 'grpc'}://{HOST}:0", **tls)
        self.address = str(self._server.port)

    def close(self) -> None:
        # Waits for calls under way, of which there are none unless the client has gone wrong.
        threading.Thread(target=self._server.shutdown, daemon=True).start()


class FlightClient:
    """Pieces stay where Flight put them."""

    def __init__(self, address: str, sizes: Sequence[int], in_flight: int, certificates: Certificates | None = None) -> None:
        from pyarrow import flight

        tls: dict[str, Any] = {}
        if certificates is not None:
            tls = {
                "tls_root_certs": _read(certificates.authority), "cert_chain": _read(certificates.client_cert),
                "private_key": _read(certificates.client_key),
            }  # fmt: skip
        self._ticket = flight.Ticket
        self._client: Any = flight.connect(f"{'grpc+tls' if tls else 'grpc'}://{HOST}:{address}", **tls)
        self._threads = Threads(in_flight)

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        self._threads.fetch(numbers, in_flight, self._get, take)

    def close(self) -> None:
        self._threads.close()
        self._client.close()

    def _get(self, number: int) -> list[memoryview]:
        return list(self._pieces(number))

    def _pieces(self, number: int) -> Any:
        for chunk in self._client.do_get(self._ticket(str(number).encode())):
            column = chunk.data.column(0)
            yield memoryview(column.buffers()[1]).cast("B")[column.offset : column.offset + len(column)]


class JoinedFlightClient(FlightClient):
    """Pieces are copied into one reused buffer: then a batch is one tensor, as ours are."""

    def __init__(self, address: str, sizes: Sequence[int], in_flight: int) -> None:
        super().__init__(address, sizes, in_flight)
        # One buffer for each request under way and one for the batch that is being taken.
        self._rooms = [np.ones(sum(sizes), dtype=np.uint8) for _ in range(in_flight + 1)]

    def _get(self, number: int) -> list[memoryview]:
        at, room = 0, self._rooms[number % len(self._rooms)]
        for piece in self._pieces(number):
            np.copyto(room[at : at + len(piece)], np.frombuffer(piece, dtype=np.uint8))
            at += len(piece)
        return [memoryview(room[:at])]  # type: ignore[arg-type]  # numpy arrays are buffers


class Threads:
    """A blocking call in several threads at once, its results in order; with one request under way, in the calling thread."""

    def __init__(self, in_flight: int) -> None:
        self._pool = ThreadPoolExecutor(in_flight, thread_name_prefix="bench-get")

    def fetch(self, numbers: range, in_flight: int, get: Callable[[int], list[memoryview]], take: Take) -> None:
        """Call `get` for every number with up to `in_flight` calls at a time."""
        if in_flight == 1:
            for number in numbers:
                take(number, get(number))
            return
        waiting: deque[tuple[int, Future[list[memoryview]]]] = deque()
        try:
            for number in numbers:
                waiting.append((number, self._pool.submit(get, number)))
                if len(waiting) == in_flight:
                    first, result = waiting.popleft()
                    take(first, result.result())
                    del result  # with the last reference, the memory of the batch is free for the next
            while waiting:
                first, result = waiting.popleft()
                take(first, result.result())
                del result
        finally:
            for _, result in waiting:
                result.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _table(pa: Any, parts: Sequence[memoryview]) -> Any:
    """A table over the parts' own memory, in pieces that hold bytes of one part each."""
    schema = pa.schema([pa.field("part", pa.uint8(), nullable=False)])
    pieces = [part[at : at + PIECE_BYTES] for part in parts for at in range(0, len(part), PIECE_BYTES)]
    arrays = [pa.Array.from_buffers(pa.uint8(), len(piece), [None, pa.py_buffer(piece)]) for piece in pieces]
    return pa.Table.from_batches([pa.RecordBatch.from_arrays([array], schema=schema) for array in arrays])


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
