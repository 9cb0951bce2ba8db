"""A server's validation images, for trainers whose hosts have none: the batches of `EvalLoader`, as its workers make them.

Asked for by payload=evaluation. The layout of such a request is (batch size, no accumulation, ranks); its step is the number of the batch.
"""

from __future__ import annotations

import threading
from dataclasses import replace

from m2mkd_ds.data.batch import WorkerBatch
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.plan import num_eval_batches
from m2mkd_ds.teacher.protocol.wire import FeedError, GetBatch
from m2mkd_ds.teacher.server.decode_pool import Decoder, make_decoder
from m2mkd_ds.teacher.server.layout_batches import Stream


class EvaluationImages:
    """Decodes on request; its workers start with the first one. Safe to call from several threads."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = None if stream is None else replace(stream, evaluation=True)
        self._decoder: Decoder | None = None
        self._closed = False
        self._lock = threading.Lock()

    def batch(self, request: GetBatch) -> WorkerBatch:
        """Raises FeedError: bad_request for a batch that does not exist, data for a damaged image. SampleError (transform)."""
        if self._stream is None:
            raise FeedError("bad_request", "payload: this server has no validation images; start it where data.validation is")
        layout = request.layout
        number, micro_step, rank = layout.place(request.start)
        count = num_eval_batches(
            rank, batch_size=layout.micro_batch_size, world=layout.world, num_samples=self._stream.index.num_samples
        )  # fmt: skip
        if layout.accumulation != 1 or number >= count:
            raise FeedError("bad_request", f"start: rank {rank} has {count} evaluation batches, number {number} was asked for")
        try:
            return self._workers().decode(layout, number, micro_step, rank)
        except SampleError as err:
            if err.kind == "transform":  # a fault of the code, not of the data
                raise
            raise FeedError("data", f"a validation image cannot be read: {err}") from err

    def close(self) -> None:
        """End the workers."""
        with self._lock:
            self._closed = True
            if self._decoder is not None:
                self._decoder.close()

    def _workers(self) -> Decoder:
        with self._lock:
            if self._closed:
                raise FeedError("draining", "this server is about to stop")
            if self._decoder is None:
                assert self._stream is not None
                self._decoder = make_decoder(self._stream)
            return self._decoder
