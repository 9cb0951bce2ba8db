"""The network transport between friends: same bytes, typed refusals, deadlines, threads, stopping, forks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.teacher.flight.client import FlightConnection
from m2mkd_ds.teacher.flight.security import ClientSecurity, ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Golden, LinkError
from m2mkd_ds.teacher.server.admission import Lease
from m2mkd_ds.teacher.server.service import TeacherService
from tests.left_over import running
from tests.teacher.conftest import LIMITS
from tests.teacher.flight_tools import hello_of, make_pki, pad_answers, request_of

MakeService = Callable[..., TeacherService]
PLAIN = ServerSecurity()


@pytest.fixture
def listen() -> Iterator[Callable[..., FlightTransport]]:
    """listen(service, security, ...) -> a running transport on a free port of loopback; stopped after the test."""
    with ExitStack() as stack:

        def make(service: TeacherService, security: ServerSecurity = PLAIN, **options: Any) -> FlightTransport:
            transport = FlightTransport(service, "127.0.0.1:0", security, **options)
            transport.start()
            stack.callback(transport.stop, 0.0)
            return transport

        yield make


def connect(transport: FlightTransport, security: ClientSecurity | None = None) -> FlightConnection:
    return FlightConnection(transport.endpoint, security or ClientSecurity())


def same(a: Answer, b: Answer) -> bool:
    return a.head == b.head and list(a.tensors) == list(b.tensors) and all(torch.equal(a.tensors[k], b.tensors[k]) for k in a.tensors)


@pytest.mark.parametrize("tls", [False, True])
def test_answers_are_those_of_the_service_bit_for_bit(make_service: MakeService, listen: Any, tmp_path: Path, tls: bool) -> None:
    service, pki = make_service(), make_pki(tmp_path)
    link = connect(listen(service, pki.server()), pki.client()) if tls else connect(listen(service))
    local = LocalConnection(service)
    welcome = link.hello(hello_of(service), 5.0)
    assert welcome == local.hello(hello_of(service), 5.0) and link.status(5.0) == local.status(5.0)
    golden = Golden(instance=welcome.instance, pairs=(0, 2))
    assert same(link.golden(golden, 5.0), local.golden(golden, 5.0))
    for step in range(3):
        request = request_of(welcome, step, pairs=(0, 1, 2))
        assert same(link.get(request, 5.0), local.get(request, 5.0))
    link.close()


def test_a_large_answer_comes_in_parts_and_whole(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    pad_answers(service, 9)
    link = connect(listen(service))
    answer = link.get(request_of(link.hello(hello_of(service), 5.0)), 5.0)
    # 9 MiB of int64: 0, 1, 2, ...
    assert torch.equal(answer.tensors["padding"], torch.arange(9 * 2**17))
    assert len(codec.encode(answer).pieces) > 5


def test_memory_is_used_again_but_never_while_somebody_holds_it(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    link = connect(listen(service))
    welcome = link.hello(hello_of(service), 5.0)
    held = link.get(request_of(welcome, 0), 5.0).tensors["hidden.1"]  # the answer is gone, one tensor is not
    before = held.clone()
    for step in range(1, 6):
        link.get(request_of(welcome, step), 5.0)
    assert torch.equal(held, before)
    assert link._pool.num_buffers == 2  # the one that is held, and one for all the others


def test_freed_memory_is_kept() -> None:
    code = """
import ctypes, resource, sys
from m2mkd_ds.teacher.flight.allocator import keep_freed_memory
assert sys.argv[1] == "default" or keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def turn():
    blocks = [libc.malloc(2**20) for _ in range(16)]
    for block in blocks: libc.memset(block, 1, 2**20)
    for block in blocks: libc.free(block)
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        mode: int(subprocess.run([sys.executable, "-c", code, mode], capture_output=True, check=True, text=True, env=environment).stdout)
        for mode in ("default", "kept")
    }
    # 10 turns over 16 MiB have 40960 pages of 4 KiB; kept memory is touched without a fault
    assert faults["default"] > 20_000 and faults["kept"] < 2_000


