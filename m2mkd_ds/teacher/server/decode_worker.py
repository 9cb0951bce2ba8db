"""One process that decodes for a server: the pipe to it, the memory that it leaves images in, and what it does.

A job is one micro-batch. Errors travel as values: of the data by their own kinds, of ours as a sentence.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.multiprocessing  # teaches pipes to pass tensors by reference
from torch import Tensor

from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.shards.processes import end_with_parent
from m2mkd_ds.data.worker_start import ignore_stop_signals, worker_context
from m2mkd_ds.teacher.server.layout_batches import LayoutBatches, Stream

log = logging.getLogger("m2mkd_ds")

CLOSE_S = 5.0
"""How long a process, or a thread that waits for one, may take to end."""


class DecodeError(RuntimeError):
    """A worker ended or froze, or failed with an error of ours."""


Job = tuple[BatchLayout, int, int, int]
_Reply = tuple["WorkerBatch | SampleError | ShardError | str", tuple[int, ...], "torch.dtype | None"]
"""A batch whose small tensors are arrays, and shape and dtype of the images that lie in the shared memory; or what went wrong."""


class GoneError(Exception):
    """The worker cannot be used any more."""

    def __init__(self, message: str, *, is_late: bool = False) -> None:
        super().__init__(message)
        self.is_late = is_late


class Worker:
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
        process.join(CLOSE_S)
        self._link.close()

    def run(self, job: Job, stream: Stream, *, pin: bool) -> WorkerBatch:
        """Raises GoneError when there is no answer, SampleError and ShardError of the data, DecodeError for an error of ours."""
        try:
            self._make_room(stream.image_bytes(job[0].micro_batch_size))
            self._link.send(job)
            if not wait([self._link, self._process.sentinel], stream.timeout_s):
                raise GoneError(f"a process of data.num_workers did not answer within {stream.timeout_s:g} s", is_late=True)
            found, shape, dtype = self._link.recv()
        except (EOFError, OSError) as err:
            raise GoneError(
                "a process of data.num_workers ended by itself; if it was killed, the host ran out of memory (dmesg says so): set "
                "data.num_workers lower, or give the server more memory"
            ) from err
        if isinstance(found, (SampleError, ShardError)):
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
    # Ctrl-C goes to the whole group; the server ends its workers itself.
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


def _reply(batches: LayoutBatches, job: Job, memory: Tensor) -> _Reply:
    layout, *place = job
    try:
        batch = batches.of(layout).micro_batch(*place)
    except ShardError as err:
        return err, (), None
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
