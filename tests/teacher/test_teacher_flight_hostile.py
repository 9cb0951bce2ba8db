"""The network transport among strangers: no certificate, no token, malformed questions, impossible answers, a frozen server."""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import flight

from m2mkd_ds.config import RunConfig, to_dict
from m2mkd_ds.teacher.flight.client import FlightConnection
from m2mkd_ds.teacher.flight.parts import raise_refusal, schema, to_batch
from m2mkd_ds.teacher.flight.security import ClientSecurity, ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.packing import pack
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, FeedError, Hello, LinkError, Welcome
from m2mkd_ds.teacher.server.service import TeacherService
from tests.teacher.conftest import LIMITS
from tests.teacher.flight_tools import LAYOUT, TOKEN, Pki, hello_of, make_pki, request_of

MakeService = Callable[..., TeacherService]
MIB = 2**20


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return make_pki(tmp_path / "pki")


@pytest.fixture
def guarded(make_service: MakeService, pki: Pki) -> Iterator[FlightTransport]:
    """A server that asks for a certificate and a token."""
    transport = FlightTransport(make_service(), "127.0.0.1:0", pki.server())
    transport.start()
    yield transport
    transport.stop(0.0)


@pytest.fixture
def open_server(make_service: MakeService) -> Iterator[FlightTransport]:
    """A server on loopback that asks for nothing."""
    transport = FlightTransport(make_service(), "127.0.0.1:0", ServerSecurity())
    transport.start()
    yield transport
    transport.stop(0.0)


def test_who_shows_the_wrong_things_is_told_which(guarded: FlightTransport, open_server: FlightTransport, pki: Pki, tmp_path: Path) -> None:
    cert, key = pki.issue("trainer")
    other = make_pki(tmp_path / "other")
    table = [
        (guarded, ClientSecurity(token=TOKEN), "the server speaks TLS: give teacher.tls_ca"),
        (guarded, ClientSecurity(pki.ca, token=TOKEN), r"asks for a certificate .*: give teacher\.tls_cert and teacher\.tls_key"),
        (guarded, ClientSecurity(pki.ca, *other.issue("trainer"), token=TOKEN), "the server refused this side's certificate"),
        (guarded, ClientSecurity(other.ca, cert, key, token=TOKEN), "the server's certificate is refused: .*certificate"),
        (open_server, ClientSecurity(pki.ca, cert, key), r"does not speak TLS: start it with --tls-cert"),
    ]
    for transport, security, told in table:
        start = time.monotonic()
        with pytest.raises(LinkError, match=told) as failed:
            FlightConnection(transport.endpoint, security).status(5.0)
        assert failed.value.fault == "untrusted" and "\n" not in str(failed.value) and time.monotonic() - start < 4.0
    named = FlightConnection(f"localhost:{guarded.port}", ClientSecurity(pki.ca, cert, key, token=TOKEN))
    assert named.status(5.0).ready
    names = {"wrong": "x" * 20, "none": ""}
    for token in names.values():
        link = FlightConnection(guarded.endpoint, ClientSecurity(pki.ca, cert, key, token=token))
        with pytest.raises(FeedError, match=r"wrong or no token: give teacher\.token_file") as refused:
            link.status(5.0)
        assert refused.value.code == "unauthenticated"


def test_a_certificate_that_expired_or_names_another_host_is_refused(make_service: MakeService, pki: Pki) -> None:
    good, service = pki.client(), make_service()
    for name, seconds, told in (("elsewhere.example", 3600.0, "IP address mismatch"), ("127.0.0.1", 3.0, "certificate has expired")):
        cert, key = pki.issue("server", name, days=seconds / 86_400)
        issued = time.time()
        transport = FlightTransport(service, "127.0.0.1:0", ServerSecurity(tls_cert=cert, tls_key=key, client_ca=pki.ca))
        transport.start()
        time.sleep(max(0.0, issued + 4.1 - time.time()) if seconds < 60 else 0.0)
        with pytest.raises(LinkError, match=f"the server's certificate is refused: .*{told}") as failed:
            FlightConnection(transport.endpoint, good).status(5.0)
        assert failed.value.fault == "untrusted"
        transport.stop(0.0)


