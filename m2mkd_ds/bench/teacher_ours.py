"""Our own ways in `m2mkd bench teacher`: the transports and connections of feed=shm and feed=remote around a real service."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from m2mkd_ds.bench.teacher_batches import PAIR, Shape, StandIn, hello, make_service
from m2mkd_ds.bench.teacher_certificates import HOST, Certificates
from m2mkd_ds.bench.teacher_flight import Threads
from m2mkd_ds.bench.teacher_floors import TIMEOUT_S, Take
from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.teacher.client.connect import connect
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import GetBatch


class ShmServer:
    """feed=shm: a Unix socket and memory without a name."""

    def __init__(self, producer: StandIn, path: Path, in_flight: int) -> None:
        from m2mkd_ds.teacher.shm.server import ShmTransport

        self._transport = ShmTransport(make_service(producer, in_flight), path)
        self._transport.start()
        self.address = self._transport.endpoint

    def close(self) -> None:
        self._transport.stop(0.0)


class RemoteServer:
    """feed=remote: Arrow Flight with codec, checksums, limits; with certificates, both sides show theirs."""

    def __init__(self, producer: StandIn, in_flight: int, certificates: Certificates | None = None) -> None:
        from m2mkd_ds.teacher.flight.security import ServerSecurity
        from m2mkd_ds.teacher.flight.server import FlightTransport

        security = ServerSecurity()
        if certificates is not None:
            security = ServerSecurity(
                tls_cert=certificates.server_cert, tls_key=certificates.server_key, client_ca=certificates.authority
            )  # fmt: skip
        self._transport = FlightTransport(make_service(producer, in_flight), f"{HOST}:0", security)
        self._transport.start()
        self.address = self._transport.endpoint

    def close(self) -> None:
        self._transport.stop(0.0)


class OurClient:
    """The connection that a trainer's feed uses; what it gives is in tensors, checked against its checksums."""

    def __init__(self, address: str, shape: Shape, in_flight: int, certificates: Certificates | None = None) -> None:
        self._connection = open_connection(address, certificates)
        welcome = self._connection.hello(hello(shape), TIMEOUT_S)
        self._images = shape.images
        self._request = GetBatch(
            instance=welcome.instance, plan=welcome.plan, client="bench", layout=shape.layout, start=0, pairs=(PAIR,), payload="hidden",
            wire_dtype=shape.wire_dtype, with_teacher=True, attempt=0,
        )  # fmt: skip
        self._threads = Threads(in_flight)

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        self._threads.fetch(numbers, in_flight, self._get, take)

    def close(self) -> None:
        self._threads.close()
        self._connection.close()

    def _get(self, number: int) -> list[memoryview]:
        request = dataclasses.replace(self._request, start=number * self._images)
        answer = self._connection.get(request, TIMEOUT_S)
        if not answer.head.answers(request):
            raise RuntimeError(f"asked for batch {number}, got the answer to another request")
        return views(list(answer.tensors.values()))


def open_connection(endpoint: str, certificates: Certificates | None = None) -> Connection:
    """As a trainer opens it."""
    if certificates is None:
        return connect(endpoint, TeacherConfig())
    return connect(
        endpoint, TeacherConfig(tls_ca=certificates.authority, tls_cert=certificates.client_cert, tls_key=certificates.client_key)
    )  # fmt: skip


def views(tensors: Sequence[torch.Tensor]) -> list[memoryview]:
    """The tensors' bytes; each view keeps its tensor."""
    return [memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) for tensor in tensors]  # type: ignore[arg-type]
