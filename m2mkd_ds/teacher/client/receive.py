"""From a server's answer to the batch that students train on: checked, moved to the device, prefix run here where the image travelled.

In fp32 the bytes are those of the colocated feed: the same functions run on the same numbers, on whichever side.
Shape letters: B images, L tokens, D teacher width, V classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batch import DeviceWork, WorkerBatch
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.teacher.protocol.answer_check import AnswerShapes, check_answer, check_specs
from m2mkd_ds.teacher.protocol.codec import TensorSpec
from m2mkd_ds.teacher.protocol.numbers import from_wire
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, GetBatch


class Assembler:
    """Makes TeacherBatch of Answer for `pairs`, on `device` and in `dtype`.

    `meta`: with payload=image, the stages of the prefixes; otherwise it is not run. `shapes`: what every answer of the run must be like.
    """

    def __init__(
        self,
        data: DataConfig,
        pairs: tuple[TeachingPair, ...],
        meta: FrozenMeta,
        shapes: AnswerShapes,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.device, self.dtype = device, dtype
        self._meta, self._shapes = meta, shapes
        self._pairs = {pair.index: pair for pair in pairs}
        self._finish = Finisher(data, device, smoothing=data.augment.label_smoothing)

    def expect(self, head: AnswerHead, specs: Sequence[TensorSpec], request: GetBatch) -> None:
        """Whether what a head announces is what was asked for, before there is memory for it. Raises LinkError(corrupt)."""
        check_specs(head, specs, request, self._shapes)

    def receive(self, answer: Answer, request: GetBatch) -> Answer:
        """The answer, fit for `batch`: checked against the request and, for a GPU, in page-locked memory. Any thread may call it.

        Raises LinkError(corrupt) naming the tensor that cannot be, FeedError(poisoned) for targets or logits that are not finite.
        """
        check_answer(answer, request, self._shapes)
        if self.device.type != "cuda":
            return answer
        # Copies to a GPU run beside its work only from page-locked memory.
        pinned = {name: tensor if tensor.is_pinned() else tensor.pin_memory() for name, tensor in answer.tensors.items()}
        return replace(answer, tensors=pinned)

    def batch(self, answer: Answer, request: BatchRequest, wait_s: float) -> TeacherBatch:
        """What the request asked for, out of an answer that `receive` let pass; it may hold more pairs than that.

        The answer is released by this. Without pixels in it (payload=logits) there are no hidden states, and the targets are empty [B, 0].
        Raises RuntimeError for the answer of another place in the stream.
        """
        tensors, head = answer.tensors, answer.head
        if (head.start, head.step, head.micro_step) != (request.slots.start, request.step, request.micro_step):
            raise RuntimeError(
                f"step {request.step}.{request.micro_step} at stream position {request.slots.start} was asked for, and the answer is that "
                f"of step {head.step}.{head.micro_step} at position {head.start}"
            )
        hidden = {i: self._hidden(tensors, f"hidden.{i}") for i in request.pairs if f"hidden.{i}" in tensors}
        targets_BV = tensors["targets"].to(self.device, non_blocking=True) if "targets" in tensors else torch.empty(len(request.slots), 0)
        if "image.pixels" in tensors and (head.payload == "image" or 0 in request.pairs):
            images = self._finish(worker_batch(answer, request), wait_s)
            pairs = [self._pairs[i] for i in request.pairs if i not in hidden]
            hidden |= self._meta.hidden_states(images.images_BCHW.to(self.device, self.dtype, non_blocking=True), pairs)
            targets_BV = targets_BV if "targets" in tensors else images.targets_BV
        logits = {}
        if request.with_teacher:
            logits = {i: tensors[f"logits.{i}"].to(self.device, non_blocking=True) for i in request.pairs}
        batch = TeacherBatch(
            hidden={i: hidden[i] for i in request.pairs if i in hidden}, teacher_logits=logits, targets_BV=targets_BV,
            # From the answer, not the request: what the run's ledger holds is what came.
            slot_ids_B=torch.arange(head.start, head.start + len(request.slots)), bad=head.bad, lost=head.lost, wait_s=wait_s,
            fallbacks=head.fallbacks,
        )  # fmt: skip
        self._release(answer)
        return batch

    def _hidden(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        """On the device, in the dtype of the run: the one cast of a hidden state that travelled in another."""
        scale = tensors.get(f"{name}.scale")
        moved = None if scale is None else scale.to(self.device, non_blocking=True)
        return from_wire(tensors[name].to(self.device, non_blocking=True), moved, self.dtype)

    def _release(self, answer: Answer) -> None:
        """Give the answer's memory back, once the copies that were queued above are done."""
        if self.device.type != "cuda":
            answer.release()
            return
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        answer.release(copied)


def worker_batch(answer: Answer, request: BatchRequest) -> WorkerBatch:
    """The image.* tensors as a loader's worker handed them over on the server."""
    named, head = answer.tensors, answer.head
    pixels = named["image.pixels"]
    work = None
    if pixels.dtype == torch.uint8:
        work = DeviceWork(
            flip_B=named.get("image.flip"), erase_E6=named.get("image.erase"), erase_pixels=head.erase_pixels,
            shares_G4=named.get("image.shares"), boxes_G4=named.get("image.boxes"),
        )  # fmt: skip
    else:
        pixels = pixels.float()
    return WorkerBatch(
        images=pixels, labels_B=named["image.labels"], slot_ids_B=torch.tensor(request.slots), step=request.step,
        micro_step=request.micro_step, targets_BV=named.get("image.targets"), work=work, bad=head.bad, fallbacks=head.fallbacks,
        lost=SampleError(head.lost) if head.lost else None,
    )  # fmt: skip
