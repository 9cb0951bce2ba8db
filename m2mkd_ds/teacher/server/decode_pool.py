"""Decoding for a server: any micro-batch of any layout, in processes of its own, several at a time.

    decode(layout, step, micro_step, rank) -> a free worker's process -> images through memory shared with it -> WorkerBatch

One thread talks to one worker at a time over a pipe of their own, so a dead worker can leave no lock behind: its thread sees the end
of the process, starts another in its place and tries once more. Workers start as a loader's do (data/worker_start.py): the server
itself, with its threads and CUDA, is never forked. With num_workers=0 the calling thread decodes.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.server.decode_worker import CLOSE_S, DecodeError, GoneError, Job, Worker
from m2mkd_ds.teacher.server.layout_batches import LayoutBatches, Stream

log = logging.getLogger("m2mkd_ds")


class Decoder(Protocol):
    """Makes any micro-batch. Safe from several threads."""

    def decode(self, layout: BatchLayout, step: int, micro_step: int, rank: int) -> WorkerBatch:
        """Raises SampleError (transform) where augmentation fails, other SampleError and ShardError of the data, DecodeError."""
        ...

    def close(self) -> None:
        """End the workers; calls under way raise DecodeError."""
        ...


def make_decoder(stream: Stream, *, pin: bool = False, replaced: Callable[[], None] = lambda: None) -> Decoder:
    """As `data.num_workers` says. `pin`: page-locked images, for a GPU. `replaced` is told of every worker that was."""
    if stream.data.num_workers:
        return DecodePool(stream, pin=pin, replaced=replaced)
    return DecodeHere(stream, pin=pin)


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
        self._workers = [Worker(stream) for _ in range(stream.data.num_workers)]
        self._idle: queue.SimpleQueue[Worker | None] = queue.SimpleQueue()
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
                returned = self._idle.get(timeout=CLOSE_S)
            except queue.Empty:
                log.warning("a thread of the teacher server did not let go of its worker within %g s", CLOSE_S)
                break
            if returned is not None:
                returned.forget()
        self._idle.put(None)

    def _decode_on(self, worker: Worker, job: Job) -> WorkerBatch:
        for is_last in (False, True):
            try:
                with self._lock:
                    if self._closed:
                        raise DecodeError("this server's workers were ended")
                    worker.start()
                return worker.run(job, self._stream, pin=self._pin)
            except GoneError as gone:
                worker.forget()
                if not self._closed:
                    self._replaced()
                    log.warning("%s; another one takes its place", gone)
                if is_last or gone.is_late or self._closed:
                    raise DecodeError(str(gone)) from gone
        raise AssertionError("the second try returns or raises")
