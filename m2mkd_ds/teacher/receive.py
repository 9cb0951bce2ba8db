"""From a server's answer to the batch that students train on: checked, moved to the device, prefix run here where the image travelled.

In fp32 the bytes are those of the colocated feed: the same functions run on the same numbers, on whichever side.
Shape letters: B images, L tokens, D teacher width, C channels, H W pixels, V classes, E erased boxes, G mixing groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batch import DeviceWork, WorkerBatch
from m2mkd_ds.data.device_ops import Finisher
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.teacher.wire import TORCH_DTYPES, Answer, GetBatch, LinkError

_Dim: TypeAlias = "int | None"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Expected:
    """What a tensor of an answer may be; a dimension None is open."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[_Dim, ...]
    needed: bool = True

    def fits(self, tensor: Tensor) -> bool:
        sizes = zip(tensor.shape, self.shape, strict=False)
        return tensor.dtype in self.dtypes and tensor.dim() == len(self.shape) and all(want in (None, got) for got, want in sizes)


class Assembler:
    """Makes TeacherBatch of Answer for `pairs`, on `device` and in `dtype`.

    `meta`: with payload=image, the stages of the prefixes; otherwise it is not run.
    """

    def __init__(
        self, data: DataConfig, pairs: tuple[TeachingPair, ...], meta: FrozenMeta, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.device, self.dtype = device, dtype
        self._data, self._meta = data, meta
        self._pairs = {pair.index: pair for pair in pairs}
        self._finish = Finisher(data, device, smoothing=data.augment.label_smoothing)

    def receive(self, answer: Answer, request: GetBatch) -> Answer:
        """The answer, fit for `batch`: checked against the request and, for a GPU, in page-locked memory. Any thread may call it.

        Raises LinkError(corrupt) naming the tensor that cannot be.
        """
        expected = self._expected(request)
        for name, tensor in answer.tensors.items():
            if name not in expected:
                raise LinkError("corrupt", f"the answer holds {name}, which was not asked for")
            if not expected[name].fits(tensor):
                raise LinkError("corrupt", f"{name} is {tensor.dtype} {list(tensor.shape)}; expected {expected[name]}")
        missing = sorted(name for name, spec in expected.items() if spec.needed and name not in answer.tensors)
        if missing:
            raise LinkError("corrupt", f"the answer lacks {missing[0]}")
        if "image.erase" in answer.tensors:
            self._check_boxes(answer.tensors["image.erase"], answer.head.erase_pixels, request.layout.micro_batch_size)
        if self.device.type != "cuda":
            return answer
        # Copies to a GPU run beside its work only from page-locked memory.
        return replace(answer, tensors={name: tensor.pin_memory() for name, tensor in answer.tensors.items()})

    def batch(self, answer: Answer, request: BatchRequest, wait_s: float) -> TeacherBatch:
        """What the request asked for, out of an answer that `receive` let pass; it may hold more pairs than that.

        Without pixels in the answer (payload=logits) there are no hidden states, and the targets are empty [B, 0].
        """
        tensors, head = answer.tensors, answer.head
        hidden = {i: self._moved(tensors[f"hidden.{i}"]) for i in request.pairs if f"hidden.{i}" in tensors}
        targets_BV = tensors["targets"].to(self.device, non_blocking=True) if "targets" in tensors else torch.empty(len(request.slots), 0)
        if "image.pixels" in tensors and (head.payload == "image" or 0 in request.pairs):
            images = self._finish(worker_batch(answer, request), wait_s)
            pairs = [self._pairs[i] for i in request.pairs if i not in hidden]
            hidden |= self._meta.hidden_states(images.images_BCHW.to(self.device, self.dtype, non_blocking=True), pairs)
            targets_BV = targets_BV if "targets" in tensors else images.targets_BV
        logits = {}
        if request.with_teacher:
            logits = {i: tensors[f"logits.{i}"].to(self.device, non_blocking=True) for i in request.pairs}
        return TeacherBatch(
            hidden={i: hidden[i] for i in request.pairs if i in hidden}, teacher_logits=logits, targets_BV=targets_BV,
            slot_ids_B=torch.tensor(request.slots), bad=head.bad, lost=head.lost, wait_s=wait_s, fallbacks=head.fallbacks,
        )  # fmt: skip

    def _moved(self, hidden_BLD: Tensor) -> Tensor:
        """On the device, in the dtype of the run: the one cast of a hidden state that travelled in another."""
        return hidden_BLD.to(self.device, non_blocking=True).to(self.dtype)

    def _expected(self, request: GetBatch) -> dict[str, _Expected]:
        """Every tensor that may be in an answer to `request`, by name."""
        count, num_classes = request.layout.micro_batch_size, self._data.num_classes
        soft = (torch.float32,)
        names: dict[str, _Expected] = {}
        if request.payload == "hidden":
            wire = (TORCH_DTYPES[request.wire_dtype],)
            names |= {f"hidden.{i}": _Expected(wire, (count, None, None)) for i in request.pairs if i > 0}
            names["targets"] = _Expected(soft, (count, num_classes))
        if request.payload == "image" or (request.payload == "hidden" and 0 in request.pairs):
            names |= self._expected_images(count)
        if request.with_teacher:
            names |= {f"logits.{i}": _Expected(_FLOATS, (count, num_classes)) for i in request.pairs}
        return names

    def _expected_images(self, count: int) -> dict[str, _Expected]:
        """As data/batch.py makes them: finished floats with data.decode=pil, else bytes and what the device has to do with them."""
        side = self._data.image_size
        labels = _Expected((torch.int64,), (count,))
        if self._data.decode == "pil":
            targets = _Expected((torch.float32,), (count, self._data.num_classes))
            return {"image.pixels": _Expected(_FLOATS, (count, 3, side, side)), "image.labels": labels, "image.targets": targets}
        numbers, flags = (torch.int64,), (torch.bool,)
        return {
            "image.pixels": _Expected((torch.uint8,), (count, side, side, 3)), "image.labels": labels,
            "image.flip": _Expected(flags, (count,), needed=False), "image.erase": _Expected(numbers, (None, 6), needed=False),
            "image.shares": _Expected((torch.float32,), (None, 4), needed=False),
            "image.boxes": _Expected(numbers, (None, 4), needed=False),
        }  # fmt: skip

    def _check_boxes(self, boxes_E6: Tensor, num_pixels: int, count: int) -> None:
        """A box beyond the image would be written past its end, on a GPU without an error that says so."""
        image_E, top_E, left_E, height_E, width_E, _ = boxes_E6.unbind(1)
        side = self._data.image_size
        inside = (image_E >= 0) & (image_E < count) & (top_E >= 0) & (left_E >= 0) & (height_E >= 0) & (width_E >= 0)
        inside &= (height_E <= side - top_E) & (width_E <= side - left_E)
        if not bool(inside.all()) or int((height_E * width_E).sum()) != num_pixels:
            raise LinkError("corrupt", "image.erase: a box does not lie in its image, or their pixels are not as many as the head says")


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
