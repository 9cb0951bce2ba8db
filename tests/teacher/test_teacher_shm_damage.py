"""What a client takes from a server that errs: nothing but whole, sealed, summed answers of the present generation within the limits."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.buffers import Arena, BufferPool
from m2mkd_ds.teacher.protocol.codec import Accept, TensorSpec
from m2mkd_ds.teacher.protocol.packing import pack
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, GetBatch, Hello, Limits, LinkError, Welcome
from m2mkd_ds.teacher.shm import frames
from m2mkd_ds.teacher.shm import socket as shm_socket
from m2mkd_ds.teacher.shm.client import ShmConnection
from m2mkd_ds.teacher.shm.frames import FrameError, Ready
from m2mkd_ds.teacher.shm.segment import HEADER_BYTES, Segment, places, segment_bytes

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=1, world=1)
LIMITS = Limits(max_count=4, max_answer_bytes=10_000, max_in_flight=1, heartbeat_s=1.0)
WELCOME = Welcome(protocol=2, instance="i", plan="p", fingerprints={}, limits=LIMITS)
HELLO = Hello(
    oldest_protocol=2, newest_protocol=2, client="c", rank=0, layout=LAYOUT, pairs=(0,), payload="hidden", wire_dtype="fp32",
    with_teacher=False, fingerprints={},
)  # fmt: skip
GET = GetBatch(
    instance="i", plan="p", client="c", layout=LAYOUT, start=0, pairs=(0,), payload="hidden", wire_dtype="fp32", with_teacher=False,
    attempt=0,
)  # fmt: skip
HEAD = AnswerHead(instance="i", plan="p", start=0, pairs=(0,), payload="hidden", wire_dtype="fp32", with_teacher=False, attempt=0)
TENSORS = {
    "odd": torch.arange(7, dtype=torch.uint8), "none": torch.empty(3, 0, dtype=torch.bfloat16), "one": torch.tensor(2.5),
    "yes": torch.tensor([True, False]), "many": torch.arange(2000, dtype=torch.int32).view(torch.float32).view(40, 50),
}  # fmt: skip

# 7 + 0 + 4 + 2 + 8000 = 8013 bytes

Damage = Callable[[Segment, Ready], tuple[bytes, bytes, tuple[int, ...]]]
"""From a good answer to what is sent: kind, body, descriptors."""


class Scripted:
    """Greets as a server does, and answers every request as `damage` says."""

    def __init__(self, path: str, damage: Damage) -> None:
        self._listener, self._damage = shm_socket.listen(path), damage
        self.acked = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock:
                try:
                    self._lane(sock)
                except OSError:
                    pass  # the client had enough

    def _lane(self, sock: socket.socket) -> None:
        segment = Segment(segment_bytes(Answer(HEAD, TENSORS)))
        try:
            while heard := frames.receive(sock, time.monotonic() + 5, most=65536, rest_s=5.0):
                if heard[0] == frames.HELLO:
                    frames.send(sock, frames.WELCOME, pack(WELCOME), time.monotonic() + 5)
                elif heard[0] == frames.GET:
                    kind, body, fds = self._damage(segment, segment.write(Answer(HEAD, TENSORS)))
                    frames.send(sock, kind, body, time.monotonic() + 5, fds)
                else:
                    self.acked += 1
        finally:
            segment.close()


@pytest.fixture
def taken(tmp_path: Path) -> Iterator[Callable[[Damage], Answer]]:
    """taken(damage, accept) -> the answer that a client makes of it."""
    opened: list[Scripted | ShmConnection] = []

    def take(damage: Damage, accept: Accept | None = None) -> Answer:
        server = Scripted(str(tmp_path / f"{len(opened)}.sock"), damage)
        link = ShmConnection(str(tmp_path / f"{len(opened)}.sock"))
        opened.extend((link, server))
        link.hello(HELLO, 5.0)
        return link.get(GET, 5.0, accept)

    yield take
    for one in opened:
        one.close()


def good(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
    return frames.READY, ready.pack(), (segment.fd,)


def test_tensors_of_every_kind_come_as_they_are(taken: Callable[[Damage], Answer]) -> None:
    answer = taken(good)
    assert answer.head == HEAD and list(answer.tensors) == list(TENSORS)
    for name, tensor in TENSORS.items():
        got = answer.tensors[name]
        assert got.dtype == tensor.dtype and got.shape == tensor.shape
        assert got.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()  # bits: some are no numbers


def flipped(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
    segment._data[HEADER_BYTES + 3] ^= 1
    return good(segment, ready)


def written_again(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
    segment.write(Answer(HEAD, TENSORS))
    return good(segment, ready)


def unsealed(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
    fd = os.memfd_create("another")  # closed with the test's process
    os.pwrite(fd, segment._data.tobytes(), 0)
    return frames.READY, ready.pack(), (fd,)


def smaller(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
    fd = os.memfd_create("another", os.MFD_ALLOW_SEALING)
    os.truncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return frames.READY, ready.pack(), (fd,)


def with_head(change: Callable[[dict[str, list[list[object]]]], object]) -> Damage:
    def damage(segment: Segment, ready: Ready) -> tuple[bytes, bytes, tuple[int, ...]]:
        tree = json.loads(ready.head)
        change(tree)
        return frames.READY, replace(ready, head=json.dumps(tree).encode()).pack(), (segment.fd,)

    return damage


def spec(name: str, dtype: str, size: int) -> dict[str, object]:
    return {"name": name, "dtype": dtype, "shape": [size]}


def with_tail(tail: bytes) -> Damage:
    return lambda segment, ready: (frames.READY, replace(ready, tail=tail).pack(), (segment.fd,))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flipped, "a checksum does not match"),
        (written_again, "holds generation 2, the answer is 1"),
        (unsealed, "no sealed segment of the announced size"),
        (smaller, "no sealed segment of the announced size"),
        (lambda segment, ready: (frames.READY, ready.pack(), ()), "a segment that was never sent"),
        (lambda s, ready: (frames.READY, replace(ready, segment_bytes=2**40).pack(), (s.fd,)), "a segment of 1099511627776 bytes"),
        (with_head(lambda tree: tree["tensors"].append(spec("big", "fp32", 501))), "10017 bytes; at most 10000 were agreed"),
        (with_head(lambda tree: tree["tensors"].append(spec("odd", "uint8", 7))), "the head names a tensor twice"),
        (with_head(lambda tree: tree["tensors"].pop()), "a checksum does not match"),
        (with_head(lambda tree: tree["answer"].update(start=4)), "a checksum does not match"),
        (with_tail(b""), "a checksum does not match"),
        (with_tail(b'{"sums":[],"bytes":8013,"complete":true}'), "a checksum does not match"),
        (lambda segment, ready: (frames.READY, ready.pack()[:19], (segment.fd,)), "an answer of 19 bytes"),
        (lambda segment, ready: (frames.READY, struct.pack(">QQI", 1, 1, 2**31), ()), "a head longer than its message"),
        (lambda segment, ready: (frames.STATE, b"{}", (segment.fd,)), r"kind b'T' where b'R' belongs"),
        (lambda segment, ready: (frames.REFUSED, b'{"code":"novel","message":""}', ()), "a refusal that cannot be read"),
        (lambda segment, ready: (frames.READY, bytes(frames.MAX_READY_BYTES + 1), ()), "262145 bytes; at most 262144 are allowed"),
    ],
)  # fmt: skip
def test_anything_but_the_whole_answer_is_refused_and_leaves_no_descriptor(
    taken: Callable[[Damage], Answer], damage: Damage, told: str
) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(LinkError, match=told) as refused:
        taken(damage)
    assert refused.value.fault == "corrupt"
    end = time.monotonic() + 5
    # What is left: the server's listening socket, and the descriptors that some of the cases make.
    while len(set(os.listdir("/proc/self/fd")) - before) > 1 + (damage in (unsealed, smaller)) and time.monotonic() < end:
        time.sleep(0.01)
    assert len(set(os.listdir("/proc/self/fd")) - before) <= 1 + (damage in (unsealed, smaller))


def test_an_answer_that_nobody_asked_for_gets_no_memory(taken: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[AnswerHead, list[str]]] = []
    lent: list[int] = []
    take = BufferPool.take

    def counted(self: BufferPool, num_bytes: int, wait_s: float) -> Arena:
        lent.append(num_bytes)
        return take(self, num_bytes, wait_s)

    def refuse(head: AnswerHead, specs: Sequence[TensorSpec]) -> None:
        seen.append((head, [spec.name for spec in specs]))
        raise LinkError("corrupt", "odd was not asked for")

    monkeypatch.setattr(BufferPool, "take", counted)
    with pytest.raises(LinkError, match=r"unix:.*sock: odd was not asked for") as refused:
        taken(good, refuse)
    assert refused.value.fault == "corrupt" and seen == [(HEAD, list(TENSORS))] and lent == []
    assert taken(good, lambda head, specs: None).head == HEAD and len(lent) == 1


def test_memory_that_is_not_to_be_had_is_the_fault_of_the_answer(taken: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(self: BufferPool, num_bytes: int, wait_s: float) -> Arena:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(BufferPool, "take", none_left)
    with pytest.raises(LinkError, match="no room for the 8013 bytes that the head announces .*Cannot allocate memory") as refused:
        taken(good)
    assert refused.value.fault == "corrupt"


@given(st.binary(max_size=200))
def test_no_bytes_make_the_readers_fail_otherwise(body: bytes) -> None:
    for read in (Ready.unpack, frames.unpack_error):
        try:
            read(body)
        except FrameError:
            pass


def test_a_client_cannot_write_into_a_segment_nor_anybody_cut_it_short() -> None:
    segment = Segment(segment_bytes(Answer(HEAD, TENSORS)))
    with pytest.raises(PermissionError):
        os.ftruncate(segment.fd, 4096)
    with pytest.raises(PermissionError):
        os.pwrite(segment.fd, b"x", 0)
    segment.close()


def test_places_are_aligned_and_apart() -> None:
    assert places([7, 0, 64, 65]) == ([0, 64, 64, 128], 256)  # 65 takes two lines of 64
