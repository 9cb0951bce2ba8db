"""From an index and a plan to batches: `TrainLoader` (endless stream, resumable at any step) and `EvalLoader` (exact cover).

The unit of work of a loader worker is a whole micro-batch, named by its number (data/batches.py). So the order cannot depend on
the number of workers, resuming is starting to count elsewhere, and no worker has state worth saving. How workers start:
data/worker_start.py; in which memory their images come: data/ring.py. What is left to do on the device is done here, in
the training process (data/device_ops.py).
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batch import ImageBatch, WorkerBatch
from m2mkd_ds.data.batches import Batches, EvalBatches, TrainBatches
from m2mkd_ds.data.decode import decode
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout, num_eval_batches
from m2mkd_ds.data.remote.addresses import redact
from m2mkd_ds.data.remote.files import CachedFiles
from m2mkd_ds.data.remote.look_ahead import LookAhead as ShardLookAhead
from m2mkd_ds.data.ring import Turns
from m2mkd_ds.data.shard_files import Access, IoCounts
from m2mkd_ds.data.worker_start import start_worker, worker_context
from m2mkd_ds.data_config import check_mixing

__all__ = ["EvalLoader", "ImageBatch", "LookAhead", "TrainLoader", "check_data", "decode"]

CPU = torch.device("cpu")
_KILLED_S = 5.0
PREFETCH = 2
"""Batches a worker is asked for ahead."""


class LookAhead(Protocol):
    """Whoever fetches shards before they are needed."""

    def advance(self, position: int) -> None:
        """The stream is at `position` now. Returns at once."""
        ...


def check_data(data: DataConfig, *, images: bool = True) -> tuple[ShardIndex, ShardIndex]:
    """Load and cross-check both folders before compute is spent: (train, validation). `images`: whether the shards must be there, too.

    Raises ShardError when a folder is damaged or empty, or when the class counts of folders and config differ.
    """
    indices = []
    for name in ("train", "validation"):
        folder = getattr(data, name)
        if not folder:
            raise ShardError(f"data.{name} is empty; give the folder of the {name} shards (`m2mkd shards write` makes them)")
        index = (ShardIndex.load if images else ShardIndex.load_unchecked)(folder, Access.from_config(data))
        if index.num_classes != data.num_classes:
            raise ShardError(
                f"data.num_classes is {data.num_classes}, but data.{name} ({redact(folder)}) has {index.num_classes} classes; "
                "make them equal"
            )
        if not index.num_samples:
            raise ShardError(f"data.{name} ({redact(folder)}) has no samples; write the shards again")
        indices.append(index)
    train, validation = indices
    if train.class_names != validation.class_names:
        pairs = zip(train.class_names, validation.class_names, strict=True)
        number, (ours, theirs) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ShardError(
            f"class {number} is {ours!r} in data.train ({redact(data.train)}) and {theirs!r} in data.validation "
            f"({redact(data.validation)}); both must come from the same list of classes"
        )
    return train, validation


class TrainLoader:
    """Batches of one rank in order (step, micro_step), from `start_step` to `total_steps`.

    Pixels, targets and order are a function of (seed, index, data, layout): the same for any number of workers, and a
    loader started at step s gives exactly what an uninterrupted one gives from s on. `origin`: position of the stream that
    step 0 begins at (BatchLayout.origin), for a run that goes on with another global batch. `look_ahead` hears of every batch;
    by default that is who fills the cache of shards that lie elsewhere.
    Damaged samples are replaced and listed in `ImageBatch.bad`. Raises ValueError for impossible layouts. Iterating raises
    SampleError where augmentation fails or no substitute can be read; with `raise_lost=False`, a batch of the latter kind comes with
    `ImageBatch.lost` set and images that mean nothing, for a caller whose ranks have to stop at the same step.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        *,
        seed: int,
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        start_step: int,
        total_steps: int,
        origin: int = 0,
        device: torch.device = CPU,
        look_ahead: LookAhead | None = None,
        raise_lost: bool = True,
    ) -> None:
        layout = BatchLayout(micro_batch_size=micro_batch_size, accumulation=accumulation, world=world, origin=origin)
        _check_rank(rank, world)
        _check_classes(index, data)
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"start_step {start_step} must lie between 0 and total_steps {total_steps}")
        batches = TrainBatches(index, data, seed=seed, layout=layout, rank=rank)
        batches.mixer.check(micro_batch_size)
        check_mixing(data.augment, micro_batch_size, world)
        self.layout, self.index, self.order = layout, index, batches.order
        if look_ahead is None and isinstance(index.files, CachedFiles):
            look_ahead = ShardLookAhead(self.order, index.files, index.access.look_ahead, window=data.order_window)
        self._rank, self._look_ahead, self._raise_lost = rank, look_ahead, raise_lost
        self._numbers = range(start_step * accumulation, total_steps * accumulation)
        self._workers = _Workers(partial(_loader, batches, self._numbers, data, device))
        self._finish = Finisher(data, device, smoothing=data.augment.label_smoothing)
        self._io = IoCounts()
        self._io_here = index.files.counts() if data.num_workers else None

    def __len__(self) -> int:
        """Micro-batches this loader yields."""
        return len(self._numbers)

    def __iter__(self) -> Iterator[ImageBatch]:
        # Not a generator itself: workers start when the iterator is made, not when the first batch is asked for.
        if self._numbers:
            self._advance(self._numbers[0])
        return self._finished(self._workers.start())

    def close(self) -> None:
        """End the workers, also of iterators that somebody still holds, and fetch no more shards ahead."""
        self._workers.close()
        self.index.files.expect(())

    def io_counts(self) -> IoCounts:
        """What workers did to get the bytes of the batches that were yielded, and this process to fetch shards ahead."""
        # Without workers, the batches tell of this process already.
        ahead = IoCounts() if self._io_here is None else self.index.files.counts().plus(self._io_here, -1)
        return self._io.plus(ahead)

    def _finished(self, received: Iterator[tuple[WorkerBatch, float]]) -> Iterator[ImageBatch]:
        for number, (batch, wait_s) in zip(self._numbers, received, strict=True):
            self._advance(number)
            self._io = self._io.plus(batch.io)
            if batch.lost is not None and self._raise_lost:
                raise batch.lost
            yield self._finish(batch, wait_s)

    def _advance(self, number: int) -> None:
        """The one place where shards that lie elsewhere are asked for ahead of their use."""
        if self._look_ahead is not None:
            step, micro_step = divmod(number, self.layout.accumulation)
            self._look_ahead.advance(self.layout.positions(step, micro_step, self._rank).start)


