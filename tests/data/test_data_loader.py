"""Facts of the loaders: pixels depend on the position alone, resume is exact, evaluation counts every image once."""

from __future__ import annotations

import dataclasses
import gc
import io
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.loader import EvalLoader, ImageBatch, TrainLoader, check_data, decode
from m2mkd_ds.data.order import StreamOrder
from m2mkd_ds.data.pil_transforms import train_transform
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png, make_source

AUGMENT = AugmentConfig(crop_scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.5, label_smoothing=0.1)
MIXED = dataclasses.replace(AUGMENT, mixup=0.8, cutmix=1.0)
SHIFTED = AugmentConfig(crop_scale=(1.0, 1.0))


def data_config(folder: Path, augment: AugmentConfig = AUGMENT, num_workers: int = 0) -> DataConfig:
    return DataConfig(
        train=str(folder / "train"),
        validation=str(folder / "validation"),
        num_classes=10,
        image_size=16,
        num_workers=num_workers,
        augment=augment,
    )


def train_loader(index: ShardIndex, data: DataConfig, *, mb: int = 4, acc: int = 1, rank: int = 0, world: int = 1, start: int = 0,
                 steps: int = 3, seed: int = 5) -> TrainLoader:  # fmt: skip
    return TrainLoader(
        index, data, seed=seed, micro_batch_size=mb, accumulation=acc, rank=rank, world=world, start_step=start, total_steps=steps
    )  # fmt: skip


def by_slot(batches: list[ImageBatch]) -> dict[int, tuple[torch.Tensor, int]]:
    """Stream position -> (pixels, label)."""
    found: dict[int, tuple[torch.Tensor, int]] = {}
    for batch in batches:
        for slot, image, label in zip(batch.slot_ids_B.tolist(), batch.images_BCHW, batch.labels_B.tolist(), strict=True):
            assert slot not in found
            found[slot] = (image, label)
    return found


def assert_same_batches(left: list[ImageBatch], right: list[ImageBatch]) -> None:
    assert len(left) == len(right) > 0
    for one, two in zip(left, right, strict=True):
        assert (one.step, one.micro_step) == (two.step, two.micro_step)
        for name in ("images_BCHW", "targets_BV", "labels_B", "slot_ids_B"):
            assert torch.equal(getattr(one, name), getattr(two, name)), name


def test_batches_have_the_promised_shapes_and_order(digits_folder: Path, digits_train: ShardIndex) -> None:
    loader = train_loader(digits_train, data_config(digits_folder), mb=4, acc=2, rank=1, world=3, start=1, steps=3)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [(batch.step, batch.micro_step) for batch in batches] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    # G = 24; step 1, rank 1, micro-step 0 is group 2: positions 24 + 8 .. 24 + 11.
    assert batches[0].slot_ids_B.tolist() == [32, 33, 34, 35]
    batch = batches[0]
    assert batch.images_BCHW.shape == (4, 3, 16, 16)
    assert batch.targets_BV.shape == (4, 10)
    assert batch.images_BCHW.dtype == batch.targets_BV.dtype == torch.float32
    assert batch.labels_B.dtype == batch.slot_ids_B.dtype == torch.int64
    assert torch.equal(batch.targets_BV.argmax(1), batch.labels_B)


def test_a_sample_is_what_plan_and_transform_say(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder)
    found = by_slot(list(train_loader(digits_train, data)))
    order, transform = StreamOrder(5, digits_train.shard_sizes), train_transform(data)
    for slot, (pixels, label) in found.items():
        image, expected_label = decode(digits_train, order.slot(slot).sample)
        with KeyedRandom() as keyed:
            keyed.seed("sample", 5, *order.slot(slot))
            assert torch.equal(pixels, transform(image))
        assert label == expected_label == digits_train.labels_N[order.slot(slot).sample]


def test_pixels_do_not_depend_on_rank_world_accumulation_or_micro_batch(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder)
    # The same global batch of 12 images, cut in five ways.
    reference = by_slot(list(train_loader(digits_train, data, mb=12)))
    assert sorted(reference) == list(range(36))
    for mb, acc, world in ((12, 1, 1), (2, 6, 1), (4, 1, 3), (3, 2, 2), (1, 1, 12)):
        batches = [batch for rank in range(world) for batch in train_loader(digits_train, data, mb=mb, acc=acc, rank=rank, world=world)]
        found = by_slot(batches)
        assert sorted(found) == sorted(reference)
        assert all(torch.equal(found[slot][0], reference[slot][0]) and found[slot][1] == reference[slot][1] for slot in found)


