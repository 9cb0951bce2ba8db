"""Whether an answer is what the trainer asked for: which tensors, of which dtypes and shapes, and numbers that index into others.

Checksums say that bytes came as they were sent; this says that they can be trained on. `check_specs` judges a head, before there is
room for its tensors; `check_answer` the whole. Shape letters: B images, L tokens, D width, V classes, E erased boxes, G mixing groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m2mkd_ds.config import RunConfig
from m2mkd_ds.models.variants import VitArch, meta_device_model
from m2mkd_ds.teacher.codec import TensorSpec
from m2mkd_ds.teacher.wire import INT8_GROUP, TORCH_DTYPES, Answer, AnswerHead, FeedError, GetBatch, LinkError


@dataclass(frozen=True, kw_only=True)
class AnswerShapes:
    """What the trainer knows of every answer of a run, from its own configuration."""

    num_classes: int
    tokens: int
    """L, class and register tokens included."""
    width: int
    """D."""
    image_size: int
    fast: bool
    """data.decode=fast: images travel as uint8, with the work that is left for the device."""
    logits_dtype: str
    """The precision that the teacher computes in, as `fp32` or `bf16`."""


@dataclass(frozen=True)
class _Rule:
    """What one tensor must be; -1 in a shape: any number that is not above the images'."""

    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    required: bool = True


def answer_shapes(config: RunConfig, *, precision: str) -> AnswerShapes:
    """From the run's configuration; builds the teacher without memory."""
    model = meta_device_model(VitArch.from_teacher(config))
    return AnswerShapes(
        num_classes=config.data.num_classes, tokens=model.patch_embed.num_patches + model.num_prefix_tokens, width=model.embed_dim,
        image_size=config.data.image_size, fast=config.data.decode == "fast", logits_dtype=precision,
    )  # fmt: skip


def check_specs(head: AnswerHead, specs: Sequence[TensorSpec], request: GetBatch, shapes: AnswerShapes) -> None:
    """Raises LinkError(corrupt) naming what differs: the question, a tensor that lacks or nobody asked for, its dtype, its shape."""
    _check_head(head, request)
    rules = _rules(request, shapes)
    given = {spec.name: spec for spec in specs}
    lacking = [name for name, rule in rules.items() if rule.required and name not in given]
    foreign = [name for name in given if name not in rules]
    if lacking or foreign:
        raise LinkError("corrupt", f"the answer lacks {lacking or 'nothing'} and has {foreign[:8] or 'nothing'} that was not asked for")
    count = request.layout.micro_batch_size
    for name, spec in given.items():
        rule = rules[name]
        fits = len(spec.shape) == len(rule.shape) and all(
            size == wanted or (wanted == -1 and 0 < size <= count) for size, wanted in zip(spec.shape, rule.shape, strict=True)
        )
        if spec.dtype not in rule.dtypes or not fits:
            wanted = f"{' or '.join(rule.dtypes)} {['up to ' + str(count) if n == -1 else n for n in rule.shape]}"
            raise LinkError("corrupt", f"{name} is {spec.dtype} {list(spec.shape)}; expected {wanted}")
    _check_together(given, head.erase_pixels, count)


