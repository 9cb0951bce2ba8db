"""Receive buffers: used again, never under somebody's hands, bounded in number and bytes."""

from __future__ import annotations

import gc
import threading
import time

import pytest
import torch

from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import BufferPool
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, LinkError

HEAD = AnswerHead(instance="a", plan="b", start=0, pairs=(1,), payload="hidden", wire_dtype="fp32", with_teacher=False, attempt=0)
MIB = 2**20


def parts_of(value: float, numbers: int = 1000) -> list[bytes | memoryview]:
    return list(codec.encode(Answer(HEAD, {"a": torch.full((numbers,), value), "b": torch.full((3,), -value)})).parts())


def receive(pool: BufferPool, value: float, numbers: int = 1000) -> Answer:
    return codec.read(parts_of(value, numbers), max_bytes=64 * MIB, pool=pool)


def address(answer: Answer) -> int:
    return answer.tensors["a"].data_ptr()


def test_a_released_buffer_is_used_again_and_a_held_one_is_not() -> None:
    pool = BufferPool(3, 64 * MIB)
    first, second = receive(pool, 1.0), receive(pool, 2.0)
    assert address(first) != address(second)
    where = address(first)
    first.release()
    assert first.tensors == {}
    third = receive(pool, 3.0)
    assert address(third) == where and pool.num_buffers == 2
    assert second.tensors["a"].eq(2.0).all() and third.tensors["b"].eq(-3.0).all()


@pytest.mark.parametrize("released", [True, False])
def test_whatever_is_still_held_keeps_its_bytes(released: bool) -> None:
    pool = BufferPool(2, 64 * MIB)
    answer = receive(pool, 7.0)
    held = [answer.tensors["a"][10:20], answer.tensors["b"].numpy()[1:], answer.tensors["a"].to("cpu").view(10, 100)]
    where = address(answer)
    if released:
        answer.release()
    del answer
    while held:
        gc.collect()
        other = receive(pool, 8.0)
        assert address(other) != where and pool.num_buffers == 2
        assert [float(abs(kept).max()) for kept in held] == [7.0] * len(held)
        other.release()
        held.pop()
    # nobody is left: one of the next two answers lies there
    assert where in {address(a) for a in [receive(pool, 9.0), receive(pool, 9.0)]}


def test_a_graph_keeps_what_its_backward_pass_needs() -> None:
    pool = BufferPool(1, 64 * MIB)
    answer = receive(pool, 3.0)
    weight = torch.ones(1000, requires_grad=True)
    loss = (answer.tensors["a"] * weight).sum()
    answer.release()
    with pytest.raises(LinkError, match=r"no receive buffer came back within 0\.01 s: all 1 hold answers that are in use"):
        pool.take(100, wait_s=0.01)
    loss.backward()
    assert weight.grad is not None and weight.grad.eq(3.0).all()
    del loss
    pool.take(100, wait_s=5.0)


def test_an_answer_that_is_dropped_gives_its_buffer_back() -> None:
    pool = BufferPool(1, 64 * MIB)
    for value in range(5):
        assert receive(pool, float(value)).tensors["a"][999] == value
    assert pool.num_buffers == 1


def test_a_frame_that_fails_gives_its_buffer_back() -> None:
    pool = BufferPool(1, 64 * MIB)
    parts = parts_of(1.0)
    for _ in range(3):
        with pytest.raises(LinkError, match="checksum"):
            codec.read([*parts[:-2], bytes(12), parts[-1]], max_bytes=MIB, pool=pool)
    assert receive(pool, 2.0).tensors["a"].eq(2.0).all() and pool.num_buffers == 1