def test_mixed_batches_are_equal_for_two_ranks_and_for_accumulation(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder, MIXED)
    alone = list(train_loader(digits_train, data, mb=4, acc=2))
    ranks = [list(train_loader(digits_train, data, mb=4, rank=rank, world=2)) for rank in range(2)]
    together = [batch for step in zip(*ranks, strict=True) for batch in step]
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one.images_BCHW, two.images_BCHW)
        assert torch.equal(one.targets_BV, two.targets_BV)


def test_pixels_do_not_depend_on_workers(digits_folder: Path, digits_train: ShardIndex) -> None:
    alone = list(train_loader(digits_train, data_config(digits_folder, MIXED), acc=2, steps=4))
    loader = train_loader(digits_train, data_config(digits_folder, MIXED, num_workers=2), acc=2, steps=4)
    assert_same_batches(alone, list(loader))
    assert_same_batches(alone, list(loader))  # persistent workers, second pass


def test_resuming_at_any_step_continues_the_uninterrupted_stream(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder, MIXED)
    # 1,438 training digits; 64 a step: the epoch ends within step 22, so the stream crosses it.
    steps = 25
    whole = list(train_loader(digits_train, data, mb=32, acc=2, steps=steps))
    for start in (1, 13, 22, 24):
        rest = list(train_loader(digits_train, data, mb=32, acc=2, start=start, steps=steps))
        assert_same_batches(whole[2 * start :], rest)
    assert list(train_loader(digits_train, data, start=7, steps=7)) == []


def test_an_epoch_of_the_loader_holds_every_sample_once(digits_folder: Path, digits_train: ShardIndex) -> None:
    count = len(digits_train)
    batches = list(train_loader(digits_train, data_config(digits_folder, SHIFTED), mb=100, steps=-(-2 * count // 100)))
    labels = torch.cat([batch.labels_B for batch in batches])
    for epoch in range(2):
        of_epoch = labels[epoch * count : (epoch + 1) * count].numpy()
        assert np.array_equal(np.bincount(of_epoch), np.bincount(digits_train.labels_N))


def test_other_seeds_and_epochs_give_other_pixels(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder)
    first = by_slot(list(train_loader(digits_train, data, steps=1)))
    other = by_slot(list(train_loader(digits_train, data, steps=1, seed=6)))
    assert not any(torch.equal(first[slot][0], other[slot][0]) for slot in first)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_does_not_touch_the_trainers_random_numbers(digits_folder: Path, digits_train: ShardIndex, num_workers: int) -> None:
    loader = train_loader(digits_train, data_config(digits_folder, MIXED, num_workers))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in loader:
        pass
    assert before[0] == random.getstate()
    assert before[1] == np.random.get_state()[1].tolist()
    assert torch.equal(before[2], torch.get_rng_state())


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5])
def test_evaluation_counts_every_image_once(digits_folder: Path, digits_validation: ShardIndex, world: int) -> None:
    data = data_config(digits_folder)
    loaders = [EvalLoader(digits_validation, data, batch_size=16, rank=rank, world=world) for rank in range(world)]
    batches = [list(loader) for loader in loaders]
    assert [len(part) for part in batches] == [len(loader) for loader in loaders]
    found = by_slot([batch for part in batches for batch in part])
    assert sorted(found) == list(range(len(digits_validation)))
    assert [found[i][1] for i in range(len(found))] == digits_validation.labels_N.tolist()
    targets_BV = batches[0][0].targets_BV
    assert torch.equal(targets_BV, torch.nn.functional.one_hot(batches[0][0].labels_B, 10).float())


def test_more_ranks_than_images_leaves_ranks_without_batches(tmp_path: Path) -> None:
    png = encode_png(np.zeros((4, 4), np.uint8))
    index = write_shards(
        [(png, "png", 0, "a"), (png, "png", 0, "b")], tmp_path / "x", total=2, class_names=("z",), source="s", license="MIT"
    )
    data = DataConfig(num_classes=1, image_size=4, num_workers=0)
    counts = [sum(len(b.labels_B) for b in EvalLoader(index, data, batch_size=8, rank=rank, world=3)) for rank in range(3)]
    assert counts == [1, 1, 0]


def test_workers_import_neither_deepspeed_nor_transformers(digits_folder: Path, tmp_path: Path) -> None:
    # In a process of its own: what a spawned worker has imported is listed by a dataset that runs in it.
    script = tmp_path / "probe.py"
    script.write_text(f"""
import sys
from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data import loader
from m2mkd_ds.data.batches import TrainBatches
from m2mkd_ds.data.index import ShardIndex

class Probe(TrainBatches):
    def __getitem__(self, number):
        batch = super().__getitem__(number)
        return sorted({{name.partition(".")[0] for name in sys.modules}})

if __name__ == "__main__":
    import deepspeed  # what the training process has imported must not travel (a stand-in, found beside this file)
    index = ShardIndex.load({str(digits_folder / "train")!r})
    data = DataConfig(num_classes=10, image_size=16, num_workers=1)
    layout = loader.BatchLayout(micro_batch_size=2, accumulation=1, world=1)
    batches = Probe(index, data, seed=0, layout=layout, rank=0)
    print(" ".join(next(iter(loader._loader(batches, range(1), data, loader.CPU)))))
""")
    (tmp_path / "deepspeed.py").write_text("")
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env={"PYTHONPATH": root})
    imported = set(done.stdout.split())
    assert {"torch", "timm", "m2mkd_ds"} <= imported
    assert not imported & {"deepspeed", "transformers", "tutel"}


