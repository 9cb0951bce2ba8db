"""Validation images from a teacher server, for a trainer whose host has the index of the shards and not the shards."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from m2mkd_ds.config import DataConfig, TeacherConfig
from m2mkd_ds.data.batch import ImageBatch
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout, eval_samples, num_eval_batches
from m2mkd_ds.teacher.client.answer_stream import AnswerStream
from m2mkd_ds.teacher.client.links import Pace
from m2mkd_ds.teacher.client.receive import worker_batch
from m2mkd_ds.teacher.feed import BatchRequest
from m2mkd_ds.teacher.protocol.answer_check import AnswerShapes, check_answer, check_specs
from m2mkd_ds.teacher.protocol.codec import TensorSpec
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import OLDEST_PROTOCOL, PROTOCOL_VERSION, Answer, AnswerHead, GetBatch, Hello, LinkError


class RemoteEvalLoader:
    """The batches of `EvalLoader`, bit for bit. Iterating raises TeacherLostError and TeacherRefusedError (RuntimeError).

    Labels are compared with those of the trainer's own index, so a server of other images is found at the first batch. When no server
    answers it waits as `teacher.patience_s` says, whatever `on_teacher_loss` is: without shards nothing else can be done.
    """

    def __init__(
        self,
        index: ShardIndex,
        data: DataConfig,
        config: TeacherConfig,
        connect: Callable[[str], Connection],
        shapes: AnswerShapes,
        fingerprints: Mapping[str, str],
        *,
        batch_size: int,
        rank: int,
        world: int,
        device: torch.device,
    ) -> None:
        self.index = index
        self._config, self._connect, self._shapes, self._device = config, connect, shapes, device
        self._image_size, self._rank = data.image_size, rank
        self._layout = BatchLayout(micro_batch_size=batch_size, accumulation=1, world=world)
        self._numbers = range(num_eval_batches(rank, batch_size=batch_size, world=world, num_samples=index.num_samples))
        self._finish = Finisher(data, device, smoothing=0.0)
        self._hello = Hello(
            oldest_protocol=OLDEST_PROTOCOL, newest_protocol=PROTOCOL_VERSION, client=secrets.token_hex(8), rank=rank, layout=self._layout,
            pairs=(0,), payload="evaluation", wire_dtype="fp32", with_teacher=False, fingerprints=dict(fingerprints),
        )  # fmt: skip
        self._open: AnswerStream | None = None

    def __len__(self) -> int:
        """Batches of this rank."""
        return len(self._numbers)

    def no_images(self) -> torch.Tensor:
        """A batch of zero images, for a rank that has to keep step with others."""
        return torch.zeros(0, 3, self._image_size, self._image_size)

    def __iter__(self) -> Iterator[ImageBatch]:
        self.close()
        if not self._numbers:
            return
        stream = self._open = AnswerStream(
            self._hello, self._numbers, self._start_of, self._config, self._connect, None, self._expect, self._receive, Pace()
        )  # fmt: skip
        try:
            for number in self._numbers:
                answer, wait_s = stream.take()
                # `slots` only has to be as long as the batch; the numbers of the samples follow.
                samples = self._samples(number)
                batch = worker_batch(answer, BatchRequest(number, 0, range(len(samples)), (0,), False))
                finished = self._finish(batch, wait_s)
                yield ImageBatch(
                    finished.images_BCHW.clone(), finished.targets_BV.clone(), batch.labels_B.clone(), torch.tensor(samples), number, 0,
                    fallbacks=batch.fallbacks, wait_s=wait_s,
                )  # fmt: skip
                if self._device.type == "cpu":  # copies to a GPU may still be queued; then the memory goes with the answer
                    answer.release()
        finally:  # also where a server refuses, or whoever reads stops early
            stream.close()

    def close(self) -> None:
        """End threads and connections."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def _start_of(self, number: int) -> int:
        return self._layout.positions(number, 0, self._rank).start

    def _samples(self, number: int) -> range:
        layout = self._layout
        return eval_samples(
            number, self._rank, batch_size=layout.micro_batch_size, world=layout.world, num_samples=self.index.num_samples
        )  # fmt: skip

    def _expect(self, head: AnswerHead, specs: Sequence[TensorSpec], request: GetBatch) -> None:
        """Raises LinkError(corrupt) for a head that announces anything but the batch's images."""
        check_specs(head, specs, request, self._shapes)

    def _receive(self, answer: Answer, request: GetBatch) -> Answer:
        """The answer, if it holds the batch's samples. Raises LinkError(corrupt)."""
        check_answer(answer, request, self._shapes)
        number, _, _ = request.layout.place(request.start)
        samples = self._samples(number)
        labels = self.index.table["label"][samples.start : samples.stop : samples.step]
        given_B = answer.tensors["image.labels"]
        if len(answer.tensors["image.pixels"]) != len(samples) or given_B.tolist() != labels.tolist():
            raise LinkError("corrupt", f"evaluation batch {number} does not hold the labels of this trainer's index: other images")
        return answer
