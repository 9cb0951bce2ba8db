"""Long streams and many shards: memory and open files flat over 20 epochs, and no shard opened before its images are needed."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from m2mkd_ds.bench.loader_photos import photo_jpegs
from m2mkd_ds.bench.loader_resume import synthetic_index
from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.shard_files import MAX_OPEN_SHARDS
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png

EPOCHS = 20
WARM_UP = 4
"""Epochs in which buffers, allocators and the list of open shards find their size."""
RSS_SLACK_MIB = 6.0
FILES_SLACK = 4


@dataclass(frozen=True)
class Use:
    """Of the main process and its workers together."""

    rss_mib: float
    files: int


def use_now() -> Use:
    workers = [process.pid for process in multiprocessing.active_children()]
    pages = files = 0
    for pid in (os.getpid(), *workers):
        pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        files += len(os.listdir(f"/proc/{pid}/fd"))
    return Use(pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20), files)


def tiny_shards(folder: Path, num_shards: int, samples_per_shard: int) -> ShardIndex:
    total = num_shards * samples_per_shard
    pixels = np.random.default_rng(0).integers(0, 256, (total, 8, 8), dtype=np.uint8)
    samples = [(encode_png(pixels[i]), "png", i % 10, f"k{i}") for i in range(total)]
    names = [f"c{i}" for i in range(10)]
    return write_shards(
        samples, folder, total=total, class_names=names, source="s", license="MIT", samples_per_shard=samples_per_shard
    )  # fmt: skip


def soak(index: ShardIndex, *, batch: int) -> list[Use]:
    """20 epochs with two workers; four looks an epoch."""
    data = DataConfig(num_classes=10, image_size=16, num_workers=2, augment=AugmentConfig(mixup=0.8, random_erase=0.2))
    steps = EPOCHS * index.num_samples // batch
    loader = TrainLoader(
        index, data, seed=1, micro_batch_size=batch, accumulation=1, rank=0, world=1, start_step=0, total_steps=steps
    )  # fmt: skip
    looks = []
    for number, _ in enumerate(loader):
        if (number + 1) * 4 * EPOCHS // steps > number * 4 * EPOCHS // steps:
            looks.append(use_now())
    assert len(looks) == 4 * EPOCHS
    return looks


def assert_flat(looks: Sequence[Use]) -> None:
    """The second half after the warm-up against the first, by medians: batches on their way hold a few files and pages each."""
    after = looks[4 * WARM_UP :]
    early, late = after[: len(after) // 2], after[len(after) // 2 :]
    rss = [median(look.rss_mib for look in half) for half in (early, late)]
    files = [median(look.files for look in half) for half in (early, late)]
    print(f"RSS {rss[0]:.1f} -> {rss[1]:.1f} MiB, open files {files[0]} -> {files[1]}")
    assert rss[1] - rss[0] < RSS_SLACK_MIB
    assert files[1] - files[0] <= FILES_SLACK


def test_memory_and_open_files_are_flat_over_twenty_epochs(tmp_path: Path) -> None:
    index = tiny_shards(tmp_path / "x", num_shards=8, samples_per_shard=12)
    before = len(os.listdir("/proc/self/fd"))
    looks = soak(index, batch=8)
    assert_flat(looks)
    assert len(os.listdir("/proc/self/fd")) <= before + FILES_SLACK  # what the loader opened in this process is closed again


@pytest.mark.slow
def test_memory_and_open_files_are_flat_with_more_shards_than_may_be_open(tmp_path: Path) -> None:
    index = tiny_shards(tmp_path / "x", num_shards=3 * MAX_OPEN_SHARDS, samples_per_shard=30)
    looks = soak(index, batch=32)
    assert_flat(looks)
    # A worker keeps MAX_OPEN_SHARDS; the rest is Python's, torch's and that of batches on their way.
    assert max(look.files for look in looks) < 2 * MAX_OPEN_SHARDS + 150


_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open":
        _opened.append(str(arguments[0]))


sys.addaudithook(_audit)  # stays for the life of the process, and does nothing outside `tar_files_opened`


@contextmanager
def tar_files_opened() -> Iterator[list[str]]:
    """Names of the tar files that this process opens, by whatever call."""
    global _opened
    _opened = found = []
    opened: list[str] = []
    try:
        yield opened
    finally:
        _opened = None
        opened += [name for name in found if name.endswith(".tar")]


def test_starting_on_1024_shards_opens_only_the_shards_of_the_first_batch(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    synthetic_index(folder, photo_jpegs(8, 0), num_images=8192, num_shards=1024, seed=1)
    with tar_files_opened() as by_loading:
        index = ShardIndex.load(folder)
    assert len(index.shards) == 1024 and by_loading == []
    step = (150 * 8192 + 4096) // 8  # where the synthetic index has its images
    data = DataConfig(num_classes=1000, image_size=32, num_workers=0)
    with tar_files_opened() as by_making:
        loader = TrainLoader(
            index, data, seed=1, micro_batch_size=8, accumulation=1, rank=0, world=1, start_step=step, total_steps=step + 1
        )  # fmt: skip
    assert by_making == []
    with tar_files_opened() as by_first_batch:
        (batch,) = loader
    assert len(batch.images_BCHW) == 8
    assert 1 <= len(by_first_batch) <= 8 and len(set(by_first_batch)) == len(by_first_batch)