def damaged_copy(folder: Path, target: Path) -> tuple[ShardIndex, str]:
    """A set of ten images of which number 4 in index order is no image; returns the index and its key."""
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    samples = [(encode_png(pixels + i), "png", i % 2, f"k{i}") for i in range(10)]
    index = write_shards(samples, folder, total=10, class_names=("a", "b"), source="s", license="MIT")
    key = index.read(4)[2]
    bad = [(image[:40] if name == key else image, ext, label, name) for image, ext, label, name in samples]
    return write_shards(bad, target, total=10, class_names=("a", "b"), source="s", license="MIT"), key


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_replaced_in_training_and_stops_evaluation(tmp_path: Path, num_workers: int) -> None:
    index, key = damaged_copy(tmp_path / "good", tmp_path / "bad")
    data = DataConfig(num_classes=2, image_size=8, num_workers=num_workers, augment=SHIFTED)
    order = StreamOrder(5, [10])
    position = next(p for p in range(10) if order.slot(p).sample == 4)
    batches = list(train_loader(index, data, mb=2, steps=5))
    (record,) = [record for batch in batches for record in batch.bad]
    assert batches[position // 2].bad == (record,)
    assert (record.kind, record.shard, record.key, record.sample) == ("undecodable", "shard-000000.tar", key, 4)
    # The next sample of the epoch takes its place (the first one's, behind the last).
    next_one = order.slot((position + 1) % 10).sample
    assert (record.position, record.substitute) == (position, next_one)
    assert re.search(rf"shard .*shard-000000.tar, key {key}, sample 4: cannot decode the image", record.message)
    assert int(batches[position // 2].labels_B[position % 2]) == index.labels_N[next_one]
    with pytest.raises(SampleError, match=f"key {key}, sample 4: cannot decode") as caught:
        list(EvalLoader(index, data, batch_size=4, rank=0, world=1))
    assert caught.value.kind == "undecodable"


def test_every_kind_of_image_becomes_rgb(tmp_path: Path) -> None:
    pngs = [(mode, "PNG", "png") for mode in ("L", "RGBA", "P", "1")]
    samples = []
    for number, (mode, kind, extension) in enumerate([*pngs, ("CMYK", "JPEG", "jpg"), ("L", "JPEG", "jpg"), ("RGB", "PNG", "jpg")]):
        file = io.BytesIO()
        Image.new(mode, (9, 5)).save(file, kind)
        samples.append((file.getvalue(), extension, 0, f"k{number}"))
    index = write_shards(samples, tmp_path / "x", total=7, class_names=("z",), source="s", license="MIT")
    data = DataConfig(num_classes=1, image_size=8, num_workers=0)
    (batch,) = EvalLoader(index, data, batch_size=7, rank=0, world=1)
    assert batch.images_BCHW.shape == (7, 3, 8, 8)


def test_check_data_names_what_does_not_fit(digits_folder: Path, tmp_path: Path) -> None:
    data = data_config(digits_folder)
    train, validation = check_data(data)
    assert (len(train), len(validation)) == (1438, 359)
    with pytest.raises(ShardError, match="data.validation is empty"):
        check_data(dataclasses.replace(data, validation=""))
    with pytest.raises(ShardError, match=r"data.num_classes is 7, but data.train \(.*\) has 10 classes"):
        check_data(dataclasses.replace(data, num_classes=7))
    with pytest.raises(ShardError, match="holds no complete shards"):
        check_data(dataclasses.replace(data, train=str(tmp_path / "nowhere")))
    write_shards([], tmp_path / "none", total=0, class_names=train.class_names, source="s", license="MIT")
    with pytest.raises(ShardError, match="has no samples"):
        check_data(dataclasses.replace(data, train=str(tmp_path / "none")))
    png = encode_png(np.zeros((4, 4), np.uint8))
    names = (*train.class_names[:9], "X")
    write_shards([(png, "png", 0, "a")], tmp_path / "other", total=1, class_names=names, source="s", license="MIT")
    with pytest.raises(ShardError, match="class 9 is '9' in data.train .* and 'X' in data.validation"):
        check_data(dataclasses.replace(data, validation=str(tmp_path / "other")))


def test_impossible_loaders_are_refused(digits_folder: Path, digits_train: ShardIndex) -> None:
    data = data_config(digits_folder, MIXED)
    with pytest.raises(ValueError, match="micro_batch_size is 3 and data.augment.mix_group is 2: .* must divide micro_batch_size"):
        train_loader(digits_train, data, mb=3)
    with pytest.raises(ValueError, match="rank is 2; with world 2 it must lie between 0 and 1"):
        train_loader(digits_train, data, rank=2, world=2)
    with pytest.raises(ValueError, match="start_step 4 must lie between 0 and total_steps 3"):
        train_loader(digits_train, data, start=4)
    with pytest.raises(ValueError, match="num_classes is 3, but .* has 10 classes"):
        train_loader(digits_train, dataclasses.replace(data, num_classes=3))


@pytest.mark.parametrize(
    ("repeat_mode", "mb", "world", "message"),
    [
        ("stream", 8, 1, "micro_batch_size is 8, .* mixed with itself; make micro_batch_size a multiple of 6"),
        ("deit", 8, 2, "spreads 3 uses of an image over the ranks, and there are 2: .* launch at least 3 ranks"),
        ("stream", 12, 1, ""),
        ("deit", 8, 3, ""),
    ],
)
def test_no_image_is_mixed_with_itself(
    digits_folder: Path, digits_train: ShardIndex, repeat_mode: Any, mb: int, world: int, message: str
) -> None:
    augment = AugmentConfig(crop_scale=(1.0, 1.0), mixup=0.8, mix_group=0, repeats=3, repeat_mode=repeat_mode)
    data = data_config(digits_folder, augment)
    if message:
        with pytest.raises(ValueError, match=message):
            train_loader(digits_train, data, mb=mb, world=world)
        return
    loader = train_loader(digits_train, data, mb=mb, world=world, rank=world - 1)
    for batch in loader:
        samples = [loader.order.slot(position).sample for position in batch.slot_ids_B.tolist()]
        assert all(sample != mirror for sample, mirror in zip(samples, reversed(samples), strict=True))


def test_a_shard_that_vanishes_is_found_before_training(digits_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(digits_folder, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "shard-000003.tar").unlink()
    with pytest.raises(ShardError, match="shard-000003.tar: shard is missing"):
        check_data(data_config(tmp_path / "copy"))


def test_making_a_source_twice_keeps_it(digits_folder: Path) -> None:
    before = (digits_folder / "train" / "index.json").stat().st_mtime_ns
    make_source("digits", digits_folder, samples_per_shard=400)
    assert (digits_folder / "train" / "index.json").stat().st_mtime_ns == before


def test_close_ends_the_workers_although_the_loader_and_its_iterator_are_held(digits_train: ShardIndex, digits_folder: Path) -> None:
    gc.collect()  # an earlier test's error holds a loader
    loader = train_loader(digits_train, data_config(digits_folder, num_workers=2), steps=50)
    batches = iter(loader)
    first = next(batches)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="the loader was closed"):
        next(batches)
    again = next(iter(loader))  # with workers of its own
    assert torch.equal(again.images_BCHW, first.images_BCHW)
    loader.close()
    assert multiprocessing.active_children() == []


def test_close_ends_the_workers_of_an_evaluation(digits_validation: ShardIndex, digits_folder: Path) -> None:
    gc.collect()
    loader = EvalLoader(digits_validation, data_config(digits_folder, num_workers=1), batch_size=16, rank=0, world=1)
    batches = iter(loader)
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    loader.close()
    assert multiprocessing.active_children() == []
    with pytest.raises(RuntimeError, match="the loader was closed"):
        next(batches)