class EvalLoader:
    """Every sample of the index exactly once over all ranks: rank r takes r, r + world, ...; no padding, no drop.

    Ranks may have unequal numbers of images and batches (also none): sum counts after the loop, not in it.
    Iterating raises SampleError at the first damaged image.
    """

    def __init__(
        self, index: ShardIndex, data: DataConfig, *, batch_size: int, rank: int, world: int, device: torch.device = CPU
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        _check_rank(rank, world)
        _check_classes(index, data)
        batches = EvalBatches(index, data, batch_size=batch_size, rank=rank, world=world)
        count = num_eval_batches(rank, batch_size=batch_size, world=world, num_samples=index.num_samples)
        self.index = index
        self._image_size = data.image_size
        self._numbers = range(count)
        self._workers = _Workers(partial(_loader, batches, self._numbers, data, device))
        self._finish = Finisher(data, device, smoothing=0.0)

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._numbers)

    def no_images(self) -> torch.Tensor:
        """A batch of zero images, for a rank that has to keep step with others."""
        return torch.zeros(0, 3, self._image_size, self._image_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        # Not a generator function: workers start when the iterator is made.
        received = self._workers.start()
        return (self._finish(batch, wait_s) for batch, wait_s in received)

    def close(self) -> None:
        """End the workers, also of iterators that somebody still holds."""
        self._workers.close()


def _check_rank(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank is {rank}; with world {world} it must lie between 0 and {world - 1}")


def _check_classes(index: ShardIndex, data: DataConfig) -> None:
    if index.num_classes != data.num_classes:
        raise ValueError(f"data.num_classes is {data.num_classes}, but {index.folder} has {index.num_classes} classes; make them equal")


def _loader(batches: Batches, numbers: range, data: DataConfig, device: torch.device) -> DataLoader[Any]:
    """A DataLoader whose items are whole micro-batches, or the error that stopped one."""
    num_workers = data.num_workers
    sampler: range | Turns = numbers
    if num_workers and _is_copied(data, device):
        # Those that are asked for ahead, and the one that the training process has in hand.
        sampler = Turns(batches.use_ring(PREFETCH * num_workers + 1), numbers)
    return DataLoader(
        batches,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        prefetch_factor=PREFETCH if num_workers else None,
        collate_fn=_as_is,
        multiprocessing_context=worker_context() if num_workers else None,
        worker_init_fn=start_worker,
        persistent_workers=num_workers > 0,
        # Copies to a GPU run beside its work only from page-locked memory.
        pin_memory=device.type == "cuda",
        # Its own generator: DataLoader draws a base seed at every start, which would shift the trainer's random numbers.
        generator=torch.Generator(),
    )


def _is_copied(data: DataConfig, device: torch.device) -> bool:
    """Whether images have left the workers' memory before anybody else sees them: pinned, or made floats on the host.

    Not with decode=pil on the CPU, where a worker's tensor is what the caller gets and keeps; nor on devices whose queued copies
    might read it later.
    """
    return device.type == "cuda" or (data.decode == "fast" and device.type in ("cpu", "meta"))


def _as_is(batch: Any) -> Any:
    """Batches come whole: nothing to collate."""
    return batch


class _Workers:
    """A DataLoader whose processes can be ended while somebody holds an iterator over it."""

    def __init__(self, make_loader: Callable[[], DataLoader[Any]]) -> None:
        self._make_loader = make_loader
        self._loader = make_loader()
        self._received: weakref.WeakSet[_Received] = weakref.WeakSet()
        self._processes: list[Any] = []
        # A loader that nobody closed, at the latest when the interpreter ends: multiprocessing would send SIGTERM, which workers ignore,
        # and wait for ever.
        weakref.finalize(self, _kill, self._processes)

    def start(self) -> _Received:
        """Start the processes; what they make, in order."""
        received = _Received(iter(self._loader))
        self._received.add(received)
        self._processes[:] = received.processes
        return received

    def close(self) -> None:
        """End the processes."""
        self._loader = self._make_loader()  # the old one holds its workers; this one has none before it is iterated
        for received in list(self._received):
            received.close()


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join(_KILLED_S)


class _Received(Iterator["tuple[WorkerBatch, float]"]):
    """Batches with the seconds that each was waited for; ends the workers when closed, finished or dropped.

    Raises the SampleError that a worker met, RuntimeError when a worker is gone or the loader was closed.
    """

    def __init__(self, items: Iterator[WorkerBatch | SampleError]) -> None:
        self._items: Iterator[WorkerBatch | SampleError] | None = items
        self.processes: list[Any] = list(getattr(items, "_workers", ()))
        """Of a DataLoader with workers."""

    def close(self) -> None:
        """Drop the DataLoader's iterator, whose workers end with its last reference, and kill those that do not."""
        self._items = None
        # DataLoader asks, waits five seconds and sends SIGTERM, which workers ignore: one that is stuck would stay.
        _kill(self.processes)
        self.processes = []

    def __next__(self) -> tuple[WorkerBatch, float]:
        if self._items is None:
            raise RuntimeError("the loader was closed; make another one to read on")
        began = time.monotonic()
        try:
            item = next(self._items)
        except (RuntimeError, EOFError, ConnectionError) as err:
            # A batch is fetched from the memory of its worker: from a dead one, that ends early or is refused.
            if isinstance(err, RuntimeError) and ("DataLoader worker" not in str(err) or "Traceback" in str(err)):
                raise
            raise RuntimeError(
                f"a process of data.num_workers ended by itself ({err or type(err).__name__}); if it was killed, the host "
                "ran out of memory (dmesg says so): set data.num_workers lower, or give the job more memory and /dev/shm"
            ) from err
        if isinstance(item, SampleError):
            raise item
        return item, time.monotonic() - began
