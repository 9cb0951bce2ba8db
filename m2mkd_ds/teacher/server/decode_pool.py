"""Decoding for a server: any micro-batch of any layout, in processes of its own, several at a time.

    decode(layout, step, micro_step, rank) -> a free worker's process -> images through memory shared with it -> WorkerBatch

One thread talks to one worker at a time over a pipe of their own, so a dead worker can leave no lock behind: its thread sees the end
of the process, starts another in its place and tries once more. Workers start as a loader's do (data/worker_start.py): the server
itself, with its threads and CUDA, is never forked. With num_workers=0 the calling thread decodes.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import numpy as np
import torch
import torch.multiprocessing  # teaches pipes to pass tensors by reference
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.batches import EvalBatches, TrainBatches
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.shards.processes import end_with_parent
from m2mkd_ds.data.worker_start import ignore_stop_signals, worker_context
from m2mkd_ds.data_config import check_mixing

log = logging.getLogger("m2mkd_ds")

MAX_LAYOUTS = 4
"""Layouts that are kept ready; each holds up to two epochs' orders."""
_CLOSE_S = 5.0


class DecodeError(RuntimeError):
    """A worker ended or froze, or failed with an error of ours."""


@dataclass(frozen=True)
class Stream:
    """What micro-batches are made from."""

    index: ShardIndex
    data: DataConfig
    seed: int
    slack_s: float = 60.0
    """What a micro-batch may take beyond the time that its shards may take; the start of a process counts, too."""
    evaluation: bool = False
    """Validation images in the batches of an evaluation, instead of augmented ones in those of training."""

    @property
    def timeout_s(self) -> float:
        """How long one micro-batch may take: reads have a deadline of their own, and come first."""
        return 2 * self.data.io_deadline_s + self.slack_s

    def image_bytes(self, count: int) -> int:
        """Bytes of decoded images: uint8 with decode=fast, else fp32."""
        return count * 3 * self.data.image_size**2 * (1 if self.data.decode == "fast" else 4)


class Decoder(Protocol):
    """Makes any micro-batch. Safe from several threads."""

    def decode(self, layout: BatchLayout, step: int, micro_step: int, rank: int) -> WorkerBatch:
        """Raises SampleError (transform) where augmentation fails, DecodeError."""
        ...

    def close(self) -> None:
        """End the workers; calls under way raise DecodeError."""
        ...


def make_decoder(stream: Stream, *, pin: bool = False, replaced: Callable[[], None] = lambda: None) -> Decoder:
    """As `data.num_workers` says. `pin`: page-locked images, for a GPU. `replaced` is told of every worker that was."""
    if stream.data.num_workers:
        return DecodePool(stream, pin=pin, replaced=replaced)
    return DecodeHere(stream, pin=pin)


class LayoutBatches:
    """Batches of the layouts that were used last. Not thread-safe."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._made: OrderedDict[BatchLayout, TrainBatches | EvalBatches] = OrderedDict()

    def of(self, layout: BatchLayout) -> TrainBatches | EvalBatches:
        """Raises ValueError for a layout that this stream cannot have."""
        batches = self._made.get(layout)
        if batches is None:
            batches = self._made[layout] = self._make(layout)
            if len(self._made) > MAX_LAYOUTS:
                self._made.popitem(last=False)
        self._made.move_to_end(layout)
        return batches

    def _make(self, layout: BatchLayout) -> TrainBatches | EvalBatches:
        stream = self._stream
        if stream.evaluation:
            return EvalBatches(stream.index, stream.data, batch_size=layout.micro_batch_size, rank=0, world=layout.world)
        batches = TrainBatches(stream.index, stream.data, seed=stream.seed, layout=layout, rank=0)
        batches.mixer.check(layout.micro_batch_size)
        check_mixing(stream.data.augment, layout.micro_batch_size, layout.world)
        return batches


class DecodeHere:
    """Decodes in the calling thread, one at a time: augmentation draws from the process's random generators."""

    def __init__(self, stream: Stream, *, pin: bool) -> None:
        self._batches, self._pin = LayoutBatches(stream), pin
        self._lock = threading.Lock()

    def decode(self, layout: BatchLayout, step: int, micro_step: int, rank: int) -> WorkerBatch:
        with self._lock:
            batch = self._batches.of(layout).micro_batch(step, micro_step, rank)
        if isinstance(batch, SampleError):
            raise batch
        return batch.pin_memory() if self._pin else batch

    def close(self) -> None:
        """Nothing runs in the background."""