@pytest.mark.parametrize("says", [b"", b"SSH-2.0-OpenSSH_9.6\r\n"], ids=["hangs up", "talks of something else"])
def test_what_hangs_up_before_it_has_proved_anything_is_no_mistake_of_certificates(pki: Pki, says: bytes) -> None:
    """As a port does behind which a server starts or stops; but one that talks without TLS will not learn it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    taken, _ = listener.accept()
                except OSError:
                    return
                with taken:
                    taken.sendall(says)
                    taken.shutdown(socket.SHUT_WR)
                    taken.recv(4096)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(LinkError) as failed:
            FlightConnection(f"127.0.0.1:{listener.getsockname()[1]}", pki.client()).status(5.0)
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5.0)
    assert failed.value.fault == ("untrusted" if says else "unreachable")


def test_after_ten_wrong_tokens_a_host_has_to_wait_unless_it_shows_the_right_one(guarded: FlightTransport, pki: Pki) -> None:
    wrong, right = FlightConnection(guarded.endpoint, pki.client("x" * 20)), FlightConnection(guarded.endpoint, pki.client())
    for _ in range(10):
        assert right.status(5.0).ready
        with pytest.raises(FeedError, match="wrong or no token"):
            wrong.status(5.0)
    with pytest.raises(FeedError, match="10 calls with a wrong token") as refused:
        wrong.status(5.0)
    assert right.status(5.0).ready  # another job of that host
    assert refused.value.code == "unauthenticated" and 30 < refused.value.retry_after_s <= 60


def first_part(client: Any, ticket: bytes) -> bytes:
    return client.do_get(flight.Ticket(ticket)).read_all().column(0).to_numpy().tobytes()  # type: ignore[no-any-return]


def test_malformed_questions_are_refused_before_any_work(open_server: FlightTransport) -> None:
    service = open_server._service
    welcome = FlightConnection(open_server.endpoint, ClientSecurity()).hello(hello_of(service), 5.0)
    good = json.loads(pack(request_of(welcome)))
    service.answering = lambda request: pytest.fail("work was begun")  # type: ignore[method-assign, assignment, misc]
    changes: list[dict[str, Any]] = [
        {"start": -1}, {"start": 2**62}, {"start": 1.5}, {"pairs": []}, {"pairs": list(range(300))}, {"pairs": ["x"]}, {"extra": 1},
        {"payload": "pickle"}, {"client": "c" * 300}, {"layout": {"micro_batch_size": 0, "accumulation": 1, "world": 1}},
    ]  # fmt: skip
    tickets = [b"get " + json.dumps({**good, **change}).encode() for change in changes]
    deep = b"[" * 10_000 + b"]" * 10_000
    odd = [b"", b"get", b"get {", b"put {}", b"golden {}", b"\x80\x04pickle", b"get \xff\xfe", b"get " + deep, b"get " + bytes(5 * MIB)]
    tickets += odd
    client = flight.FlightClient(f"grpc://{open_server.endpoint}")
    for ticket in tickets:
        with pytest.raises(FeedError) as refused:
            raise_refusal(first_part(client, ticket))
        assert refused.value.code == "bad_request", ticket[:80]
        assert "Traceback" not in str(refused.value)
    for name, body in (("drop_all", b""), ("hello", b"{}"), ("hello", deep), ("hello", bytes(5 * MIB)), ("x" * 5000, b"")):
        (result,) = client.do_action(flight.Action(name, body))
        with pytest.raises(FeedError) as refused:
            raise_refusal(result.body.to_pybytes())
        assert refused.value.code == "bad_request" and len(str(refused.value)) < 500
    other_calls: list[Callable[[], Any]] = [
        lambda: list(client.list_flights()), client.list_actions, lambda: client.get_schema(flight.FlightDescriptor.for_path("x")),
        lambda: client.get_flight_info(flight.FlightDescriptor.for_path("x")),
    ]  # fmt: skip
    for call in other_calls:
        with pytest.raises((flight.FlightUnauthorizedError, OSError), match="answers DoGet and DoAction only") as failed:
            call()
        assert "Traceback" not in str(failed.value) and "site-packages" not in str(failed.value)


def fake_answer(megabytes: int) -> codec.Frame:
    import torch

    head = AnswerHead(instance="i", plan="p", start=0, pairs=(1,), payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=0)
    return codec.encode(Answer(head, {"hidden.1": torch.zeros(megabytes * MIB, dtype=torch.uint8)}))


class Impostor(flight.FlightServerBase):  # type: ignore[misc]
    """Says that it grants 8 MiB, then sends whatever it was given, and counts the parts that it got rid of."""

    def __init__(self, parts: Callable[[], Iterator[Any]], form: Any = None) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.parts, self.form, self.sent = parts, form or schema(), 0

    def do_action(self, context: Any, action: Any) -> list[bytes]:
        limits = {**LIMITS.__dict__, "max_answer_bytes": 8 * MIB}
        return [pack(Welcome(protocol=2, instance="i", plan="p", fingerprints={}, limits=type(LIMITS)(**limits)))]

    def do_get(self, context: Any, ticket: Any) -> Any:
        def counted() -> Iterator[Any]:
            for part in self.parts():
                self.sent += 1
                yield part

        return flight.GeneratorStream(self.form, counted())


def endless(frame: codec.Frame) -> Iterator[Any]:
    yield to_batch(frame.head)
    while True:
        yield to_batch(bytes(2 * MIB))


def empty_parts(frame: codec.Frame) -> Iterator[Any]:
    yield to_batch(frame.head)
    while True:
        yield pa.RecordBatch.from_arrays([pa.array([], pa.uint8())], schema=schema())


def whole(frame: codec.Frame, upto: int | None = None) -> Iterator[Any]:
    yield from (to_batch(part) for part in list(frame.parts())[:upto])


HELLO = Hello(
    oldest_protocol=2, newest_protocol=2, client="test", rank=0, layout=LAYOUT, pairs=(1,), payload="hidden", wire_dtype="fp32",
    with_teacher=True, fingerprints={},
)  # fmt: skip
FLOATS = pa.schema([pa.field("part", pa.float64())])
IMPOSSIBLE: list[tuple[str, Callable[[], Iterator[Any]], str]] = [
    ("head announces too much", lambda: whole(fake_answer(9)), "announces 9437184 bytes"),
    ("more pieces than announced", lambda: endless(fake_answer(4)), "announced"),
    ("empty pieces", lambda: empty_parts(fake_answer(4)), "an empty part"),
    ("one huge part", lambda: iter([to_batch(fake_answer(1).head), to_batch(bytes(64 * MIB))]), "larger than a server of ours sends"),
    ("no tail", lambda: whole(fake_answer(4), -1), "ended|tail"),
    ("head alone", lambda: whole(fake_answer(4), 1), "the answer ended after its head"),
    ("nothing", lambda: iter([]), "an empty stream"),
    ("no head", lambda: iter([to_batch(b"\x80\x04.")]), "the head"),
    ("a broken refusal", lambda: iter([to_batch(b'{"refused":{"code":"run this"}}')]), "a refusal that cannot be read"),
]


@pytest.mark.parametrize(("what", "parts", "told"), IMPOSSIBLE, ids=[row[0] for row in IMPOSSIBLE])
def test_an_impossible_answer_is_dropped_with_fixed_memory(what: str, parts: Callable[[], Iterator[Any]], told: str) -> None:
    with Impostor(parts) as impostor:
        link = FlightConnection(f"127.0.0.1:{impostor.port}", ClientSecurity())
        welcome = link.hello(HELLO, 5.0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(LinkError, match=told) as failed:
            link.get(request_of(welcome), 10.0)
        assert failed.value.fault == "corrupt" and str(failed.value).startswith(link.endpoint)
        assert impostor.sent < (5000 if what == "empty pieces" else 40)  # windows and sockets are full, then the stream is gone
        sent = impostor.sent
        time.sleep(0.1 if "pieces" in what else 0.0)
        assert impostor.sent <= sent + 5
        if what != "one huge part":  # there the server's own copy counts: it lives in this process
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_an_answer_that_nobody_asked_for_gets_no_memory() -> None:
    seen: list[tuple[int, list[str]]] = []

    def refuse(head: AnswerHead, specs: Sequence[codec.TensorSpec]) -> None:
        seen.append((head.start, [spec.name for spec in specs]))
        raise LinkError("corrupt", "hidden.1 is uint8 [4194304]")

    with Impostor(lambda: whole(fake_answer(4))) as impostor:
        link = FlightConnection(f"127.0.0.1:{impostor.port}", ClientSecurity())
        welcome = link.hello(HELLO, 5.0)
        with pytest.raises(LinkError, match="127.0.0.1:.*: hidden.1 is uint8") as failed:
            link.get(request_of(welcome), 5.0, refuse)
        assert failed.value.fault == "corrupt" and seen == [(0, ["hidden.1"])] and link._pool.num_buffers == 0
        link.get(request_of(welcome), 5.0, lambda head, specs: None)
        assert link._pool.num_buffers == 1


def test_a_stream_of_another_form_is_refused() -> None:
    batch = pa.RecordBatch.from_arrays([pa.array([1.0])], schema=FLOATS)
    with Impostor(lambda: iter([batch]), FLOATS) as impostor:
        link = FlightConnection(f"127.0.0.1:{impostor.port}", ClientSecurity())
        welcome = link.hello(HELLO, 5.0)
        with pytest.raises(LinkError, match="another form than ours") as failed:
            link.get(request_of(welcome), 5.0)
        assert failed.value.fault == "corrupt"


@pytest.fixture
def process(pki: Pki, tiny_config: RunConfig, repo_root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A guarded server in a process of its own, whose answers have 48 MiB; and its endpoint."""
    pki.server()
    (pki.folder / "token").touch(0o600)
    (pki.folder / "token").write_text(TOKEN)
    (pki.folder / "config.json").write_text(json.dumps(to_dict(tiny_config)))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repo_root), str(repo_root / "kernels")]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.teacher.flight_process", str(pki.folder)], cwd=repo_root, env=env, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout and select.select([server.stdout], [], [], 60.0)[0], "the server does not start"
        yield server, server.stdout.readline().strip()
    finally:
        server.send_signal(signal.SIGCONT)
        server.communicate(timeout=20.0)  # closes its input
        assert server.returncode == 0


