"""Properties of the order of samples, each against a plain loop: exact cover, windows, resume at any cluster shape, substitutes.

Shard sizes include 0 and 1; the cluster shapes run from 1 to 9 ranks. Layout arithmetic by hand is in test_data_plan.py.
"""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.data.distributed_sampler import RepeatAugSampler

from m2mkd_ds.data.order import DeitOrder, Slot, StreamOrder, block_permutation, permutation
from m2mkd_ds.data.plan import BatchLayout, StreamState

Mode = Literal["global", "block"]
MODES: tuple[Mode, ...] = ("global", "block")

# Seldom more than 60 samples; empty shards and shards of one sample are drawn on purpose.
shard_sizes = st.lists(st.one_of(st.sampled_from([0, 1]), st.integers(0, 12)), min_size=1, max_size=10).filter(any)
seeds = st.integers(0, 2**64)  # the last one is beyond what a word holds
layouts = st.builds(BatchLayout, micro_batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), world=st.integers(1, 9))


@dataclass(frozen=True)
class Stream:
    """What makes an order; `make` gives a fresh one, as a process that has just started has it."""

    seed: int
    sizes: list[int]
    mode: Mode
    window: int
    repeats: int

    def make(self) -> StreamOrder:
        return StreamOrder(self.seed, self.sizes, mode=self.mode, window=self.window, repeats=self.repeats)


streams = st.builds(
    Stream, seed=seeds, sizes=shard_sizes, mode=st.sampled_from(MODES), window=st.integers(1, 12), repeats=st.integers(1, 3)
)


def shard_of_each_sample(sizes: list[int]) -> list[int]:
    return [shard for shard, size in enumerate(sizes) for _ in range(size)]


def steps_of(order: StreamOrder, layout: BatchLayout, steps: range) -> list[Slot]:
    """What all ranks and micro-steps of these steps get, in the order of the stream."""
    return [
        order.slot(position)
        for step in steps
        for rank in range(layout.world)
        for micro_step in range(layout.accumulation)
        for position in layout.positions(step, micro_step, rank)
    ]


@given(stream=streams, epoch=st.integers(0, 3))
def test_an_epoch_uses_every_sample_as_often_as_repeats_says(stream: Stream, epoch: int) -> None:
    order, num_samples = stream.make(), sum(stream.sizes)
    assert order.epoch_length == num_samples * stream.repeats
    slots = [order.slot(p) for p in range(epoch * order.epoch_length, (epoch + 1) * order.epoch_length)]
    assert Counter(slot.sample for slot in slots) == {sample: stream.repeats for sample in range(num_samples)}
    assert {slot.epoch for slot in slots} == {epoch}
    # The uses of a sample follow one another and are numbered.
    assert [slot.repeat for slot in slots] == list(range(stream.repeats)) * num_samples
    assert all(slots[i].sample == slots[i - i % stream.repeats].sample for i in range(len(slots)))


