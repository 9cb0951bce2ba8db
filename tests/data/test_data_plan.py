"""Facts of the data plan: exact cover, partition of a step, purity, and one order that must never change."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from m2mkd_ds.data.order import StreamOrder, permutation
from m2mkd_ds.data.plan import BatchLayout, eval_samples, num_eval_batches

layouts = st.builds(BatchLayout, micro_batch_size=st.integers(1, 7), accumulation=st.integers(1, 4), world=st.integers(1, 9))


@given(layout=layouts, num_samples=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_every_epoch_covers_each_sample_exactly_once(layout: BatchLayout, num_samples: int, seed: int) -> None:
    epochs = 3
    order = StreamOrder(seed, [num_samples])
    steps = -(-epochs * num_samples // layout.global_batch)
    stream = [
        order.slot(p).sample
        for step in range(steps)
        for rank in range(layout.world)
        for micro in range(layout.accumulation)
        for p in layout.positions(step, micro, rank)
    ]
    for epoch in range(epochs):
        assert sorted(stream[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(layout=layouts, step=st.integers(0, 10**9))
def test_ranks_and_micro_steps_partition_the_step(layout: BatchLayout, step: int) -> None:
    parts = [
        layout.positions(step, micro, rank)
        for rank in range(layout.world)
        for micro in range(layout.accumulation)
    ]
    flat = [p for part in parts for p in part]
    assert flat == list(range(step * layout.global_batch, (step + 1) * layout.global_batch))
    groups = [layout.group(micro, rank) for rank in range(layout.world) for micro in range(layout.accumulation)]
    assert groups == list(range(layout.world * layout.accumulation))


def test_positions_by_hand() -> None:
    # mb 2, accumulation 3, world 2: G = 12. Step 1 owns 12..23. Rank 1, micro-step 2 is group 1*3 + 2 = 5: 12 + 10 = 22.
    assert BatchLayout(micro_batch_size=2, accumulation=3, world=2).positions(1, 2, 1) == range(22, 24)
    # One rank with accumulation 2 and two ranks with accumulation 1 have the same groups.
    for group in range(2):
        one_rank = BatchLayout(micro_batch_size=4, accumulation=2, world=1).positions(5, group, 0)
        assert one_rank == BatchLayout(micro_batch_size=4, accumulation=1, world=2).positions(5, 0, group)


def test_order_is_pinned() -> None:
    # If this changes, every resumed run and every teacher cache silently sees other images.
    assert permutation(0, 0, 8).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    digest = hashlib.sha256(permutation(7, 3, 1000).astype("<i8").tobytes()).hexdigest()
    assert digest == "5dd4a4a3c0ab66a3fa381d4e13d0177cea3ecf0a2b878010627bba3ea72405a4"


def test_epochs_and_seeds_differ_and_the_order_is_a_pure_function() -> None:
    first = permutation(1, 0, 500)
    assert np.array_equal(first, permutation(1, 0, 500))
    assert not np.array_equal(first, permutation(1, 1, 500))
    assert not np.array_equal(first, permutation(2, 0, 500))


def test_order_of_a_small_set_is_uniform() -> None:
    # 3 samples have 6 orders; 6000 epochs give 1000 of each, standard deviation sqrt(6000 * 1/6 * 5/6) = 28.9; 5 sigma = 145.
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(6000):
        key = tuple(permutation(5, epoch, 3).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 145 for count in counts.values())


def test_sample_order_may_be_asked_in_any_order() -> None:
    order = StreamOrder(3, [10])
    forward = [order.slot(p) for p in range(50)]
    assert [order.slot(p) for p in reversed(range(50))] == forward[::-1]


@given(num_samples=st.integers(0, 100), world=st.integers(1, 9), batch_size=st.integers(1, 8))
def test_evaluation_partitions_the_samples(num_samples: int, world: int, batch_size: int) -> None:
    seen: list[int] = []
    for rank in range(world):
        count = num_eval_batches(rank, batch_size=batch_size, world=world, num_samples=num_samples)
        batches = [eval_samples(b, rank, batch_size=batch_size, world=world, num_samples=num_samples) for b in range(count)]
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        seen += [sample for batch in batches for sample in batch]
    assert sorted(seen) == list(range(num_samples))


def test_impossible_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="accumulation is 0; it must be at least 1"):
        BatchLayout(micro_batch_size=1, accumulation=0, world=1)
    with pytest.raises(ValueError, match="micro_step 0 and rank 2 must lie below accumulation 1 and world 2"):
        BatchLayout(micro_batch_size=1, accumulation=1, world=2).positions(0, 0, 2)
    with pytest.raises(ValueError, match="at least one sample"):
        StreamOrder(0, [0])