def peak_rise_mib(server: subprocess.Popen[str], act: Callable[[], Any]) -> float:
    """How much the process's peak memory rises above its present memory while `act` runs."""

    def read(field: str) -> int:
        lines = Path(f"/proc/{server.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    before = read("VmRSS")
    act()
    return (read("VmHWM") - before) / 1024


def test_a_server_keeps_its_memory_and_a_frozen_one_does_not_hold_its_clients(
    process: tuple[subprocess.Popen[str], str], pki: Pki, make_service: MakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, endpoint = process
    body = bytes(300 * MIB)

    def put(client: Any) -> None:
        writer, _ = client.do_put(flight.FlightDescriptor.for_path("x"), schema())
        for _ in range(20):
            writer.write_batch(to_batch(body[: 15 * MIB]))
        writer.close()

    def stranger(call: Callable[[Any], Any]) -> None:
        client = flight.FlightClient(f"grpc+tls://{endpoint}", tls_root_certs=Path(pki.ca).read_bytes())
        with pytest.raises(flight.FlightUnavailableError):
            call(client)

    # 1. without a certificate: nothing of 300 MB arrives, however it is sent
    assert peak_rise_mib(server, lambda: stranger(put)) < 16
    assert peak_rise_mib(server, lambda: stranger(lambda client: list(client.do_action(flight.Action("hello", body))))) < 16
    assert peak_rise_mib(server, lambda: stranger(lambda client: client.do_get(flight.Ticket(body)))) < 16

    # 2. with a certificate and any token: uploading is refused at once
    def friend() -> None:
        keys = pki.client().load()
        tls = {"tls_root_certs": keys.authority, "cert_chain": keys.cert, "private_key": keys.key}
        with pytest.raises((flight.FlightError, pa.ArrowException)):
            put(flight.FlightClient(f"grpc+tls://{endpoint}", **tls))

    assert peak_rise_mib(server, friend) < 40  # one batch of 15 MB, and what gRPC reads ahead

    # 3. frozen in mid-stream: the deadline holds; after it goes on, the late answer is nobody's
    link = FlightConnection(endpoint, pki.client())
    welcome = link.hello(hello_of(make_service()), 20.0)
    first = link.get(request_of(welcome), 20.0)
    assert np.array_equal(first.tensors["padding"].numpy(), np.arange(48 * MIB // 8))
    real = codec.FrameReader.head

    def freeze(reader: codec.FrameReader, part: bytes) -> AnswerHead:
        server.send_signal(signal.SIGSTOP)
        return real(reader, part)

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(codec.FrameReader, "head", freeze)
        with pytest.raises(LinkError, match=r"no whole answer within 1\.5 s") as failed:
            link.get(request_of(welcome, 1), 1.5)
    assert failed.value.fault == "deadline" and 1.0 < time.monotonic() - start < 3.0
    for call in (lambda: link.status(0.5), lambda: FlightConnection(endpoint, pki.client()).status(0.5)):  # an old link and a new one
        start = time.monotonic()
        with pytest.raises(LinkError) as failed:
            call()
        assert failed.value.fault == "deadline" and time.monotonic() - start < 2.0
    server.send_signal(signal.SIGCONT)
    again = request_of(welcome, 2, attempt=1)
    assert link.get(again, 20.0).head.answers(again)
