"""The transport through shared memory, server and client in one process: the same bytes, refusals, limits, and nothing left behind."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.packing import pack
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, Answer, FeedError, GetBatch, Golden, Hello, Limits, LinkError
from m2mkd_ds.teacher.server.service import TeacherService
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm.client import ShmConnection
from m2mkd_ds.teacher.shm.segment import SegmentView
from m2mkd_ds.teacher.shm.server import ShmTransport
from tests.left_over import open_files, running
from tests.teacher.conftest import tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=1, world=1)
TWO_AT_A_TIME = Limits(max_count=64, max_answer_bytes=2**20, max_in_flight=2, heartbeat_s=1.0)
ANSWER_BYTES = 4096 + 2**20
"""Of a segment for any answer of the tiny teacher: the header page and one step of 1 MiB."""
MakeService = Callable[..., TeacherService]


@pytest.fixture
def hello(tiny_config: RunConfig, tiny_index: ShardIndex) -> Hello:
    return Hello(
        oldest_protocol=2, newest_protocol=PROTOCOL_VERSION, client="test", rank=0, layout=LAYOUT, pairs=(0, 1, 2), payload="hidden",
        wire_dtype="fp32", with_teacher=True, fingerprints=tiny_fingerprints(tiny_config, tiny_index),
    )  # fmt: skip


def request(service: TeacherService, hello: Hello, step: int, client: str = "test") -> GetBatch:
    return GetBatch(
        instance=service.instance, plan=service.hello(hello).plan, client=client, layout=LAYOUT, start=4 * step, pairs=(0, 1, 2),
        payload="hidden", wire_dtype="fp32", with_teacher=True, attempt=0,
    )  # fmt: skip


@contextmanager
def serving(service: TeacherService, path: Path, **options: object) -> Iterator[ShmTransport]:
    transport = ShmTransport(service, path, **options)  # type: ignore[arg-type]
    transport.start()
    try:
        yield transport
    finally:
        transport.stop(0.0)


@contextmanager
def linked(transport: ShmTransport) -> Iterator[ShmConnection]:
    link = ShmConnection(transport.endpoint)
    try:
        yield link
    finally:
        link.close()


def soon(fact: Callable[[], bool]) -> bool:
    """Whether it becomes true within five seconds."""
    end = time.monotonic() + 5
    while not fact() and time.monotonic() < end:
        time.sleep(0.01)
    return fact()


def same(one: Answer, other: Answer) -> bool:
    equal = [torch.equal(tensor, other.tensors[name]) and tensor.dtype == other.tensors[name].dtype for name, tensor in one.tensors.items()]
    return one.head == other.head and list(one.tensors) == list(other.tensors) and all(equal)


class RawLane:
    """A client without manners: frames by hand on one socket."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(path)

    def say(self, kind: bytes, body: bytes) -> None:
        frames.send(self.sock, kind, body, time.monotonic() + 5)

    def hear(self) -> tuple[bytes, bytes, list[int]] | None:
        return frames.receive(self.sock, time.monotonic() + 5, most=frames.MAX_READY_BYTES, rest_s=5.0, max_fds=1)

    def take(self, wanted: GetBatch) -> tuple[frames.Ready, SegmentView]:
        """Ask, and leave the answer where it is."""
        self.say(frames.GET, pack(wanted))
        heard = self.hear()
        assert heard is not None and heard[0] == frames.READY
        ready = frames.Ready.unpack(heard[1])
        view = SegmentView(heard[2][0], ready.segment_bytes)
        os.close(heard[2][0])
        return ready, view


def test_answers_have_the_bytes_of_a_link_without_transport_and_never_change(
    sharing_service: MakeService, tmp_path: Path, hello: Hello
) -> None:
    service = sharing_service()
    local = LocalConnection(service)
    with serving(service, tmp_path / "t.sock") as transport, linked(transport) as link:
        assert link.hello(hello, 5.0) == local.hello(hello, 5.0) and link.status(5.0) == local.status(5.0)
        golden = Golden(instance=service.instance, pairs=(0, 1, 2))
        assert same(link.golden(golden, 5.0), local.golden(golden, 5.0))
        held = [link.get(request(service, hello, step), 5.0) for step in range(10)]  # all of them at once: none may lie where another does
        assert transport.num_lanes == 1  # and yet by one lane
        assert all(same(answer, local.get(request(service, hello, step), 5.0)) for step, answer in enumerate(held))


