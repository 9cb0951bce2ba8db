"""What a server makes: a trainer's bytes whatever the cache did, each thing once, and an error where a number is not one."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.teacher.counters import Counters
from m2mkd_ds.teacher.numbers import from_wire
from m2mkd_ds.teacher.produce import Producer
from m2mkd_ds.teacher.shared_cache import SharedCache
from m2mkd_ds.teacher.turns import Turns
from m2mkd_ds.teacher.wire import FeedError
from tests.data.tar_files import image_file
from tests.teacher.asking import ALL, asked, assert_same, colocated, counted_parts
from tests.teacher.conftest import make_parts


def with_data(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, data=replace(config.data, **changes))


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_answers_are_a_trainers_bytes_with_and_without_a_cache(tiny_config: RunConfig, tiny_index: ShardIndex, decode: str) -> None:
    config = with_data(tiny_config, decode=decode)
    ours = colocated(config, tiny_index, num_steps=2)
    asking = [(start, pairs) for start in ours for pairs in ((0,), (1,), (2,), ALL, (2, 0))]
    random.Random(3).shuffle(asking)
    one_batch = 4 * 3 * 16 * 16 * 4 + 2 * 4 * 17 * 32 * 4
    evicted = []
    for cache_bytes in (0, 3 * one_batch, 2**30):
        producer = Producer(make_parts(config, tiny_index), cache_bytes=cache_bytes)
        for start, pairs in asking:
            answer = producer.answer(asked(None, start, pairs))
            assert_same(answer.tensors, ours[start], pairs)
            assert answer.num_bytes <= producer.answer_bytes(asked(None, start, pairs)) <= answer.num_bytes + 4 * (40 + 100)
            assert producer.cache_bytes <= cache_bytes
        evicted.append(producer.counters.snapshot()["evicted_batches"])
        producer.close()
    # Without room every answer is forgotten at once; with plenty of it none is.
    assert evicted[0] == len(asking) and 8 < evicted[1] < len(asking) and evicted[2] == 0


def test_clients_of_three_pairs_share_one_decode_one_walk_and_one_run_of_each_teacher(
    tiny_config: RunConfig, tiny_index: ShardIndex
) -> None:
    parts, calls = counted_parts(tiny_config, tiny_index)
    producer = Producer(parts)
    calls.clear()  # of the walk with a black image
    barrier = threading.Barrier(9)

    def client(pair: int) -> dict[str, Tensor]:
        barrier.wait()
        return producer.answer(asked(None, 8, (pair,))).tensors

    with ThreadPoolExecutor(9) as threads:
        answers = list(threads.map(client, [0, 1, 2] * 3))
    # Prefix: stages 0 and 1 once. Suffixes: of pair 0 stages 1 and 2, of pair 1 stage 2.
    assert calls == Counter({"meta 0": 1, "meta 1": 2, "meta 2": 2, "teacher 0": 1, "teacher 1": 1, "teacher 2": 1})
    counts = producer.counters.snapshot()
    # h_0 with the images, h_1 and h_2; each of nine clients asks for images, and for the chain up to its pair.
    assert {level: counts[f"misses_{level}"] for level in ("decode", "prefix", "teacher")} == {"decode": 1, "prefix": 3, "teacher": 3}
    assert counts["hits_teacher"] == 6 and counts["images"] == 9 * 4
    ours = colocated(tiny_config, tiny_index, num_steps=1)[8]
    for pair, tensors in zip([0, 1, 2] * 3, answers, strict=True):
        assert_same(tensors, ours, (pair,))
    # The decoder's own memory, in every answer of pair 0.
    assert len({tensors["image.pixels"].data_ptr() for tensors in answers if "image.pixels" in tensors}) == 1


def test_a_deeper_pair_that_comes_later_goes_on_with_the_chain(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts, calls = counted_parts(tiny_config, tiny_index)
    producer = Producer(parts)
    calls.clear()
    producer.answer(asked(None, pairs=(1,), with_teacher=False))
    assert calls == Counter({"meta 0": 1})
    producer.answer(asked(None, pairs=(2,), with_teacher=False))
    assert calls == Counter({"meta 0": 1, "meta 1": 1})
    producer.answer(asked(None, pairs=(0, 1), with_teacher=False))
    assert calls == Counter({"meta 0": 1, "meta 1": 1})


def test_payloads_compute_and_send_only_what_they_hold(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts, calls = counted_parts(tiny_config, tiny_index)
    producer = Producer(parts)
    calls.clear()
    image = producer.answer(asked(None, payload="image", with_teacher=False))
    assert calls == Counter() and image.tensors.keys() == {"image.pixels", "image.labels", "image.targets"}
    logits = producer.answer(asked(None, payload="logits", pairs=(2,)))
    assert logits.tensors.keys() == {"logits.2"} and calls == Counter({"meta 0": 1, "meta 1": 1, "teacher 2": 1})
    hidden = producer.answer(asked(None, pairs=(2,), with_teacher=False))
    assert hidden.tensors.keys() == {"hidden.2", "targets"}


def test_pairs_at_different_speeds_miss_and_get_the_same(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    """One client is a step ahead of the other, then they meet; the cache holds less than the way between them."""
    ours = colocated(tiny_config, tiny_index, num_steps=3)
    starts = sorted(ours)
    room = 2 * 40_000  # two micro-batches of 12,288 B of images, 17,408 B of hidden states, and small things
    producer = Producer(make_parts(tiny_config, tiny_index), cache_bytes=room)
    for place, start in enumerate(starts):
        assert_same(producer.answer(asked(None, start, (2,))).tensors, ours[start], (2,))
        if place >= 4:
            behind = starts[place - 4]
            assert_same(producer.answer(asked(None, behind, (1,))).tensors, ours[behind], (1,))
        assert producer.cache_bytes <= room
    far = producer.counters.snapshot()
    assert far["misses_decode"] == len(starts) + len(starts) - 4
    assert_same(producer.answer(asked(None, starts[-1], (0,))).tensors, ours[starts[-1]], (0,))
    assert producer.counters.snapshot()["misses_decode"] == far["misses_decode"]  # near again: shared


def test_clients_in_threads_get_their_bytes_while_the_cache_evicts(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    """Five clients walk the same stream from different places, some backwards, with room for two of twelve micro-batches."""
    ours = colocated(tiny_config, tiny_index, num_steps=3)
    starts = sorted(ours)
    producer = Producer(make_parts(tiny_config, tiny_index), cache_bytes=80_000)

    def client(number: int) -> None:
        order = starts[number:] + starts[:number]
        for start in order if number % 2 else reversed(order):
            pairs = (number % 3,) if number < 4 else ALL
            assert_same(producer.answer(asked(None, start, pairs)).tensors, ours[start], pairs)

    with ThreadPoolExecutor(5) as threads:
        list(threads.map(client, range(5)))
    counts = producer.counters.snapshot()
    assert producer.cache_bytes <= 80_000 and counts["evicted_batches"] > 0 and counts["images"] == 5 * 12 * 4


def test_two_layouts_of_one_stream_do_not_meet(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    other = BatchLayout(micro_batch_size=8, accumulation=1, world=2)
    ours, theirs = colocated(tiny_config, tiny_index, 1), colocated(tiny_config, tiny_index, 1, other)
    producer = Producer(make_parts(tiny_config, tiny_index))
    assert_same(producer.answer(asked(None, 8)).tensors, ours[8])
    answer = producer.answer(asked(None, 8, layout=other))
    assert_same(answer.tensors, theirs[8])
    assert len(answer.tensors["targets"]) == 8 and answer.head.step == 0


def spoil(module: nn.Module, change: Callable[[Tensor], None]) -> None:
    """Change a module's output in place from now on."""
    module.register_forward_hook(lambda _module, _inputs, output: change(output))