def test_number_and_bytes_are_bounded() -> None:
    pool = BufferPool(2, 3 * MIB)
    small = receive(pool, 1.0)  # 4 kB: a buffer of 1 MiB
    assert pool.num_bytes == MIB
    large = receive(pool, 2.0, numbers=MIB // 4 + 1)  # 1 MiB and 4 bytes: 2 MiB
    assert (pool.num_buffers, pool.num_bytes) == (2, 3 * MIB)
    with pytest.raises(LinkError) as late:
        pool.take(1, wait_s=0.0)
    assert late.value.fault == "deadline"
    small.release()
    with pytest.raises(LinkError):  # 1 MiB is idle and too small, and 2 MiB more than may be had beside it
        pool.take(MIB + 1, wait_s=0.0)
    large.release()
    receive(pool, 3.0, numbers=3 * MIB // 4 - 1000)  # takes the place of both
    assert (pool.num_buffers, pool.num_bytes) == (1, 3 * MIB)
    with pytest.raises(LinkError, match="may hold 3145728 together") as never:
        pool.take(3 * MIB + 1)
    assert never.value.fault == "corrupt"
    with pytest.raises(ValueError, match="can hold nothing"):
        BufferPool(0, MIB)


def test_a_small_answer_does_not_take_a_large_buffer() -> None:
    pool = BufferPool(8, 64 * MIB)
    large = receive(pool, 1.0, numbers=2 * MIB)  # 8 MiB
    where = address(large)
    large.release()
    small = receive(pool, 2.0)
    assert address(small) != where and pool.num_buffers == 2
    assert address(receive(pool, 3.0, numbers=MIB + MIB // 2)) == where  # of 6 MiB


def test_who_waits_gets_the_buffer_that_comes_back() -> None:
    pool = BufferPool(2, 64 * MIB)
    lent = [receive(pool, 1.0), receive(pool, 2.0)]
    got: list[float] = []

    def wait(value: float) -> None:
        got.append(float(receive(pool, value).tensors["a"][5]))

    threads = [threading.Thread(target=wait, args=(float(i),)) for i in range(10, 14)]
    for thread in threads:
        thread.start()
    time.sleep(0.1)
    assert got == []
    lent.pop().release()
    for thread in threads:
        thread.join(10.0)
    assert sorted(got) == [10.0, 11.0, 12.0, 13.0] and pool.num_buffers == 2
    assert lent[0].tensors["a"].eq(1.0).all()


def test_threads_never_see_each_others_bytes() -> None:
    pool = BufferPool(3, 64 * MIB)
    wrong: list[float] = []

    def work(value: float) -> None:
        for turn in range(40):
            answer = receive(pool, value + turn, numbers=2000)
            kept = answer.tensors["a"][turn:]
            answer.release()
            time.sleep(0.0005)
            if not kept.eq(value + turn).all():
                wrong.append(value + turn)
            del kept

    threads = [threading.Thread(target=work, args=(1000.0 * i,)) for i in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert wrong == [] and pool.num_buffers <= 3


class Queued:
    """Stands for the device's queue: says when it was waited for."""

    def __init__(self) -> None:
        self.waits = 0

    def synchronize(self) -> None:
        self.waits += 1


def test_a_buffer_is_used_again_only_behind_the_event_of_its_release() -> None:
    pool, event = BufferPool(1, 64 * MIB), Queued()
    receive(pool, 1.0).release(event)
    assert event.waits == 0  # the trainer goes on; the next receiver waits
    receive(pool, 2.0)
    assert event.waits == 1
    receive(pool, 3.0)
    assert event.waits == 1


@pytest.mark.gpu
def test_copies_that_are_only_queued_arrive_whole() -> None:
    pool = BufferPool(1, 512 * MIB, pinned=True)
    busy = torch.randn(8192, 8192, device="cuda")
    moved = []
    for value in range(6):
        answer = receive(pool, float(value), numbers=8 * MIB)
        assert answer.tensors["a"].is_pinned()
        for _ in range(4):
            busy = busy @ busy * 1e-4  # so that the copy waits in the queue while the next answer comes in
        moved.append(answer.tensors["a"].to("cuda", non_blocking=True))
        event = torch.cuda.Event()
        event.record()
        answer.release(event if value % 2 else None)
        del answer
    assert [t.eq(float(value)).all().item() for value, t in enumerate(moved)] == [True] * 6
