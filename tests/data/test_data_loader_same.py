"""Pixels, targets and ids are a function of the stream alone, on both decode paths; damaged samples are replaced alike everywhere."""

from __future__ import annotations

import io
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data import batches as batches_module
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.loader import EvalLoader, ImageBatch, TrainLoader
from m2mkd_ds.data.pil_transforms import train_transform
from m2mkd_ds.data.shards.write import write_shards

AUGMENT = AugmentConfig(color_jitter=0.2, random_erase=0.5, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
NUM_SAMPLES, DAMAGED = 29, (3, 4, 17)


def photos() -> list[tuple[bytes, str, int, str]]:
    draw, samples = np.random.default_rng(0), []
    for number in range(NUM_SAMPLES):
        image = Image.fromarray(draw.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((70 + number, 60), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.save(file, "PNG" if number % 9 == 8 else "JPEG")  # some named .jpg are none
        samples.append((file.getvalue(), "jpg", number % 5, f"k{number}"))
    return samples


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return write_shards(
        photos(), tmp_path_factory.mktemp("shards") / "good", total=NUM_SAMPLES, class_names=tuple("abcde"), source="s", license="MIT",
        samples_per_shard=10,
    )  # fmt: skip


@pytest.fixture(scope="module")
def damaged(good: ShardIndex, tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The same with three images, by index number, that end too early (and are indexed so: their checksums fit)."""
    keys = {good.read(sample)[2] for sample in DAMAGED}
    samples = [(data[: len(data) // 3] if key in keys else data, ext, label, key) for data, ext, label, key in photos()]
    return write_shards(
        samples, tmp_path_factory.mktemp("shards") / "bad", total=NUM_SAMPLES, class_names=tuple("abcde"), source="s", license="MIT",
        samples_per_shard=10,
    )  # fmt: skip


def config(decode: Any, *, augment: AugmentConfig = AUGMENT, num_workers: int = 0) -> DataConfig:
    return DataConfig(num_classes=5, image_size=16, num_workers=num_workers, decode=decode, augment=augment)


def load(index: ShardIndex, data: DataConfig, *, mb: int, acc: int = 1, world: int = 1, steps: int = 2) -> list[ImageBatch]:
    """All ranks' batches in the order of the stream."""
    ranks = [
        list(TrainLoader(index, data, seed=1, micro_batch_size=mb, accumulation=acc, rank=rank, world=world, start_step=0,
                         total_steps=steps)) for rank in range(world)
    ]  # fmt: skip
    return sorted((batch for part in ranks for batch in part), key=lambda batch: int(batch.slot_ids_B[0]))


def stream(batches: list[ImageBatch]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.cat([getattr(batch, name) for batch in batches]) for name in ("slot_ids_B", "labels_B", "images_BCHW", "targets_BV"))


def assert_same(left: list[ImageBatch], right: list[ImageBatch]) -> None:
    assert all(torch.equal(one, two) for one, two in zip(stream(left), stream(right), strict=True))
    assert [record for batch in left for record in batch.bad] == [record for batch in right for record in batch.bad]
    assert sum(batch.fallbacks for batch in left) == sum(batch.fallbacks for batch in right)


LAYOUTS = [(mb, acc, 24 // (mb * acc)) for mb in (2, 4, 6, 8, 12, 24) for acc in (1, 2, 3) if 24 % (mb * acc) == 0]
"""Micro-batch, accumulation, ranks of a global batch of 24."""


@settings(max_examples=25, deadline=None)
@given(layout=st.sampled_from(LAYOUTS), decode=st.sampled_from(["pil", "fast"]), mix_group=st.sampled_from([2, 4, 6]),
       policy=st.booleans(), repeats=st.sampled_from([1, 2]))  # fmt: skip
def test_pixels_targets_and_faults_do_not_depend_on_the_layout(
    good: ShardIndex, damaged: ShardIndex, layout: tuple[int, int, int], decode: str, mix_group: int, policy: bool, repeats: int
) -> None:
    mb, acc, world = layout
    if mb % mix_group:
        mix_group = 2
    augment = replace(AUGMENT, mix_group=mix_group, auto_augment="rand-m9-mstd0.5-inc1" if policy else "", repeats=repeats)
    data = config(decode, augment=augment)
    reference = load(damaged, data, mb=24)
    assert reference[0].slot_ids_B.tolist() == list(range(24))
    assert_same(reference, load(damaged, data, mb=mb, acc=acc, world=world))


@pytest.mark.parametrize(("decode", "num_workers"), [("pil", 1), ("fast", 2)])
def test_pixels_targets_and_faults_do_not_depend_on_workers(damaged: ShardIndex, decode: str, num_workers: int) -> None:
    alone = load(damaged, config(decode), mb=12, steps=5)
    assert any(batch.bad for batch in alone)
    assert_same(alone, load(damaged, config(decode, num_workers=num_workers), mb=12, steps=5))


@pytest.mark.parametrize("decode", ["pil", "fast"])
def test_a_substitute_has_the_random_numbers_of_its_place_and_its_own_label(damaged: ShardIndex, good: ShardIndex, decode: str) -> None:
    augment = AugmentConfig(hflip=0.5)
    batches = load(damaged, config(decode, augment=augment), mb=NUM_SAMPLES, steps=1)
    records = {record.sample: record for record in batches[0].bad}
    assert set(records) == set(DAMAGED) and {record.kind for record in records.values()} == {"undecodable"}
    order = TrainLoader(
        good, config(decode), seed=1, micro_batch_size=2, accumulation=1, rank=0, world=1, start_step=0, total_steps=1
    ).order
    healthy = load(good, config(decode, augment=augment), mb=NUM_SAMPLES, steps=1)
    for position in range(NUM_SAMPLES):
        sample = order.slot(position).sample
        same = torch.equal(batches[0].images_BCHW[position], healthy[0].images_BCHW[position])
        assert same == (sample not in DAMAGED)
        if sample in DAMAGED:
            # By a plain walk: the next samples of the epoch until one is whole.
            walk = (order.slot(p % NUM_SAMPLES).sample for p in range(position + 1, position + NUM_SAMPLES))
            expected = next(other for other in walk if other not in DAMAGED)
            assert records[sample].position == position and records[sample].substitute == expected
            assert int(batches[0].labels_B[position]) == good.labels_N[expected]
            if decode == "pil":
                with KeyedRandom() as keyed:
                    keyed.seed("sample", 1, *order.slot(position))  # the damaged sample's slot
                    pixels_CHW = torch.empty(3, 16, 16)
                    train_transform(config("pil", augment=augment)).file_into(good.read(expected)[0], pixels_CHW)
                assert torch.equal(batches[0].images_BCHW[position], pixels_CHW)


def test_files_that_the_fast_decoder_does_not_take_are_counted(good: ShardIndex) -> None:
    # Samples 8, 17 and 26 are PNG files: three an epoch.
    augment = replace(AUGMENT, mix_group=0, mixup=0.0, cutmix=0.0)
    (batch,) = load(good, config("fast", augment=augment), mb=NUM_SAMPLES, steps=1)
    assert batch.fallbacks == 3
    assert sum(batch.fallbacks for batch in EvalLoader(good, config("fast"), batch_size=8, rank=0, world=1)) == 3
    assert sum(batch.fallbacks for batch in load(good, config("pil"), mb=2, steps=15)) == 0


def test_each_kind_of_damage_is_named(good: ShardIndex, tmp_path: Path) -> None:
    samples = photos()
    index = write_shards(samples, tmp_path / "x", total=NUM_SAMPLES, class_names=tuple("abcde"), source="s", license="MIT",
                         samples_per_shard=10)  # fmt: skip
    offset = int(index.table[5]["offset"])
    shard = tmp_path / "x" / index.shards[int(index.table[5]["shard"])].name
    with shard.open("r+b") as file:
        file.seek(offset + 100)
        file.write(b"\0\0\0\0\0\0")
    last = tmp_path / "x" / index.shards[-1].name
    os.truncate(last, int(index.table[NUM_SAMPLES - 1]["offset"]) + 50)
    (batch,) = load(index, config("fast", augment=AugmentConfig()), mb=NUM_SAMPLES, steps=1)
    assert {record.sample: record.kind for record in batch.bad} == {5: "checksum", NUM_SAMPLES - 1: "truncated"}
    (tmp_path / "x" / index.shards[1].name).unlink()
    index.files = ShardIndex.load(good.folder).files.__class__([tmp_path / "x" / shard.name for shard in index.shards])
    (batch,) = load(index, config("fast", augment=AugmentConfig()), mb=NUM_SAMPLES, steps=1)
    assert {record.sample for record in batch.bad if record.kind == "io"} == set(range(10, 20))


def test_when_nothing_can_be_read_the_first_fault_is_raised(tmp_path: Path) -> None:
    samples = [(b"no image", "jpg", 0, f"k{i}") for i in range(5)]
    index = write_shards(samples, tmp_path / "x", total=5, class_names=("a",), source="s", license="MIT")
    data = replace(config("pil", augment=AugmentConfig()), num_classes=1)
    with pytest.raises(SampleError, match=r"cannot decode .*\(stream position 0\); nor can any of the 4 samples be read") as caught:
        load(index, data, mb=2)
    assert caught.value.kind == "undecodable"


def test_so_many_substitutes_are_tried_and_no_more(tmp_path: Path) -> None:
    count = batches_module.MAX_SUBSTITUTES + 20
    samples = [(b"no image", "jpg", 0, f"k{i:03}") for i in range(count)]
    index = write_shards(samples, tmp_path / "x", total=count, class_names=("a",), source="s", license="MIT")
    with pytest.raises(SampleError, match=f"any of the {batches_module.MAX_SUBSTITUTES} samples"):
        load(index, replace(config("fast", augment=AugmentConfig()), num_classes=1), mb=2)


@pytest.mark.parametrize(("decode", "num_workers"), [("pil", 0), ("fast", 1)])
def test_a_batch_that_is_lost_can_be_had_with_all_that_was_tried(good: ShardIndex, tmp_path: Path, decode: str, num_workers: int) -> None:
    samples = [(b"no image", "jpg", 0, f"k{i}") for i in range(5)]
    index = write_shards(samples, tmp_path / "x", total=5, class_names=("a",), source="s", license="MIT")
    data = replace(config(decode, augment=AugmentConfig(), num_workers=num_workers), num_classes=1)
    loader = TrainLoader(index, data, seed=1, micro_batch_size=2, accumulation=1, rank=1, world=2, start_step=0, total_steps=1,
                         raise_lost=False)  # fmt: skip
    (batch,) = loader
    assert batch.lost is not None and batch.lost.kind == "undecodable" and "nor can any of the 4 samples" in str(batch.lost)
    assert sorted(record.sample for record in batch.bad) == [0, 1, 2, 3, 4]
    assert {(record.position, record.substitute) for record in batch.bad} == {(2, -1)}  # rank 1 begins at position 2
    assert batch.slot_ids_B.tolist() == [2, 3] and batch.images_BCHW.shape == (2, 3, 16, 16) and bool(batch.images_BCHW.isfinite().all())


class Failing:
    """An operation of a policy that fails."""

    def __call__(self, image: Image.Image) -> Image.Image:
        raise ZeroDivisionError("one over none")


@pytest.mark.parametrize(("decode", "num_workers"), [("pil", 0), ("fast", 0), ("fast", 1)])
def test_an_error_of_augmentation_stops_at_once_with_sample_and_slot(good: ShardIndex, decode: str, num_workers: int) -> None:
    loader = TrainLoader(good, config(decode, num_workers=num_workers), seed=1, micro_batch_size=2, accumulation=1, rank=0, world=1,
                         start_step=0, total_steps=2)  # fmt: skip
    transform = loader._workers._loader.dataset._transform  # type: ignore[attr-defined]
    transform.parts = replace(transform.parts, ops=(Failing(),))
    first = loader.order.slot(0)
    message = rf"sample {first.sample}: augmentation failed \(ZeroDivisionError: one over none; .*\(stream position 0, Slot\(epoch=0"
    with pytest.raises(SampleError, match=message) as caught:
        list(loader)
    assert caught.value.kind == "transform"


def test_a_killed_worker_is_named_with_what_to_do(good: ShardIndex) -> None:
    loader = TrainLoader(good, config("fast", num_workers=1), seed=1, micro_batch_size=2, accumulation=1, rank=0, world=1,
                         start_step=0, total_steps=100_000)  # fmt: skip
    batches = iter(loader)
    next(batches)
    (worker,) = loader._workers._loader._iterator._workers  # type: ignore[union-attr]
    # torch raises from a signal handler: inside the wait for a batch its words are wrapped in ours, elsewhere they come bare.
    with pytest.raises(RuntimeError, match=r"ended by itself .* set data.num_workers lower|DataLoader worker \(pid .*is killed by signal"):
        os.kill(worker.pid, signal.SIGKILL)  # inside the block: the handler may run at once
        for _ in batches:
            pass


def test_look_ahead_hears_where_the_stream_is(good: ShardIndex) -> None:
    heard: list[int] = []

    class Ahead:
        def advance(self, position: int) -> None:
            heard.append(position)

    batches = iter(TrainLoader(good, config("pil"), seed=1, micro_batch_size=2, accumulation=2, rank=1, world=2, start_step=1,
                               total_steps=3, look_ahead=Ahead()))  # fmt: skip
    assert heard == [12]  # step 1 of 8 positions, rank 1: group 2, before a batch is asked for
    assert [int(batch.slot_ids_B[0]) for batch in batches] == [12, 14, 20, 22]
    assert heard == [12, 12, 14, 20, 22]