def nan_in_row_2(output: Tensor) -> None:
    output[2, ..., 0] = float("nan")


def test_an_image_with_a_nan_is_told_by_slot_and_other_pairs_go_on(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    producer = Producer(parts)
    spoil(parts.meta.stages[0], nan_in_row_2)  # runs in the prefixes of pairs 1 and 2 alone
    for pairs in ((1,), (0, 2), (1,)):
        wrong = max(pairs) if 1 not in pairs else 1
        with pytest.raises(FeedError, match=rf"hidden.{wrong} of pair {wrong} is not finite for 1 of 4 images \(slots 10\)") as poisoned:
            producer.answer(asked(None, 8, pairs))
        assert poisoned.value.code == "poisoned" and poisoned.value.slots == (10,)
    with pytest.raises(FeedError, match=r"logits.1 of pair 1 is not finite"):
        producer.answer(asked(None, 8, (1,), payload="logits"))
    assert producer.counters.snapshot()["poisoned"] == 4
    assert_same(producer.answer(asked(None, 8, (0,))).tensors, colocated(tiny_config, tiny_index, 1)[8], (0,))


def test_a_weight_that_is_nan_poisons_the_logits_of_its_pair(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    next(parts.teachers[1].parameters()).data.view(-1)[0] = float("nan")
    producer = Producer(parts)
    with pytest.raises(FeedError, match=r"logits.1 of pair 1 is not finite for 4 of 4 images") as poisoned:
        producer.answer(asked(None, 4, ALL))
    assert poisoned.value.slots == (4, 5, 6, 7)
    assert producer.answer(asked(None, 4, (0, 2))).head.pairs == (0, 2)
    assert producer.answer(asked(None, 4, (1,), with_teacher=False)).tensors["hidden.1"].isfinite().all()


def test_numbers_beyond_fp16_are_refused_with_their_peak_and_slots(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    producer = Producer(parts)

    def large(output: Tensor) -> None:
        output[1, 3, 5] = 65504.0  # the largest that fp16 holds
        output[3, 3, 5] = -70000.0

    spoil(parts.meta.stages[0], large)
    told = r"fp16 ends at 65504, hidden.1 of pair 1 reaches 70000 \(slots 11\); set teacher.wire_dtype to bf16 or fp32"
    with pytest.raises(FeedError, match=told) as refused:
        producer.answer(asked(None, 8, (1,), wire_dtype="fp16"))
    assert refused.value.code == "bad_request" and refused.value.slots == (11,)
    for wire_dtype in ("bf16", "fp32", "int8"):
        answer = producer.answer(asked(None, 8, (1,), wire_dtype=wire_dtype))
        back = from_wire(answer.tensors["hidden.1"], answer.tensors.get("hidden.1.scale"), torch.float32)
        assert abs(float(back[3, 3, 5]) / -70000 - 1) < 0.004 and abs(float(back[1, 3, 5]) / 65504 - 1) < 0.004


def test_errors_reach_only_who_asked_and_are_not_kept(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    producer = Producer(parts)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    hook = parts.teachers[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        producer.answer(asked(None, 0, (2,)))
    assert producer.answer(asked(None, 0, (1,))).head.pairs == (1,)
    hook.remove()
    assert_same(producer.answer(asked(None, 0)).tensors, colocated(tiny_config, tiny_index, 1)[0])


def plain(told: object) -> str:
    """Without the addresses of objects that Pillow puts into its messages."""
    return re.sub(r"0x[0-9a-f]+", "0x", str(told))


def damaged_shards(folder: Path, *, bad: Sequence[int], count: int = 24) -> ShardIndex:
    """Images of 16 pixels, ten classes; those of `bad` end after 40 bytes."""
    samples = [
        (image_file(i, "PNG", (16, 16))[: 40 if i in bad else None], "png", i % 10, f"k{i:02d}") for i in range(count)
    ]  # fmt: skip
    return write_shards(samples, folder, total=count, class_names=tuple("abcdefghij"), source="s", license="MIT", samples_per_shard=6)


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_damaged_images_are_replaced_as_a_loader_does(tiny_config: RunConfig, tmp_path: Path, decode: str) -> None:
    index = damaged_shards(tmp_path / "bad", bad=(3, 4, 17))
    config = with_data(tiny_config, decode=decode)
    ours = colocated(config, index, num_steps=2)
    servers = [Producer(make_parts(config, index)) for _ in range(2)]
    told = set()
    for start, batch in ours.items():
        for producer in servers:
            answer = producer.answer(asked(None, start))
            assert_same(answer.tensors, batch)
            assert plain(answer.head.bad) == plain(batch.bad) and answer.head.fallbacks == batch.fallbacks
            told |= {record.sample for record in answer.head.bad}
    assert len(told) == 3 and all(batch.lost == "" for batch in ours.values())


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_a_lost_batch_is_answered_as_a_loader_does_and_tried_again(tiny_config: RunConfig, tmp_path: Path, decode: str) -> None:
    index = damaged_shards(tmp_path / "all", bad=range(24))
    config = with_data(tiny_config, decode=decode)
    ours = colocated(config, index, num_steps=1)
    producer = Producer(make_parts(config, index))
    for _ in range(2):
        answer = producer.answer(asked(None, 4))
        assert_same(answer.tensors, ours[4])
        assert plain(answer.head.lost) == plain(ours[4].lost) and "nor can any of the" in answer.head.lost
        assert plain(answer.head.bad) == plain(ours[4].bad) and len(answer.head.bad) == 24
        assert answer.tensors["image.pixels"].eq(0).all()
    assert producer.counters.snapshot()["misses_decode"] == 2 and producer.cache_bytes == 0


def test_turns_are_had_in_the_order_of_asking() -> None:
    turns, order = Turns(), []
    started = [threading.Event() for _ in range(8)]

    def client(number: int) -> None:
        started[number].set()
        with turns:
            order.append(number)

    threads = []
    with turns:
        for number in range(8):
            threads.append(threading.Thread(target=client, args=(number,)))
            threads[-1].start()
            started[number].wait()
            while len(turns._waiting) <= number:
                pass
        # Who lets go and asks again at once comes behind them.
        again = threading.Thread(target=client, args=(0,))
        again.start()
    for thread in (*threads, again):
        thread.join(10)
    assert order[:8] == list(range(8)) and order[8] == 0


def test_memory_that_items_share_counts_once() -> None:
    class Held:
        def __init__(self, *tensors: Tensor) -> None:
            self._tensors = tensors

        def tensors(self) -> Sequence[Tensor]:
            return self._tensors

    cache = SharedCache(10_000, Counters())
    images = torch.zeros(1000, dtype=torch.uint8)
    with cache.using("a") as entry:
        entry.get("decode", 0, lambda: Held(images))
        entry.get("prefix", 0, lambda: Held(images, images[10:20]))
        assert cache.num_bytes == 1000
        entry.get("prefix", 1, lambda: Held(torch.zeros(9500, dtype=torch.uint8)))
        assert cache.num_bytes == 10_500  # in use: over the bound, for as long
    assert cache.num_bytes == 0
    with cache.using("a") as entry:
        made = entry.get("decode", 0, lambda: Held(torch.ones(7, dtype=torch.uint8)))
    assert made.tensors()[0].numel() == 7 and cache.num_bytes == 7


def test_a_negative_cache_is_refused(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="cache_bytes is -1"):
        Producer(make_parts(tiny_config, tiny_index), cache_bytes=-1)