def test_a_status_tells_who_asks(make_service: MakeService, listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    service, names = make_service(), []
    real = service.status
    monkeypatch.setattr(service, "status", lambda client="": names.append(client) or real(client))
    link = connect(listen(service))
    link.status(5.0)
    link.hello(hello_of(service), 5.0)
    link.status(5.0)
    assert names == ["", "test"]
    link._name = "n" * 257
    with pytest.raises(FeedError, match="a client's name of 257 characters"):
        link.status(5.0)


def test_a_refusal_keeps_its_code_and_details(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    slots = tuple(range(10**15, 10**15 + 1024))  # 17 KB of JSON: more than gRPC's trailers hold

    def poisoned(request: GetBatch) -> Answer:
        raise FeedError("poisoned", "not finite", retry_after_s=1.5, slots=slots, endpoints=("10.0.0.8:8815",))

    link = connect(listen(service))
    welcome = link.hello(hello_of(service), 5.0)
    service.answering = poisoned  # type: ignore[method-assign]
    with pytest.raises(FeedError, match="not finite") as refused:
        link.get(request_of(welcome), 5.0)
    err = refused.value
    assert (err.code, err.retry_after_s, err.slots, err.endpoints) == ("poisoned", 1.5, slots, ("10.0.0.8:8815",))
    service.drain()
    with pytest.raises(FeedError) as refused:
        link.hello(hello_of(service), 5.0)
    assert refused.value.code == "draining"


def test_a_bug_of_the_server_is_an_internal_error_without_a_traceback(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    link = connect(listen(service))
    welcome = link.hello(hello_of(service), 5.0)

    def broken(request: GetBatch) -> Answer:
        raise KeyError("no such thing")

    service.answering = broken  # type: ignore[method-assign]
    with pytest.raises(FeedError, match=r"^KeyError: 'no such thing'$") as refused:
        link.get(request_of(welcome), 5.0)
    assert refused.value.code == "internal"
    assert link.status(5.0).ready


def slow_down(service: TeacherService, seconds: float) -> threading.Event:
    """Make `get` wait first; the event is set when it is called."""
    plain, called = service.answering, threading.Event()

    def slow(request: GetBatch) -> Lease[Answer]:
        called.set()
        time.sleep(seconds)
        return plain(request)

    service.answering = slow  # type: ignore[method-assign]
    return called


def test_a_slow_answer_ends_by_the_deadline_and_a_closed_link_at_once(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    link, other = (connect(transport) for transport in [listen(service)] * 2)
    welcome = link.hello(hello_of(service), 5.0)
    other.hello(hello_of(service), 5.0)
    called = slow_down(service, 1.5)
    start = time.monotonic()
    with pytest.raises(LinkError, match=r"no whole answer within 0\.3 s") as failed:
        link.get(request_of(welcome), 0.3)
    assert failed.value.fault == "deadline" and 0.25 < time.monotonic() - start < 1.2
    called.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.get, request_of(welcome), 30.0)
        assert called.wait(5.0)
        time.sleep(0.2)  # the client has its stream by now and waits for the first part
        start = time.monotonic()
        other.close()
        with pytest.raises(LinkError, match="closed") as failed:
            waiting.result(5.0)
    assert failed.value.fault == "closed" and time.monotonic() - start < 0.5
    with pytest.raises(LinkError, match="this link was closed"):
        other.status(1.0)


def test_threads_share_a_link_and_use_its_limit_to_the_full(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    link = connect(listen(service))
    welcome = link.hello(hello_of(service), 5.0)
    wanted = {step: LocalConnection(service).get(request_of(welcome, step), 5.0) for step in range(6)}
    with ThreadPoolExecutor(LIMITS.max_in_flight) as pool:  # never told that too much is in flight: a place is free before the tail comes
        steps = [step for _ in range(10) for step in range(6)]
        answers = list(pool.map(lambda step: link.get(request_of(welcome, step), 20.0), steps))
    assert all(same(answer, wanted[step]) for step, answer in zip(steps, answers, strict=True))


def test_stopping_lets_an_answer_within_the_grace_time_through(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    transport = listen(service)
    link = connect(transport)
    welcome = link.hello(hello_of(service), 5.0)
    called = slow_down(service, 0.6)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(link.get, request_of(welcome), 10.0)
        assert called.wait(5.0)
        start = time.monotonic()
        stopped = pool.submit(transport.stop, 10.0)
        time.sleep(0.1)
        with pytest.raises(FeedError) as refused:
            link.get(request_of(welcome, 1), 5.0)
        assert refused.value.code == "draining"
        assert running.result(10.0).head.answers(request_of(welcome))
        stopped.result(10.0)
    assert 0.4 < time.monotonic() - start < 3.0
    with pytest.raises(LinkError, match="is a teacher server running there") as failed:
        link.status(5.0)
    assert failed.value.fault == "unreachable"


def stalled_stream(transport: FlightTransport, request: GetBatch) -> Any:
    """A client that reads the first part of an answer and then nothing more."""
    from pyarrow import flight

    from m2mkd_ds.teacher.protocol.packing import pack

    stream = flight.FlightClient(f"grpc://{transport.endpoint}").do_get(flight.Ticket(b"get " + pack(request)))
    stream.read_chunk()
    return stream


def drained(stream: Any) -> str:
    """What ends a stream that is read on."""
    from pyarrow import flight

    with pytest.raises(flight.FlightError) as ended:
        stream.read_all()
    return str(ended.value)


def test_stopping_is_bounded_when_a_client_reads_nothing(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    pad_answers(service, 48)
    transport = listen(service)
    stream = stalled_stream(transport, request_of(connect(transport).hello(hello_of(service), 5.0)))
    start = time.monotonic()
    transport.stop(0.3)
    assert time.monotonic() - start < 3.0
    assert "Socket closed" in drained(stream)


def test_a_stopped_server_has_no_thread_left(make_service: MakeService, listen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: FlightTransport) -> None:
        self._hard.wait()
        time.sleep(0.3)

    monkeypatch.setattr(FlightTransport, "_watch", slow)
    before = running()
    transport = listen(make_service())
    assert [thread.name for thread in running() - before] == ["flight stalls"]
    transport.stop(0.0)
    assert not [thread for thread in running() - before if thread.name.startswith("flight ")]


def test_a_client_that_reads_nothing_is_cut_off_and_others_go_on(make_service: MakeService, listen: Any) -> None:
    service = make_service(limits=replace(LIMITS, max_in_flight=1))
    pad_answers(service, 48)
    transport = listen(service, stall_s=0.8)
    link = connect(transport)
    welcome = link.hello(hello_of(service), 5.0)
    stream = stalled_stream(transport, request_of(welcome))
    # the stalled answer is all that this client may have; its memory is in use until it is cut off
    with pytest.raises(FeedError, match="1 answers in flight") as refused:
        link.get(request_of(welcome, 1), 5.0)
    assert refused.value.code == "retry_later" and refused.value.retry_after_s > 0
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        try:
            answer = link.get(request_of(welcome, 1), 5.0)
            break
        except FeedError:
            time.sleep(0.1)
    assert answer.head.answers(request_of(welcome, 1)) and service.wait_idle(1.0)
    assert "Socket closed" in drained(stream)


def test_a_link_finds_a_server_that_came_back(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    first = listen(service)
    link = connect(first)
    link.hello(hello_of(service), 5.0)
    first.stop(0.0)
    with pytest.raises(LinkError, match="Connection refused"):
        link.status(1.0)
    again = FlightTransport(service, first.endpoint, PLAIN)
    again.start()
    try:
        start = time.monotonic()
        while True:
            try:
                link.status(1.0)
                break
            except LinkError:
                assert time.monotonic() - start < 4.0
                time.sleep(0.1)
    finally:
        again.stop(0.0)


def test_an_address_that_is_taken_says_so(make_service: MakeService, listen: Any) -> None:
    transport = listen(make_service())
    with pytest.raises(OSError, match=r"cannot listen on 127\.0\.0\.1:\d+: Address already in use"):
        FlightTransport(make_service(), transport.endpoint, PLAIN).start()


def test_a_forked_child_is_told_at_once_and_ends(make_service: MakeService, listen: Any) -> None:
    service = make_service()
    link = connect(listen(service))
    welcome = link.hello(hello_of(service), 5.0)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            try:
                link.get(request_of(welcome), 5.0)
            except LinkError as err:
                os.write(writer, f"{err.fault} {err}".encode())
            link.close()
            del link  # its destructor must not wait for threads that only the parent has
            os.write(writer, b" and gone")
        finally:
            os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + 5.0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the child hangs")
        time.sleep(0.02)
    told = os.read(reader, 4096).decode()
    os.close(reader)
    assert told.startswith("closed ") and "cannot be used in its forked child" in told and told.endswith(" and gone")
    assert link.get(request_of(welcome), 5.0).head.answers(request_of(welcome))  # the parent goes on
