"""Whether trainer and server mean the same thing: fingerprints by field, and golden outputs to compare.

Fingerprints say that weights, architectures, preprocessing, labels and order are equal; the golden outputs say that both sides compute
the same with them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.config import RunConfig, to_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.produce import TeacherParts
from m2mkd_ds.teacher.wire import PROTOCOL_VERSION, Answer, AnswerHead, FeedError, Golden, Hello, Limits

PIXEL_FIELDS = ("image_size", "mean", "std", "interpolation", "decode", "augment", "num_classes")
"""Of DataConfig: what a training image's pixels and target follow from."""
ORDER_FIELDS = ("order", "order_window")
GOLDEN_IMAGES = 2


def digest(value: Any) -> str:
    """BLAKE2b of canonical JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, separators=(",", ":")).encode(), digest_size=16).hexdigest()


def fingerprints(config: RunConfig, index: ShardIndex, *, precision: str, weights: Mapping[str, str]) -> dict[str, str]:
    """By field, of a run as this process has it. `weights`: sha256 of `meta` and of `teacher.I`, by those names."""
    tree = to_dict(config)
    data, teacher = tree["data"], tree["teacher"]
    return {
        "teacher.arch": digest({key: teacher[key] for key in ("arch", "arch_args", "depths")}),
        "meta.depths": digest(tree["meta"]["depths"]),
        "data.pixels": digest({key: data[key] for key in PIXEL_FIELDS}),
        "data.order": digest({key: data[key] for key in ORDER_FIELDS}),
        "data.shards": index.fingerprint,
        "data.classes": digest(list(index.class_names)),
        "seed": str(config.seed),
        "precision": precision,
        **{f"weights.{name}": sha for name, sha in weights.items()},
    }


def plan_digest(prints: Mapping[str, str], layout: BatchLayout) -> str:
    """Of all that the content of a micro-batch follows from."""
    return digest({"prints": dict(prints), "layout": [layout.micro_batch_size, layout.accumulation, layout.world, layout.origin]})


def check_hello(hello: Hello, prints: Mapping[str, str], limits: Limits) -> None:
    """Raises FeedError: mismatch naming the first field that differs and both values, bad_request past the limits."""
    if not hello.oldest_protocol <= PROTOCOL_VERSION <= hello.newest_protocol:
        raise FeedError(
            "mismatch",
            f"protocol: the trainer speaks {hello.oldest_protocol} to {hello.newest_protocol}, the server {PROTOCOL_VERSION}; install the "
            "same version of m2mkd_ds on both sides",
        )
    for name in hello.fingerprints:
        if hello.fingerprints[name] != prints.get(name):
            raise FeedError("mismatch", f"{name}: the trainer has {hello.fingerprints[name]}, the server has {prints.get(name)}")
    if hello.layout.micro_batch_size > limits.max_count:
        raise FeedError("bad_request", f"micro_batch_size is {hello.layout.micro_batch_size}; this server gives at most {limits.max_count}")


def golden_images(parts: TeacherParts) -> Tensor:
    """The synthetic batch [2, 3, H, W], fp32: standard normal numbers of a fixed seed."""
    generator = torch.Generator().manual_seed(402_16918)
    return torch.randn(GOLDEN_IMAGES, 3, parts.data.image_size, parts.data.image_size, generator=generator)


@torch.no_grad()
def golden_answer(parts: TeacherParts, request: Golden) -> Answer:
    """hidden.I, module.I and logits.I for the synthetic images, fp32."""
    pairs = [pair for pair in parts.pairs if pair.index in request.pairs]
    hidden = parts.meta.hidden_states(golden_images(parts).to(parts.device, parts.dtype), pairs)
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