def check_answer(answer: Answer, request: GetBatch, shapes: AnswerShapes, *, finite: bool = True) -> None:
    """Raises LinkError(corrupt) for an answer that is not one to `request`, FeedError(poisoned) for numbers that are not finite.

    `finite`: look into hidden states and images, too, not only into targets and logits: 3 ms for 52 MB.
    """
    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    specs = [TensorSpec(name, names[t.dtype], tuple(t.shape)) for name, t in answer.tensors.items()]  # type: ignore[arg-type]
    check_specs(answer.head, specs, request, shapes)
    tensors = answer.tensors
    for name, tensor in tensors.items():
        small = name.startswith("logits.") or name.endswith(("targets", ".scale", "shares"))
        if tensor.is_floating_point() and (small or finite) and not is_finite(tensor):
            slots = tuple(range(request.start, request.start + request.layout.micro_batch_size))
            raise FeedError("poisoned", f"{name} of slots {slots[0]} to {slots[-1]} is not finite", slots=slots)
    for name in ("targets", "image.targets", "image.shares"):
        # Shares of classes and of images; rounding may lift a sum of them above 1 by a little.
        _check_range(tensors, name, 0.0, 1.001)
    _check_range(tensors, "image.labels", 0, shapes.num_classes - 1)
    if "image.flip" in tensors and int(tensors["image.flip"].view(torch.uint8).max()) > 1:
        raise LinkError("corrupt", "image.flip holds bytes that are neither true nor false")
    if "image.erase" in tensors:
        _check_erase(tensors["image.erase"], answer.head.erase_pixels, request.layout.micro_batch_size, shapes.image_size)
    _check_range(tensors, "image.boxes", 0, shapes.image_size)


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, in one pass without temporary memory; torch.isfinite takes 40 times as long."""
    # NaN anywhere makes both NaN.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _check_head(head: AnswerHead, request: GetBatch) -> None:
    if not head.answers(request):
        raise LinkError("corrupt", f"an answer for position {head.start}, attempt {head.attempt}, to a request for {request.start}")
    step, micro_step, _ = request.layout.place(request.start)
    count = request.layout.micro_batch_size
    if (head.step, head.micro_step) != (step, micro_step):
        raise LinkError("corrupt", f"the answer says step {head.step}.{head.micro_step}; position {request.start} is {step}.{micro_step}")
    if head.fallbacks > count:
        raise LinkError("corrupt", f"the answer tells of {head.fallbacks} images decoded by Pillow; there are {count}")
    outside = [bad.position for bad in head.bad if not request.start <= bad.position < request.start + count]
    if outside:
        raise LinkError("corrupt", f"the answer tells of a damaged sample at position {outside[0]}, which is not in the micro-batch")


def _rules(request: GetBatch, shapes: AnswerShapes) -> dict[str, _Rule]:
    """By name, all tensors that the answer must or may have."""
    count, classes = request.layout.micro_batch_size, shapes.num_classes
    rules: dict[str, _Rule] = {}
    if request.payload == "hidden":
        hidden = (count, shapes.tokens, shapes.width)
        later = [i for i in request.pairs if i > 0]
        rules |= {f"hidden.{i}": _Rule((request.wire_dtype,), hidden) for i in later}
        if request.wire_dtype == "int8":
            groups = -(-shapes.width // INT8_GROUP)
            rules |= {f"hidden.{i}.scale": _Rule(("fp32",), (count, shapes.tokens, groups)) for i in later}
        rules["targets"] = _Rule(("fp32",), (count, classes))
    if request.payload == "image" or (request.payload == "hidden" and 0 in request.pairs):
        rules |= _image_rules(request, shapes)
    if request.with_teacher:
        rules |= {f"logits.{i}": _Rule((shapes.logits_dtype,), (count, classes)) for i in request.pairs}
    return rules


def _image_rules(request: GetBatch, shapes: AnswerShapes) -> dict[str, _Rule]:
    count, side = request.layout.micro_batch_size, shapes.image_size
    labels = _Rule(("int64",), (count,))
    if not shapes.fast:
        floats = ("fp32",) if request.wire_dtype == "int8" else tuple(dict.fromkeys(("fp32", request.wire_dtype)))
        return {
            "image.pixels": _Rule(floats, (count, 3, side, side)),
            "image.labels": labels,
            "image.targets": _Rule(("fp32",), (count, shapes.num_classes)),
        }
    return {
        "image.pixels": _Rule(("uint8",), (count, side, side, 3)),
        "image.labels": labels,
        "image.flip": _Rule(("bool",), (count,), required=False),
        "image.erase": _Rule(("int64",), (-1, 6), required=False),
        "image.shares": _Rule(("fp32",), (-1, 4), required=False),
        "image.boxes": _Rule(("int64",), (-1, 4), required=False),
    }


def _check_together(given: dict[str, TensorSpec], erase_pixels: int, count: int) -> None:
    shares, boxes = given.get("image.shares"), given.get("image.boxes")
    if (shares is None) != (boxes is None) or (shares and boxes and shares.shape[0] != boxes.shape[0]):
        raise LinkError("corrupt", "image.shares and image.boxes must have one row a mixing group, both")
    if shares is not None and count % shares.shape[0]:
        raise LinkError("corrupt", f"image.shares has {shares.shape[0]} groups, which do not divide {count} images")
    if "image.pixels" in given and "image.erase" not in given and erase_pixels:
        raise LinkError("corrupt", f"the answer tells of {erase_pixels} erased pixels and has no image.erase")


def _check_range(tensors: dict[str, Tensor], name: str, low: float, high: float) -> None:
    tensor = tensors.get(name)
    if tensor is not None and not (low <= float(tensor.min()) and float(tensor.max()) <= high):
        raise LinkError("corrupt", f"{name} runs from {float(tensor.min()):g} to {float(tensor.max()):g}; allowed is {low:g} to {high:g}")


def _check_erase(boxes_E6: Tensor, pixels: int, count: int, side: int) -> None:
    """Every box in its image, and areas that sum to what the head says: on a GPU a wrong sum would go unnoticed."""
    image_E, top_E, left_E, height_E, width_E, _ = boxes_E6.unbind(1)
    inside = (image_E >= 0) & (image_E < count)
    for first_E, size_E in ((top_E, height_E), (left_E, width_E)):
        inside &= (first_E >= 0) & (first_E <= side) & (size_E >= 0) & (size_E <= side) & (first_E + size_E <= side)
    if not inside.all():
        raise LinkError("corrupt", "image.erase has a box outside of the images")
    if int((height_E * width_E).sum()) != pixels:
        raise LinkError("corrupt", f"image.erase covers {int((height_E * width_E).sum())} pixels, the answer says {pixels}")