class DecodePool:
    """`data.num_workers` processes."""

    def __init__(self, stream: Stream, *, pin: bool, replaced: Callable[[], None]) -> None:
        self._stream, self._pin, self._replaced = stream, pin, replaced
        self._lock = threading.Lock()
        self._closed = False
        self._workers = [_Worker(stream) for _ in range(stream.data.num_workers)]
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for worker in self._workers:
            worker.start()
            self._idle.put(worker)

    @property
    def process_ids(self) -> tuple[int, ...]:
        """Of the workers that run."""
        return tuple(pid for worker in self._workers if (pid := worker.process_id) is not None)

    def decode(self, layout: BatchLayout, step: int, micro_step: int, rank: int) -> WorkerBatch:
        """On the worker that is free next."""
        try:
            worker = self._idle.get(timeout=self._stream.timeout_s)
        except queue.Empty:
            raise DecodeError(f"no worker of data.num_workers was free within {self._stream.timeout_s:g} s; set it higher") from None
        try:
            if worker is None:
                raise DecodeError("this server's workers were ended")
            return self._decode_on(worker, (layout, step, micro_step, rank))
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the workers at once (they hold nothing) and wait for their threads, for some seconds."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for worker in self._workers:
                worker.kill()
        for _ in self._workers:
            try:
                returned = self._idle.get(timeout=_CLOSE_S)
            except queue.Empty:
                log.warning("a thread of the teacher server did not let go of its worker within %g s", _CLOSE_S)
                break
            if returned is not None:
                returned.forget()
        self._idle.put(None)

    def _decode_on(self, worker: _Worker, job: _Job) -> WorkerBatch:
        for is_last in (False, True):
            try:
                with self._lock:
                    if self._closed:
                        raise DecodeError("this server's workers were ended")
                    worker.start()
                return worker.run(job, self._stream, pin=self._pin)
            except _GoneError as gone:
                worker.forget()
                if not self._closed:
                    self._replaced()
                    log.warning("%s; another one takes its place", gone)
                if is_last or gone.is_late or self._closed:
                    raise DecodeError(str(gone)) from gone
        raise AssertionError("the second try returns or raises")


_Job = tuple[BatchLayout, int, int, int]
_Reply = tuple["WorkerBatch | SampleError | str", tuple[int, ...], "torch.dtype | None"]
"""A batch whose small tensors are arrays, and shape and dtype of the images that lie in the shared memory; or what went wrong."""


class _GoneError(Exception):
    """The worker cannot be used any more."""

    def __init__(self, message: str, *, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class _Worker:
    """One process, the pipe to it, and the memory that it leaves images in: always the same, so fresh pages cost nothing."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._process: Any = None
        self._link: Any = None
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def process_id(self) -> int | None:
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Unless it runs."""
        if self._process is not None:
            return
        context: Any = worker_context()  # its base class knows no Process
        self._link, theirs = context.Pipe()
        self._memory = torch.empty(0, dtype=torch.uint8)
        process = context.Process(target=_work, args=(theirs, self._stream), daemon=True, name="m2mkd-decode")
        process.start()
        theirs.close()
        self._process = process

    def kill(self) -> None:
        """From any thread; the one that waits for it sees its end."""
        process = self._process  # `forget` may take it away meanwhile
        if process is not None:
            process.kill()

    def forget(self) -> None:
        """End the process, if it still runs."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.join(_CLOSE_S)
        self._link.close()

    def run(self, job: _Job, stream: Stream, *, pin: bool) -> WorkerBatch:
        """Raises _GoneError when there is no answer, SampleError, DecodeError for an error of ours."""
        try:
            self._make_room(stream.image_bytes(job[0].micro_batch_size))
            self._link.send(job)
            if not wait([self._link, self._process.sentinel], stream.timeout_s):
                raise _GoneError(f"a process of data.num_workers did not answer within {stream.timeout_s:g} s", is_late=True)
            found, shape, dtype = self._link.recv()
        except (EOFError, OSError) as err:
            raise _GoneError(
                "a process of data.num_workers ended by itself; if it was killed, the host ran out of memory (dmesg says so): set "
                "data.num_workers lower, or give the server more memory"
            ) from err
        if isinstance(found, SampleError):
            raise found
        if isinstance(found, str):
            raise DecodeError(f"a process of data.num_workers failed: {found}")
        images = torch.empty(shape, dtype=dtype, pin_memory=pin)
        images.copy_(_view(self._memory, shape, dtype))
        batch: WorkerBatch = replace(_changed(found, np.ndarray, torch.from_numpy), images=images)
        return batch.pin_memory() if pin else batch

    def _make_room(self, num_bytes: int) -> None:
        if self._memory.numel() < num_bytes:
            self._memory = torch.empty(num_bytes, dtype=torch.uint8).share_memory_()
            self._link.send(self._memory)


def _work(jobs: Connection, stream: Stream) -> None:
    """The worker's process: until the other end of its pipe is closed."""
    end_with_parent()
    # Ctrl-C goes to the whole group, a service manager's SIGTERM to all of its processes; the server ends its workers itself.
    ignore_stop_signals()
    torch.set_num_threads(1)
    batches = LayoutBatches(stream)
    memory = torch.empty(0, dtype=torch.uint8)
    while True:
        try:
            job = jobs.recv()
            if isinstance(job, Tensor):
                memory = job
            else:
                jobs.send(_reply(batches, job, memory))
        except (EOFError, ConnectionError):
            return


def _reply(batches: LayoutBatches, job: _Job, memory: Tensor) -> _Reply:
    layout, *place = job
    try:
        batch = batches.of(layout).micro_batch(*place)
    except Exception as err:
        log.exception("decoding step %d, micro-step %d of rank %d", *place)
        return f"{type(err).__name__}: {err}", (), None
    if isinstance(batch, SampleError):
        return batch, (), None
    images = batch.images
    _view(memory, tuple(images.shape), images.dtype).copy_(images)
    # Small tensors go by value: each that goes by reference would keep a file descriptor open for as long as it is cached.
    small = _changed(replace(batch, images=torch.empty(0)), Tensor, Tensor.numpy)
    return small, tuple(images.shape), images.dtype


def _view(memory: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _changed(batch: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A copy of a batch with every value of `kind` changed, also inside `work`."""
    changed = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, kind):
            changed[field.name] = change(value)
        elif field.name == "work" and is_dataclass(value):
            changed[field.name] = _changed(value, kind, change)
    return replace(batch, **changed)
