"""Whether trainer and server mean the same thing: fingerprints by field, and golden outputs to compare (golden.py does that).

Fingerprints say that weights, architectures, preprocessing, labels and order are equal; the golden outputs say that both sides compute
the same with them. A fingerprint is the value itself wherever it is short, so that a refusal can name both; long ones are digests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m2mkd_ds import __version__
from m2mkd_ds.config import RunConfig, to_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.models.variants import VitArch, meta_device_model
from m2mkd_ds.teacher.protocol.packing import negotiate
from m2mkd_ds.teacher.protocol.wire import OLDEST_PROTOCOL, PROTOCOL_VERSION, Answer, AnswerHead, FeedError, Golden, Hello, Limits, Welcome
from m2mkd_ds.teacher.server.produce import TeacherParts

PIXEL_FIELDS = ("image_size", "mean", "std", "interpolation", "decode", "augment", "num_classes")
"""Of DataConfig: what a training image's pixels and target follow from."""
GOLDEN_IMAGES = 2
MAX_NAMED_CLASSES = 64
MAX_READABLE = 100
"""Characters of a value that travels as it is."""
WITHHELD = ("weights.teacher.", "data.shards", "data.classes", "version.")
"""Fields, by how they begin, that a trainer may leave out: what it does not have, it cannot compare."""
DECODING = ("version.torch", "version.torchvision", "version.timm", "version.pillow", "version.simplejpeg", "version.numpy")
"""Packages that an image's pixels come out of: decoders, filters, and random numbers of augmentation."""


def digest(value: Any) -> str:
    """BLAKE2b of canonical JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), digest_size=16).hexdigest()


def fingerprints(config: RunConfig, index: ShardIndex | None, *, precision: str, weights: Mapping[str, str]) -> dict[str, str]:
    """By field, of a run as this process has it. `weights`: sha256 of `meta` and of `teacher.I`, by those names.

    `index`: of the training shards; None for a trainer that has none and leaves images to the server.
    """
    tree = to_dict(config)
    data, teacher = tree["data"], tree["teacher"]
    named = {
        "teacher": {key: teacher[key] for key in ("arch", "arch_args", "depths")},
        "meta": {"depths": tree["meta"]["depths"]},
        "model": model_details(config),
        "data": {key: data[key] for key in PIXEL_FIELDS},
        "data.order": data["order"] if data["order"] == "global" else f"{data['order']}/{data['order_window']}",
        "seed": config.seed,
        "precision": precision,
        "weights": dict(weights),
        "version": versions(),
    }
    if index is not None:
        named |= {"data.shards": index.fingerprint, "data.classes": _class_map(index.class_names)}
    return dict(_flat("", named))


def model_details(config: RunConfig) -> dict[str, Any]:
    """Of the teacher's architecture, as timm builds it here: what changes numbers and may hide behind a name or its defaults."""
    model = meta_device_model(VitArch.from_teacher(config))

    def all_of(attribute: str) -> list[Any]:
        return sorted({getattr(module, attribute) for module in model.modules() if hasattr(module, attribute)})

    return {
        "width": model.embed_dim,
        "blocks": len(model.blocks),
        # Heads, epsilons, scales and activations stand in no weight and in no shape.
        "heads": all_of("num_heads"),
        "eps": all_of("eps"),
        "attention_scale": all_of("scale"),
        "kinds": sorted({type(module).__name__ for module in model.modules() if not list(module.children())}),
        "patch_size": list(model.patch_embed.patch_size),
        "tokens": model.patch_embed.num_patches + model.num_prefix_tokens,
        "prefix_tokens": model.num_prefix_tokens,
        "positions": None if model.pos_embed is None else list(model.pos_embed.shape),
        "positions_of_patches_only": bool(model.no_embed_class),
        "pool": model.global_pool,
        "classes": model.num_classes,
        "parameters": digest([[name, list(p.shape)] for name, p in model.named_parameters()]),
    }


def versions() -> dict[str, str]:
    """Of ours and of what numbers come out of; Pillow's with the libjpeg-turbo in it, which wheels bring along."""
    from PIL import features

    found = {"m2mkd_ds": __version__}
    for name in (field.removeprefix("version.") for field in DECODING):
        try:
            # Without the local label: the CPU's and CUDA's builds of a release (2.14.1+cu130) decode alike.
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            found[name] = "not installed"
    found["pillow"] += f" (libjpeg-turbo {features.version('libjpeg_turbo') or 'absent'})"
    return found


def plan_digest(prints: Mapping[str, str], layout: BatchLayout) -> str:
    """Of all that the content of a micro-batch follows from. Versions are compared by themselves (`version_differences`)."""
    compared = {name: value for name, value in prints.items() if not name.startswith("version.")}
    return digest({"prints": compared, "layout": [layout.micro_batch_size, layout.accumulation, layout.world, layout.origin]})


