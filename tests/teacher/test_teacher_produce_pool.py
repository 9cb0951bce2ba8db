"""Decoding in processes: the same bytes, in parallel, and an error or another worker whatever happens to one."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.teacher.server.decode_pool import DecodeHere, DecodePool
from m2mkd_ds.teacher.server.decode_worker import DecodeError, Worker, _reply
from m2mkd_ds.teacher.server.layout_batches import LayoutBatches, Stream
from m2mkd_ds.teacher.server.produce import Producer
from tests.data.tar_files import image_file
from tests.teacher.asking import LAYOUT, asked, assert_same, colocated
from tests.teacher.conftest import make_parts


def stream_of(config: RunConfig, index: ShardIndex, **changes: object) -> Stream:
    return Stream(index, replace(config.data, **changes), config.seed)


@pytest.fixture
def make_pool(tiny_config: RunConfig, tiny_index: ShardIndex) -> Iterator[Callable[[int], tuple[DecodePool, list[int]]]]:
    """make_pool(workers) -> a pool, and a list that grows with every worker that was replaced; closed after the test."""
    pools: list[DecodePool] = []

    def make(num_workers: int) -> tuple[DecodePool, list[int]]:
        replaced: list[int] = []
        pools.append(
            DecodePool(stream_of(tiny_config, tiny_index, num_workers=num_workers), pin=False, replaced=lambda: replaced.append(1))
        )
        return pools[-1], replaced

    yield make
    for pool in pools:
        pool.close()


def same(one: WorkerBatch, other: WorkerBatch) -> bool:
    assert one.targets_BV is not None and other.targets_BV is not None
    return (
        one.images.equal(other.images) and one.targets_BV.equal(other.targets_BV) and one.labels_B.equal(other.labels_B)
        and one.slot_ids_B.equal(other.slot_ids_B) and (one.step, one.micro_step) == (other.step, other.micro_step)
    )  # fmt: skip


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_workers_make_a_trainers_bytes_for_many_threads_and_keep_no_descriptors(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    ours = colocated(tiny_config, tiny_index, num_steps=3)
    config = replace(tiny_config, data=replace(tiny_config.data, num_workers=2))
    producer = Producer(make_parts(config, tiny_index))
    try:
        pids = producer._decoder.process_ids  # type: ignore[attr-defined]
        descriptors = []
        for attempt in range(2):
            with ThreadPoolExecutor(8) as threads:
                for start, answer in zip(ours, threads.map(lambda start: producer.answer(asked(None, start)), ours), strict=True):
                    assert_same(answer.tensors, ours[start])
                    assert answer.tensors["image.pixels"].equal(ours[start].hidden[0])
            descriptors.append(len(os.listdir("/proc/self/fd")))
            assert producer.cache_bytes > 12 * 12_288, "everything that was decoded is kept"
            assert producer.counters.snapshot()["misses_decode"] == 12 and attempt in (0, 1)
        assert descriptors[1] == descriptors[0] and descriptors[0] < 80  # twelve batches of five tensors would keep sixty
        # With one of two workers frozen at work, the other one serves everybody else.
        os.kill(pids[0], signal.SIGSTOP)
        later = range(48, 48 + 4 * 4, 4)
        with ThreadPoolExecutor(4) as threads:
            asking = [threads.submit(producer.answer, asked(None, start)) for start in later]
            assert wait_for(lambda: sum(future.done() for future in asking) == 3)
            time.sleep(0.3)
            assert sum(future.done() for future in asking) == 3 and producer.counters.snapshot()["replaced_workers"] == 0
            os.kill(pids[0], signal.SIGCONT)
            assert [future.result(30).head.start for future in asking] == [*later]
    finally:
        producer.close()
    assert not any(map(alive, pids))


def test_a_worker_that_dies_or_freezes_at_work_is_replaced(make_pool: Callable[[int], tuple[DecodePool, list[int]]], tiny_config: RunConfig,
                                                           tiny_index: ShardIndex) -> None:  # fmt: skip
    pool, replaced = make_pool(1)
    expected = DecodeHere(stream_of(tiny_config, tiny_index), pin=False).decode(LAYOUT, 1, 0, 1)
    assert same(pool.decode(LAYOUT, 1, 0, 1), expected)
    # Killed while it was idle: the next one who asks does not notice.
    (pid,) = pool.process_ids
    os.kill(pid, signal.SIGKILL)
    assert wait_for(lambda: not alive(pid)) and same(pool.decode(LAYOUT, 1, 0, 1), expected)
    assert replaced == [1] and pool.process_ids != (pid,)
    # Killed while it works: the second try, on another process, gives the batch.
    (pid,) = pool.process_ids
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(1) as thread:
        asked_for = thread.submit(pool.decode, LAYOUT, 1, 0, 1)
        time.sleep(0.3)
        assert not asked_for.done()
        os.kill(pid, signal.SIGKILL)
        assert same(asked_for.result(60), expected)
    assert replaced == [1, 1] and pool.process_ids != (pid,)
    # Frozen: an error in time, and another process for the next one.
    (pid,) = pool.process_ids
    patient = pool._stream
    pool._stream = replace(patient, data=replace(patient.data, io_deadline_s=0.1), slack_s=0.3)
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(DecodeError, match=r"did not answer within 0.5 s"):
        pool.decode(LAYOUT, 1, 0, 1)
    assert wait_for(lambda: not alive(pid)) and replaced == [1, 1, 1]
    pool._stream = patient
    assert same(pool.decode(LAYOUT, 1, 0, 1), expected)
    # An error of ours in a worker is told, and the worker stays.
    (pid,) = pool.process_ids
    with pytest.raises(DecodeError, match=r"failed: ValueError: micro_batch_size is 3 and data.augment.mix_group is 2"):
        pool.decode(BatchLayout(micro_batch_size=3, accumulation=1, world=1), 0, 0, 0)
    assert pool.process_ids == (pid,)
    # A larger micro-batch needs more shared memory.
    large = BatchLayout(micro_batch_size=40, accumulation=1, world=1)
    assert same(pool.decode(large, 0, 0, 0), DecodeHere(stream_of(tiny_config, tiny_index), pin=False).decode(large, 0, 0, 0))
    assert pool.process_ids == (pid,)
    # Closed while one waits for a frozen worker and another one for its turn: both get an error, soon.
    os.kill(pid, signal.SIGSTOP)
    with ThreadPoolExecutor(2) as threads:
        waiting = [threads.submit(pool.decode, LAYOUT, 1, 0, 1) for _ in range(2)]
        time.sleep(0.3)
        began = time.monotonic()
        pool.close()
        assert all(isinstance(future.exception(10), DecodeError) for future in waiting)
        assert time.monotonic() - began < 5
    assert not alive(pid) and replaced == [1, 1, 1]
    with pytest.raises(DecodeError, match="workers were ended"):
        pool.decode(LAYOUT, 0, 0, 0)


def test_a_shard_that_cannot_be_used_leaves_a_worker_as_that(
    tiny_config: RunConfig, tiny_index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def truncated(self: ShardIndex, sample: int) -> tuple[bytes, int, str]:
        raise ShardError("shard-000000.tar: has 5 bytes, the index says 6")

    monkeypatch.setattr(ShardIndex, "read", truncated)
    found, _, _ = _reply(LayoutBatches(stream_of(tiny_config, tiny_index)), (LAYOUT, 0, 0, 0), torch.empty(0, dtype=torch.uint8))
    sent = pickle.loads(pickle.dumps(found))  # as the pipe does
    assert isinstance(sent, ShardError) and str(sent) == "shard-000000.tar: has 5 bytes, the index says 6"


def test_a_worker_tells_of_damage_as_a_loader_does(tiny_config: RunConfig, tmp_path: Path) -> None:
    """decode=fast; three of 160 images are whole, so that some places find one among the 50 after them, and some do not."""
    samples = [
        (image_file(i, "JPEG", (20, 18))[: 60 if i > 2 else None], "jpg", i % 10, f"k{i:03d}") for i in range(160)
    ]  # fmt: skip
    index = write_shards(samples, tmp_path / "s", total=160, class_names=tuple("abcdefghij"), source="s", license="MIT")
    stream = stream_of(tiny_config, index, decode="fast", num_workers=1)
    pool, here = DecodePool(stream, pin=False, replaced=lambda: None), DecodeHere(stream, pin=False)
    lost = 0
    try:
        for step in range(8):
            ours, theirs = (decoder.decode(LAYOUT, step, 1, 0) for decoder in (here, pool))
            assert theirs.images.equal(ours.images) and theirs.images.dtype == torch.uint8
            assert theirs.slot_ids_B.equal(ours.slot_ids_B) and theirs.targets_BV is None
            assert [(b.sample, b.position, b.substitute, b.kind) for b in theirs.bad] == [
                (b.sample, b.position, b.substitute, b.kind) for b in ours.bad
            ]
            assert (theirs.lost is None) == (ours.lost is None) and (theirs.work is None) == (ours.work is None)
            if theirs.lost is not None:
                lost += 1
                assert isinstance(theirs.lost, SampleError) and theirs.lost.kind == "undecodable" and theirs.images.eq(0).all()
            if ours.work is not None and theirs.work is not None:
                for name in ("flip_B", "erase_E6", "shares_G4", "boxes_G4"):
                    one, other = getattr(ours.work, name), getattr(theirs.work, name)
                    assert (one is None) == (other is None) and (one is None or one.equal(other))
                assert ours.work.erase_pixels == theirs.work.erase_pixels
        assert 0 < lost < 8
    finally:
        pool.close()


class Failing:
    """An operation of a policy that fails."""

    def __call__(self, image: Image.Image) -> Image.Image:
        raise ZeroDivisionError("one over none")


def test_an_error_of_augmentation_names_sample_and_slot(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    decoder = DecodeHere(stream_of(tiny_config, tiny_index, decode="fast"), pin=False)
    transform = decoder._batches.of(LAYOUT)._transform
    transform.parts = replace(transform.parts, ops=(Failing(),))  # type: ignore[union-attr]
    with pytest.raises(SampleError, match=r"augmentation failed \(ZeroDivisionError: one over none; .*stream position 4") as caught:
        decoder.decode(LAYOUT, 0, 1, 0)
    assert caught.value.kind == "transform"


def test_a_worker_can_be_killed_while_it_is_forgotten(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    killed = []

    class Killed:
        def kill(self) -> None:
            killed.append(self)

    class Vanishing(Worker):
        @property
        def _process(self) -> Any:  # type: ignore[override]
            """Gone as soon as somebody has looked."""
            return self.left.pop() if self.left else None

        @_process.setter
        def _process(self, process: Any) -> None:
            self.left = [Killed()]

    Vanishing(stream_of(tiny_config, tiny_index)).kill()
    assert len(killed) == 1


def test_only_the_layouts_used_last_are_kept(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    batches = LayoutBatches(stream_of(tiny_config, tiny_index))
    layouts = [BatchLayout(micro_batch_size=4, accumulation=1, world=world) for world in range(1, 8)]
    made = [batches.of(layout) for layout in layouts]
    assert batches.of(layouts[-1]) is made[-1] and batches.of(layouts[0]) is not made[0]
    assert len(batches._made) == 4


def test_no_worker_outlives_a_server_that_is_killed(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    script = f"""
import time
from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.teacher.server.decode_pool import DecodePool
from m2mkd_ds.teacher.server.layout_batches import Stream
if __name__ == "__main__":
    data = DataConfig(num_classes=10, image_size=16, num_workers=1)
    pool = DecodePool(Stream(ShardIndex.load({tiny_config.data.train!r}), data, 0), pin=False, replaced=lambda: None)
    print(*pool.process_ids, flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as server:
        try:
            assert server.stdout is not None
            pids = [int(pid) for pid in server.stdout.readline().split()]
            assert len(pids) == 1 and alive(pids[0])
        finally:
            server.kill()
    assert wait_for(lambda: not any(map(alive, pids)), 40)