def test_several_threads_share_a_link_and_later_ones_reuse_memory(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    local = LocalConnection(service)
    wrong: list[int] = []
    with serving(service, tmp_path / "t.sock") as transport, linked(transport) as link:
        link.hello(hello, 5.0)

        def work(first: int) -> None:
            for step in range(first, first + 30):
                if not same(link.get(wanted[step % 4], 10.0), expected[step % 4]):
                    wrong.append(step)

        wanted = [request(service, hello, step) for step in range(4)]
        expected = [local.get(one, 5.0) for one in wanted]
        work(0)
        before = (open_files(), running())
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        most_lanes = 0
        while any(thread.is_alive() for thread in threads):
            most_lanes = max(most_lanes, transport.num_lanes)
            time.sleep(0.005)
        assert wrong == [] and most_lanes <= 3
        # Two lanes more than before: for each, a thread, and 2 sockets, 2 numbers of the segment with the server, 1 with the client.
        assert len(running() - before[1]) <= 2 and len(open_files() - before[0]) <= 2 * 5
        settled = open_files()
        work(0)
        assert open_files() <= settled and link._pool.num_buffers <= 8


def test_nothing_is_left_after_close_and_stop(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    service.get(request(service, hello, 0))  # opens the shards
    files, threads = open_files(), running()
    with serving(service, tmp_path / "t.sock") as transport:
        assert stat.S_IMODE(os.stat(tmp_path / "t.sock").st_mode) == 0o600
        with linked(transport) as link:
            link.hello(hello, 5.0)
            answer = link.get(request(service, hello, 0), 5.0)
            assert transport.num_bytes == ANSWER_BYTES
        assert soon(lambda: transport.num_lanes == 0) and transport.num_bytes == 0
    assert open_files() <= files and running() <= threads and list(tmp_path.iterdir()) == []
    assert answer.tensors["targets"].sum() == pytest.approx(4.0)  # class probabilities of four images: still there
    with pytest.raises(LinkError, match="nobody listens there") as nobody:
        ShmConnection(transport.endpoint).status(1.0)
    assert nobody.value.fault == "unreachable"


def test_refusals_keep_their_type_and_the_lane(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    wanted = request(service, hello, 0)
    with serving(service, tmp_path / "t.sock") as transport, linked(transport) as link:
        with pytest.raises(FeedError, match="say Hello first"):
            link.get(wanted, 5.0)
        with pytest.raises(FeedError, match="seed: the trainer has 8, the server has 7") as refused:
            link.hello(replace(hello, fingerprints=hello.fingerprints | {"seed": "8"}), 5.0)
        assert refused.value.code == "mismatch"
        link.hello(hello, 5.0)
        with pytest.raises(FeedError) as other:
            link.get(replace(wanted, instance="another"), 5.0)
        assert other.value.code == "mismatch" and transport.num_lanes == 1
        transport.drain()
        with pytest.raises(FeedError) as draining:
            link.get(wanted, 5.0)
        assert draining.value.code == "draining" and link.status(5.0).draining


def test_all_of_a_refusal_arrives() -> None:
    sent = FeedError("poisoned", "x" * 5000, retry_after_s=0.5, slots=(3, 4), endpoints=("unix:/a", "h:1"))
    told = frames.unpack_error(frames.pack_error(sent))
    assert (told.code, str(told), told.retry_after_s) == ("poisoned", "x" * 4096, 0.5)
    assert (told.slots, told.endpoints) == ((3, 4), ("unix:/a", "h:1"))


def test_a_process_of_another_user_is_refused(sharing_service: MakeService, tmp_path: Path) -> None:
    with serving(sharing_service(), tmp_path / "t.sock", peer_uid=lambda sock: os.geteuid() + 1) as transport, linked(transport) as link:
        for _ in range(3):
            with pytest.raises(FeedError, match="serves no other") as refused:
                link.status(5.0)
            assert refused.value.code == "unauthenticated" and transport.num_lanes == 0


def test_a_status_tells_who_asks(sharing_service: MakeService, tmp_path: Path, hello: Hello, monkeypatch: pytest.MonkeyPatch) -> None:
    service, names = sharing_service(), []
    real = service.status
    monkeypatch.setattr(service, "status", lambda client="": names.append(client) or real(client))
    with serving(service, tmp_path / "t.sock") as transport, linked(transport) as link:
        link.status(5.0)
        link.hello(hello, 5.0)
        link.status(5.0)
        raw = RawLane(transport.path)
        for body, told in ((b"n" * 257, "a client's name of 257 characters"), (b"\xff", "no text")):
            raw.say(frames.STATUS, body)
            heard = raw.hear()
            assert heard is not None and heard[0] == frames.REFUSED and told in str(frames.unpack_error(heard[1]))
        assert names == ["", "test"]


def test_connections_are_bounded(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    with serving(service, tmp_path / "t.sock", max_lanes=2) as transport:
        lanes = [RawLane(transport.path) for _ in range(2)]
        for lane in lanes:
            lane.take(request(service, hello, 0))  # both wait for their Ack
        with linked(transport) as link:
            with pytest.raises(FeedError, match="all 2 connections") as refused:
                link.status(5.0)
            assert refused.value.code == "retry_later" and refused.value.retry_after_s > 0
            lanes[0].sock.close()
            assert soon(lambda: transport.num_lanes == 1) and link.status(5.0).ready


def test_a_new_client_gets_the_connection_that_was_idle_longest(sharing_service: MakeService, tmp_path: Path) -> None:
    with serving(sharing_service(), tmp_path / "t.sock", max_lanes=2) as transport:
        lanes = [RawLane(transport.path) for _ in range(2)]
        for lane in reversed(lanes):
            lane.say(frames.STATUS, b"")
            heard = lane.hear()
            assert heard is not None and heard[0] == frames.STATE
            # What a lane says comes before it notes since when it is idle.
            assert soon(lambda: not any(lane.busy for lane in transport._open()))
        with linked(transport) as link:
            assert link.status(5.0).ready and transport.num_lanes == 2
            assert lanes[1].hear() is None  # ended
            lanes[0].say(frames.STATUS, b"")
            heard = lanes[0].hear()
            assert heard is not None and heard[0] == frames.STATE


def test_a_slow_client_holds_its_own_slots_only_and_for_a_limited_time(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service(limits=TWO_AT_A_TIME)
    with serving(service, tmp_path / "t.sock", max_bytes=4 * ANSWER_BYTES, silence_s=1.0) as transport:
        slow = [RawLane(transport.path) for _ in range(3)]
        (ready, view), _ = (lane.take(request(service, hello, 7, "slow")) for lane in slow[:2])
        slow[2].say(frames.GET, pack(request(service, hello, 7, "slow")))
        heard = slow[2].hear()
        assert heard is not None and heard[0] == frames.REFUSED and frames.unpack_error(heard[1]).code == "retry_later"
        before = bytes(view._data)
        with linked(transport) as link:
            link.hello(hello, 5.0)
            for step in range(6):
                link.get(request(service, hello, step), 5.0)
            assert transport.num_bytes == 3 * ANSWER_BYTES
            assert bytes(view._data) == before  # nobody wrote into what the slow one has not taken
            assert soon(lambda: transport.num_bytes == 0)  # everyone was silent for too long, this link too
            assert link.get(request(service, hello, 0), 5.0).head.start == 0  # which opens itself again


def test_a_slot_is_not_written_before_its_ack(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    with serving(service, tmp_path / "t.sock") as transport:
        for kind, body in ((frames.GET, pack(request(service, hello, 1))), (frames.ACK, frames.pack_ack(2)), (frames.ACK, b"")):
            lane = RawLane(transport.path)
            ready, view = lane.take(request(service, hello, 0))
            assert ready.generation == 1
            before = bytes(view._data)
            lane.say(kind, body)
            heard = lane.hear()
            assert heard is not None and heard[0] == frames.REFUSED and frames.unpack_error(heard[1]).code == "bad_request"
            assert lane.hear() is None and bytes(view._data) == before
        assert soon(lambda: transport.num_bytes == 0)


def test_memory_of_idle_lanes_serves_who_asks(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    with serving(service, tmp_path / "t.sock", max_bytes=ANSWER_BYTES) as transport, linked(transport) as one, linked(transport) as two:
        for link in (one, two, one, two):
            link.hello(hello, 5.0)
            assert link.get(request(service, hello, 0), 5.0).head.start == 0
            assert transport.num_bytes == ANSWER_BYTES
        lane = RawLane(transport.path)
        lane.take(request(service, hello, 0, "holds it"))
        with pytest.raises(FeedError, match="shared memory: answers hold 1052672 of 1052672 bytes") as refused:
            one.get(request(service, hello, 0), 5.0)
        assert refused.value.code == "retry_later"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sent=st.one_of(st.binary(max_size=64), st.tuples(st.sampled_from(b"HGBSAX"), st.binary(max_size=200)).map(lambda t: _framed(*t))))
def test_garbage_ends_its_lane_at_most(one_server: ShmTransport, sent: bytes) -> None:
    lane = RawLane(one_server.path)
    lane.sock.settimeout(5)
    try:
        lane.sock.sendall(sent)
        lane.sock.shutdown(socket.SHUT_WR)
        heard = b""
        while part := lane.sock.recv(65536):
            heard += part
    except ConnectionError:
        heard = b""
    finally:
        lane.sock.close()
    assert heard[4:5] in (b"", frames.REFUSED, frames.STATE)  # a status needs no body
    with linked(one_server) as link:
        assert link.status(5.0).ready


def _framed(kind: int, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + bytes([kind]) + body


@pytest.fixture
def one_server(sharing_service: MakeService, tmp_path: Path) -> Iterator[ShmTransport]:
    with serving(sharing_service(), tmp_path / "t.sock") as transport:
        yield transport


def test_an_oversize_length_is_refused_before_it_is_read(one_server: ShmTransport) -> None:
    lane = RawLane(one_server.path)
    lane.sock.sendall((64 * 1024 + 1).to_bytes(4, "big") + frames.STATUS)  # 64 KiB and a byte
    heard = lane.hear()
    assert heard is not None and "65537 bytes; at most 65536" in str(frames.unpack_error(heard[1])) and lane.hear() is None


def test_stop_ends_answers_under_way_with_typed_errors(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    ended: list[str] = []
    with serving(service, tmp_path / "t.sock") as transport, linked(transport) as link:
        link.hello(hello, 5.0)
        wanted = [request(service, hello, step) for step in range(4)]

        def work() -> None:
            try:
                while True:
                    for one in wanted:
                        link.get(one, 5.0)
            except FeedError as err:
                ended.append(err.code)
            except LinkError as err:
                ended.append(err.fault)

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert soon(lambda: transport.num_lanes == 3)
        assert transport.stop(5.0)
        for thread in threads:
            thread.join(5)
        assert len(ended) == 3 and set(ended) <= {"draining", "unreachable"}
        assert transport.num_lanes == 0 and transport.num_bytes == 0 and not (tmp_path / "t.sock").exists()


def test_stop_does_not_wait_for_a_client_that_takes_nothing(sharing_service: MakeService, tmp_path: Path, hello: Hello) -> None:
    service = sharing_service()
    with serving(service, tmp_path / "t.sock") as transport:
        lane = RawLane(transport.path)
        lane.take(request(service, hello, 0))
        begun = time.monotonic()
        assert not transport.stop(0.3)
        assert 0.3 <= time.monotonic() - begun < 2.0 and transport.num_bytes == 0 and lane.hear() is None