def check_hello(hello: Hello, prints: Mapping[str, str], limits: Limits) -> None:
    """The server's side. Raises FeedError: mismatch naming every field that differs with both values, bad_request past the limits.

    With payload=logits the trainer makes the images itself, so it must name its shards, and versions of what decodes must be equal.
    """
    negotiate(hello.oldest_protocol, hello.newest_protocol)
    if hello.layout.micro_batch_size > limits.max_count:
        raise FeedError("bad_request", f"micro_batch_size is {hello.layout.micro_batch_size}; this server gives at most {limits.max_count}")
    if hello.rank >= hello.layout.world:
        raise FeedError("bad_request", f"rank is {hello.rank}; the layout has {hello.layout.world} ranks")
    served = sorted(int(name.removeprefix("weights.teacher.")) for name in prints if name.startswith("weights.teacher."))
    # Validation images are of no pair.
    absent = [pair for pair in hello.pairs if pair not in served] if hello.payload != "evaluation" else []
    if absent:
        raise FeedError(
            "bad_request",
            f"pairs: the trainer asks for {absent}, this server has the teacher modules of {served}: start it with --pair all, or train "
            "those with --pair",
        )
    _refuse_differences(hello.fingerprints, prints, decodes=hello.payload == "logits")


def check_welcome(welcome: Welcome, prints: Mapping[str, str], *, decodes: bool) -> tuple[str, ...]:
    """The trainer's side of the same: a server may be lax, or another one than the address promised. Raises FeedError(mismatch).

    `decodes`: whether this trainer ever makes images itself (payload=logits, on_teacher_loss=colocate). Returns sentences for the log
    on differences that are allowed: images or outputs may differ by rounding from those of another server or of another day.
    """
    negotiate(welcome.protocol, welcome.protocol, ours=(OLDEST_PROTOCOL, PROTOCOL_VERSION))
    _refuse_differences(prints, welcome.fingerprints, decodes=decodes)
    return version_differences(prints, welcome.fingerprints)


def version_differences(
    ours: Mapping[str, str], theirs: Mapping[str, str], *, us: str = "the trainer", them: str = "the server"
) -> tuple[str, ...]:
    """One sentence for each package whose versions differ; also for two servers, which should make the same pixels."""
    return tuple(
        f"{name}: {us} has {ours[name]}, {them} has {theirs[name]}"
        for name in sorted(ours.keys() & theirs.keys())
        if name.startswith("version.") and ours[name] != theirs[name]
    )


def _refuse_differences(trainer: Mapping[str, str], server: Mapping[str, str], *, decodes: bool) -> None:
    differing = []
    # Class names last: where the shards differ, all of them may.
    for name in sorted(trainer.keys() | server.keys(), key=lambda name: (name.startswith("data.classes"), name)):
        # Who makes the images itself must be able to say from what and by what.
        must_say = not name.startswith(WITHHELD) or (decodes and (name in DECODING or name.startswith("data.")))
        if name.startswith("version.") and not (decodes and name in DECODING):
            continue
        if name not in trainer and must_say:
            differing.append(f"{name}: the trainer does not say, the server has {server[name]}")
        elif name in trainer and trainer[name] != server.get(name):
            differing.append(f"{name}: the trainer has {trainer[name]}, the server has {server.get(name, 'none')}")
    if any(text.startswith("version.") for text in differing):
        differing.append("who makes images itself needs the server's versions: install them, or use teacher.payload=hidden or image")
    if differing:
        more = f"; and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise FeedError("mismatch", "; ".join(differing[:8]) + more)


def _class_map(names: Sequence[str]) -> dict[str, Any]:
    """Class names by number; of many, a digest for each of 32 spans, so that a refusal tells about where the maps part."""
    if len(names) <= MAX_NAMED_CLASSES:
        return {str(number): name for number, name in enumerate(names)}
    span = -(-len(names) // 32)
    return {f"{at}-{min(at + span, len(names)) - 1}": digest(list(names[at : at + span])) for at in range(0, len(names), span)}


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Leaves of a tree by dotted name, as text."""
    if isinstance(value, dict) and value:
        for key, below in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), below)
    else:
        text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        yield name, text if len(text) <= MAX_READABLE else f"blake2b:{digest(value)}"


def golden_images(image_size: int) -> Tensor:
    """The synthetic batch [2, 3, H, W], fp32, of mean 0 and variance 1.

    From numpy's frozen generator, without any function whose last bit a library may round otherwise: the same everywhere, always.
    """
    uniform = np.random.RandomState(402_16918).random_sample((GOLDEN_IMAGES, 3, image_size, image_size))
    return torch.from_numpy((uniform - 0.5) * 3.4641016151377544).float()


@torch.no_grad()
def golden_answer(parts: TeacherParts, request: Golden) -> Answer:
    """hidden.I, module.I and logits.I for the synthetic images, fp32. Raises FeedError(bad_request) for a pair that is not there."""
    absent = set(request.pairs) - {pair.index for pair in parts.pairs}
    if absent:
        raise FeedError("bad_request", f"pairs: {sorted(absent)} are not served here")
    pairs = [pair for pair in parts.pairs if pair.index in request.pairs]
    images_BCHW = golden_images(parts.data.image_size).to(parts.device, parts.dtype)
    hidden = parts.meta.hidden_states(images_BCHW, pairs)
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        output = parts.teachers[pair.index](hidden[pair.index])
        named = {"hidden": hidden[pair.index], "module": output, "logits": parts.meta.suffix(pair, output)}
        tensors |= {f"{name}.{pair.index}": t.float().cpu().contiguous() for name, t in named.items()}
    head = AnswerHead(
        instance=request.instance, plan="golden", start=0, pairs=request.pairs, payload="hidden", wire_dtype="fp32", with_teacher=True,
        attempt=0,
    )  # fmt: skip
    return Answer(head, tensors)
