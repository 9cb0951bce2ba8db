"""A server that listens before it can answer, and who is still connected to it, over both transports."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.teacher.client.connect import connect
from m2mkd_ds.teacher.flight.security import ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import FeedError
from m2mkd_ds.teacher.server.coming import ComingService
from m2mkd_ds.teacher.server.service import TeacherService
from m2mkd_ds.teacher.shm.server import ShmTransport
from tests.teacher.conftest import LIMITS
from tests.teacher.flight_tools import hello_of, request_of
from tests.teacher.town import teacher_config, wait_until

MakeService = Callable[..., TeacherService]
SHORT = replace(LIMITS, heartbeat_s=0.1)


@pytest.fixture(params=["flight", "shm"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[TeacherService | ComingService], str]]:
    """listen(service) -> the endpoint of a transport that serves it."""
    opened: list[FlightTransport | ShmTransport] = []

    def start(service: TeacherService | ComingService) -> str:
        flight = request.param == "flight"
        opened.append(FlightTransport(service, "127.0.0.1:0", ServerSecurity()) if flight else ShmTransport(service, tmp_path / "t.sock"))
        opened[-1].start()
        return opened[-1].endpoint

    yield start
    for transport in opened:
        transport.stop(0.0)


def linked(endpoint: str) -> Connection:
    return connect(endpoint, teacher_config(endpoint))


def test_who_comes_while_models_load_is_asked_to_wait_and_then_served(
    listen: Callable[..., str], sharing_service: MakeService
) -> None:
    service = sharing_service()
    coming = ComingService(service.options)
    link = linked(listen(coming))
    with pytest.raises(FeedError, match="still loading its models") as early:
        link.hello(hello_of(service), 5.0)
    assert early.value.code == "retry_later" and early.value.retry_after_s == 1.0
    coming.open(service)
    welcome = link.hello(hello_of(service), 5.0)
    assert link.get(request_of(welcome), 5.0).head.start == 0 and link.status(5.0).clients == 1
    link.close()


def test_a_server_that_is_told_to_stop_while_it_loads_refuses_from_then_on(
    listen: Callable[..., str], sharing_service: MakeService
) -> None:
    service = sharing_service()
    coming = ComingService(service.options)
    link = linked(listen(coming))
    coming.drain()
    for _ in range(2):
        with pytest.raises(FeedError, match="about to stop") as leaving:
            link.hello(hello_of(service), 5.0)
        assert leaving.value.code == "draining"
        coming.open(service)
    link.close()


def test_a_client_that_closed_its_link_does_not_count_as_evicted_and_a_silent_one_does(
    listen: Callable[..., str], sharing_service: MakeService
) -> None:
    service = sharing_service(limits=SHORT)
    before = service.counters()
    endpoint = listen(service)
    silent, leaving = linked(endpoint), linked(endpoint)
    silent.hello(replace(hello_of(service), client="silent"), 5.0)
    leaving.hello(replace(hello_of(service), client="leaving"), 5.0)
    assert service.status().clients == 2
    leaving.close()
    del leaving
    gc.collect()
    time.sleep(0.1)
    wait_until(lambda: service.status().clients == 0)
    after = service.counters()
    assert [after[name] - before[name] for name in ("left_clients", "evicted_clients")] == [1, 1]
    silent.close()


def test_a_greeting_tells_where_the_client_is(
    listen: Callable[..., str], sharing_service: MakeService, caplog: pytest.LogCaptureFixture
) -> None:
    service = sharing_service()
    endpoint = listen(service)
    link = linked(endpoint)
    with caplog.at_level("INFO", logger="m2mkd_ds"):
        link.hello(hello_of(service), 5.0)
        link.hello(hello_of(service), 5.0)
    greeted = [record.getMessage() for record in caplog.records if "greeted client" in record.getMessage()]
    where = "this host" if endpoint.startswith("unix:") else "127.0.0.1"
    assert len(greeted) == 1 and f"greeted client test of {where}: rank 0 of 2" in greeted[0]
    assert link.carrier == ("shared memory" if endpoint.startswith("unix:") else "plain TCP")
    link.close()