@given(stream=streams, layout=layouts, other=layouts)
def test_the_stream_is_one_list_for_every_cluster_shape(stream: Stream, layout: BatchLayout, other: BatchLayout) -> None:
    reference = [stream.make().slot(p) for p in range(2 * sum(stream.sizes))]
    for shape in (layout, other):
        got = steps_of(stream.make(), shape, range(-(-len(reference) // shape.global_batch)))
        assert got[: len(reference)] == reference


@given(stream=streams)
def test_every_position_has_a_slot_of_its_own(stream: Stream) -> None:
    # Slots key augmentation: two equal ones would be the same pixels twice.
    order = stream.make()
    slots = [order.slot(p) for p in range(3 * order.epoch_length)]
    assert len(set(slots)) == len(slots)


@given(seed=seeds, epoch=st.integers(0, 10**6), sizes=shard_sizes, window=st.integers(1, 12))
def test_block_order_uses_up_a_window_of_shards_before_the_next(seed: int, epoch: int, sizes: list[int], window: int) -> None:
    order = block_permutation(seed, epoch, sizes, window).tolist()
    assert sorted(order) == list(range(sum(sizes)))
    shard_of = shard_of_each_sample(sizes)
    # Empty shards take part in the windows and cannot be seen, so what is left are runs of shards that never come back,
    # and no run of samples may need more than `window` shards between two moments at which all begun shards are used up.
    left = dict(enumerate(sizes))
    begun: set[int] = set()
    together: set[int] = set()
    for sample in order:
        shard = shard_of[sample]
        begun.add(shard)
        together.add(shard)
        left[shard] -= 1
        assert len(together) <= window
        if all(left[s] == 0 for s in begun):
            together = set()


@given(seed=seeds, epoch=st.integers(0, 10**6), num_shards=st.integers(1, 12), size=st.integers(1, 5), window=st.integers(1, 12))
def test_block_order_by_a_plain_loop(seed: int, epoch: int, num_shards: int, size: int, window: int) -> None:
    """Shards and samples ranked by Philox words, drawn here one by one from numpy's documented bit stream."""

    def words(block: int, count: int) -> list[int]:
        stream = np.random.Philox(key=np.array([seed % 2**64, epoch], dtype=np.uint64), counter=[0, 0, 0, block])
        return [int(stream.random_raw()) for _ in range(count)]

    shard_words, sample_words = words(1, num_shards), words(0, num_shards * size)
    shards = sorted(range(num_shards), key=lambda shard: shard_words[shard])
    expected = []
    for first in range(0, num_shards, window):
        inside = [shard * size + i for shard in shards[first : first + window] for i in range(size)]
        expected += sorted(inside, key=lambda sample: sample_words[sample])
    assert block_permutation(seed, epoch, [size] * num_shards, window).tolist() == expected


@given(seed=seeds, epoch=st.integers(0, 10**6), sizes=shard_sizes)
def test_a_window_over_all_shards_is_the_global_order(seed: int, epoch: int, sizes: list[int]) -> None:
    assert block_permutation(seed, epoch, sizes, len(sizes)).tolist() == permutation(seed, epoch, sum(sizes)).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_differ(mode: Mode) -> None:
    def samples(seed: int, epoch: int) -> list[int]:
        order = StreamOrder(seed, [40] * 10, mode=mode, window=3)
        return [order.slot(p).sample for p in range(400 * epoch, 400 * (epoch + 1))]

    lists = [samples(seed, epoch) for seed in (0, 1, 2**63) for epoch in (0, 1, 2)]
    # 400! orders: two equal ones are a fault. Equal places are rare as well (one in 400 on average, some more inside windows).
    for i, one in enumerate(lists):
        for two in lists[:i]:
            assert sum(a == b for a, b in zip(one, two, strict=True)) < 40


def test_the_block_order_is_pinned() -> None:
    # If this changes, every resumed run silently sees other images.
    assert block_permutation(0, 0, [3, 0, 1, 4, 2], 2).tolist() == [9, 8, 3, 0, 2, 1, 5, 4, 6, 7]
    digest = hashlib.sha256(block_permutation(7, 3, [10, 0, 1, 50, 939], 2).astype("<i8").tobytes()).hexdigest()
    assert digest == "80eec446714a16842c02ddbeccfbb6bbcb21d39e52e556032add1ba227bedf07"
    many = hashlib.sha256(block_permutation(2**63 + 5, 11, [100] * 64, 16).astype("<i8").tobytes()).hexdigest()
    assert many == "ac70a87737a1a373b20d0541bc6e916294bd7398b51a284016a3cf2c3e5c229f"


@settings(max_examples=40, deadline=None)
@given(
    stream=streams,
    shapes=st.tuples(*[st.tuples(st.integers(1, 4), st.integers(1, 3))] * 3),
    cuts=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_a_run_resumed_on_4_then_2_then_8_ranks_sees_the_uninterrupted_stream(
    stream: Stream, shapes: tuple[tuple[int, int], ...], cuts: tuple[int, int]
) -> None:
    seen: list[Slot] = []
    step, state = 0, StreamState(seed=stream.seed, fingerprint="f", order="o", position=0)
    for world, (micro_batch_size, accumulation), steps in zip((4, 2, 8), shapes, (*cuts, 2), strict=True):
        plain = BatchLayout(micro_batch_size=micro_batch_size, accumulation=accumulation, world=world)
        # The global batch may be another one: step numbers go on, positions too.
        layout = BatchLayout(
            micro_batch_size=micro_batch_size,
            accumulation=accumulation,
            world=world,
            origin=state.position - step * plain.global_batch,
        )
        seen += steps_of(stream.make(), layout, range(step, step + steps))
        step += steps
        state = StreamState(seed=stream.seed, fingerprint="f", order="o", position=state.position + steps * layout.global_batch)
    whole = stream.make()
    assert seen == [whole.slot(p) for p in range(state.position)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("repeats", [1, 3])
def test_a_run_stopped_at_any_step_goes_on_with_the_next_sample(mode: Mode, repeats: int) -> None:
    stream = Stream(5, [4, 0, 1, 7, 3], mode, 2, repeats)
    old, steps = BatchLayout(micro_batch_size=2, accumulation=1, world=4), 3 * 15 * repeats // 8 + 1
    whole = steps_of(stream.make(), old, range(steps))
    for k in range(steps + 1):
        before = steps_of(stream.make(), old, range(k))
        # 4 ranks -> 2 ranks with the same global batch, then 8 ranks.
        same = BatchLayout(micro_batch_size=2, accumulation=2, world=2)
        assert before + steps_of(stream.make(), same, range(k, steps)) == whole
        eight = BatchLayout(micro_batch_size=1, accumulation=1, world=8)
        assert before + steps_of(stream.make(), eight, range(k, steps)) == whole
        # Another global batch (3 images on one rank): the origin says where its step k begins.
        three = BatchLayout(micro_batch_size=3, accumulation=1, world=1, origin=8 * k - 3 * k)
        rest = steps_of(stream.make(), three, range(k, k + -(-8 * (steps - k) // 3)))
        assert (before + rest)[: len(whole)] == whole


@given(stream=streams, data=st.data())
def test_substitutes_are_all_other_samples_once_from_the_next_on(stream: Stream, data: st.DataObject) -> None:
    order = stream.make()
    position = data.draw(st.integers(0, 3 * order.epoch_length - 1))
    epoch = position // order.epoch_length
    first = epoch * order.epoch_length
    of_epoch = [order.slot(p).sample for p in range(first, first + order.epoch_length)]
    damaged = order.slot(position).sample
    expected: list[int] = []
    for sample in [*of_epoch[position - first :], *of_epoch[: position - first]]:
        if sample != damaged and sample not in expected:
            expected.append(sample)
    assert list(order.substitutes(position)) == expected
    assert sorted([*expected, damaged]) == list(range(sum(stream.sizes)))
    assert list(stream.make().substitutes(position)) == expected


@given(stream=streams, data=st.data())
def test_shards_ahead_are_those_of_the_rest_of_the_epoch_by_first_need(stream: Stream, data: st.DataObject) -> None:
    order, shard_of = stream.make(), shard_of_each_sample(stream.sizes)
    position = data.draw(st.integers(0, 3 * order.epoch_length - 1))
    expected: list[int] = []
    for p in range(position, (position // order.epoch_length + 1) * order.epoch_length):
        shard = shard_of[order.slot(p).sample]
        if shard not in expected:
            expected.append(shard)
    assert list(order.shards_ahead(position)) == expected


@given(stream=streams, places=st.lists(st.floats(0, 5), min_size=1, max_size=12))
def test_an_order_answers_alike_whatever_was_asked_before(stream: Stream, places: list[float]) -> None:
    # Only two epochs are kept: going back and forth between five must not matter.
    order = stream.make()
    for place in places:
        position = int(place * order.epoch_length)
        assert order.slot(position) == stream.make().slot(position)


@pytest.mark.parametrize("mode", MODES)
def test_an_order_keeps_few_epochs_in_memory(mode: Mode) -> None:
    order = StreamOrder(1, [1000] * 20, mode=mode)
    tracemalloc.start()
    for epoch in range(12):
        order.slot(epoch * order.epoch_length)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A list of 20,000 int64 has 160,000 bytes: two of them and small change, not twelve.
    assert 320_000 <= kept < 480_000


deit_layouts = st.builds(BatchLayout, micro_batch_size=st.integers(1, 5), accumulation=st.integers(1, 3), world=st.integers(1, 4))


@settings(max_examples=25, deadline=None)
@given(layout=deit_layouts, num_samples=st.integers(256, 700), repeats=st.integers(2, 4), epoch=st.integers(0, 2))
def test_deit_order_gives_each_rank_the_indices_of_timms_sampler(layout: BatchLayout, num_samples: int, repeats: int, epoch: int) -> None:
    order = DeitOrder(0, [num_samples], layout=layout, repeats=repeats)
    for rank in range(layout.world):
        sampler = RepeatAugSampler(range(num_samples), num_replicas=layout.world, rank=rank, num_repeats=repeats)
        expected: list[int] = []
        for number in range(epoch + 1):
            sampler.set_epoch(number)
            expected += [int(sample) for sample in sampler]
        steps = -(-len(expected) // (layout.micro_batch_size * layout.accumulation))
        micro_steps = [(step, micro_step) for step in range(steps) for micro_step in range(layout.accumulation)]
        got = [order.slot(p).sample for step, micro_step in micro_steps for p in layout.positions(step, micro_step, rank)]
        assert got[: len(expected)] == expected


@settings(max_examples=25, deadline=None)
@given(layout=deit_layouts, sizes=shard_sizes, repeats=st.integers(2, 3))
@example(layout=BatchLayout(micro_batch_size=1, accumulation=1, world=4), sizes=[1], repeats=2)  # the padding goes round twice
def test_deit_slots_are_unique_and_substitutes_are_others(layout: BatchLayout, sizes: list[int], repeats: int) -> None:
    order = DeitOrder(3, sizes, layout=layout, repeats=repeats)
    # Ranks leave an epoch within a step, so look at whole steps.
    count = 3 * order.epoch_length // layout.global_batch * layout.global_batch
    slots = [order.slot(p) for p in range(count)]
    assert len(set(slots)) == len(slots)
    for position in range(0, count, 7):
        others = list(order.substitutes(position))
        assert order.slot(position).sample not in others and len(set(others)) == len(others)


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(ValueError, match="window is 0 and repeats is 1; both must be at least 1"):
        StreamOrder(0, [3], mode="block", window=0)
    with pytest.raises(ValueError, match="window is 16 and repeats is 0"):
        StreamOrder(0, [3], repeats=0)
    with pytest.raises(ValueError, match="needs at least one sample"):
        StreamOrder(0, [0, 0], mode="block")
    with pytest.raises(ValueError, match="seed -1 and epoch 0 must not be negative"):
        block_permutation(-1, 0, [3], 1)
    moved = BatchLayout(micro_batch_size=1, accumulation=1, world=2, origin=4)
    with pytest.raises(ValueError, match="belongs to one global batch, but step 0 of this run lies at position 4"):
        DeitOrder(0, [300], layout=moved, repeats=3)
