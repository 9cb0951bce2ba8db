"""Facts of repeated augmentation: `deit` gives the indices of timm's sampler, `stream` covers exactly and resumes anywhere."""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.data.distributed_sampler import RepeatAugSampler

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.data.order import DeitOrder, StreamOrder, make_order
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png

SHIFTED = AugmentConfig(crop_scale=(1.0, 1.0), repeats=3)


@pytest.mark.parametrize("num_samples", [1, 7, 100, 255, 256, 257, 1000])
@pytest.mark.parametrize(("micro_batch", "accumulation", "world"), [(4, 1, 1), (5, 2, 3), (2, 1, 4), (1, 3, 2)])
@pytest.mark.parametrize("repeats", [2, 3])
def test_deit_gives_every_rank_the_indices_of_timms_sampler(
    num_samples: int, micro_batch: int, accumulation: int, world: int, repeats: int
) -> None:
    layout = BatchLayout(micro_batch_size=micro_batch, accumulation=accumulation, world=world)
    data = DataConfig(augment=AugmentConfig(repeats=repeats, repeat_mode="deit"))
    order = make_order(data, 0, [num_samples], layout)
    assert isinstance(order, DeitOrder)
    for rank in range(world):
        sampler = RepeatAugSampler(range(num_samples), num_replicas=world, rank=rank, num_repeats=repeats)
        expected: list[int] = []
        for epoch in range(3):
            sampler.set_epoch(epoch)
            expected += list(sampler)
        positions = (p for step in range(10**6) for micro in range(accumulation) for p in layout.positions(step, micro, rank))
        assert [order.slot(p).sample for p in islice(positions, len(expected))] == expected


def tiny(folder: Path) -> ShardIndex:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    samples = [(encode_png(pixels + 20 * i), "png", i, f"k{i}") for i in range(7)]
    return write_shards(samples, folder, total=7, class_names=tuple("abcdefg"), source="s", license="MIT")


def loader(index: ShardIndex, augment: AugmentConfig, *, start: int = 0, steps: int = 11, mb: int = 4, rank: int = 0, world: int = 1,
           origin: int = 0) -> list[ImageBatch]:  # fmt: skip
    data = DataConfig(num_classes=7, image_size=16, num_workers=0, augment=augment)
    return list(TrainLoader(index, data, seed=2, micro_batch_size=mb, accumulation=1, rank=rank, world=world, start_step=start,
                            total_steps=steps, origin=origin))  # fmt: skip


def test_a_stream_epoch_holds_every_sample_as_often_as_it_is_repeated(tmp_path: Path) -> None:
    batches = loader(tiny(tmp_path / "x"), SHIFTED, steps=21, mb=2)  # 42 positions: two epochs of 3 * 7
    labels = torch.cat([batch.labels_B for batch in batches]).tolist()
    for epoch in range(2):
        of_epoch = labels[21 * epoch : 21 * (epoch + 1)]
        assert Counter(of_epoch) == {label: 3 for label in range(7)}
        assert all(len(set(of_epoch[3 * i : 3 * i + 3])) == 1 for i in range(7))  # uses follow one another
    images = torch.cat([batch.images_BCHW for batch in batches])
    assert not torch.equal(images[0], images[1]) or not torch.equal(images[1], images[2])  # each augmented anew


def test_a_repeated_stream_goes_on_at_any_position_with_another_global_batch(tmp_path: Path) -> None:
    index = tiny(tmp_path / "x")
    whole = torch.cat([batch.images_BCHW for batch in loader(index, SHIFTED, steps=12, mb=4)])  # positions 0..47
    # After 5 steps of 4: step 5 of a global batch of 6 begins at position 20, so step 0 would begin at 20 - 30 = -10.
    parts = [loader(index, SHIFTED, start=5, steps=9, mb=3, rank=rank, world=2, origin=-10) for rank in range(2)]
    found = {int(slot): image for part in parts for batch in part for slot, image in zip(batch.slot_ids_B, batch.images_BCHW, strict=True)}
    assert sorted(found) == list(range(20, 44))
    assert all(torch.equal(image, whole[slot]) for slot, image in found.items())


def test_deit_is_resumable_at_its_own_layout(tmp_path: Path) -> None:
    index, augment = tiny(tmp_path / "x"), dataclasses.replace(SHIFTED, repeat_mode="deit")
    whole, rest = loader(index, augment), loader(index, augment, start=4)
    assert all(torch.equal(one.images_BCHW, two.images_BCHW) for one, two in zip(whole[4:], rest, strict=True))


def test_without_repeats_the_order_is_the_stream() -> None:
    layout = BatchLayout(micro_batch_size=2, accumulation=1, world=1)
    assert isinstance(make_order(DataConfig(augment=AugmentConfig(repeat_mode="deit")), 0, [5], layout), StreamOrder)
