"""The trainer's golden check: the server's outputs for synthetic images against what the trainer's own frozen stages make of them.

    hidden.I   against the prefix chain M_{I-1}(...M_0(images))           where the trainer holds these stages
    module.I   against T_I(hidden.I)                                      where it holds the teacher's module
    logits.I   against the suffix M_{N-1}(...M_{I+1}(module.I))           where it holds those stages; the last pair has none

Fingerprints say that both sides mean the same; this says that they compute the same: another precision, a fast-math switch, a kernel
that is wrong or not deterministic shows here, before anything is trained on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from m2mkd_ds.data_config import DataConfig
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.answer_check import is_finite
from m2mkd_ds.teacher.connection import Connection
from m2mkd_ds.teacher.handshake import golden_images
from m2mkd_ds.teacher.wire import Answer, FeedError, Golden, LinkError, Welcome

TOLERANCES: dict[torch.dtype, float] = {torch.float32: 1e-4, torch.float16: 8e-3, torch.bfloat16: 5e-2}
"""How far two right implementations may be apart (`row_difference`). fp32: the order of sums only, so TF32 (about 1e-3) is refused.
fp16, bf16: a few roundings of 2^-11 and 2^-8 a block; ViTs of 4 to 24 blocks were measured, against fp64, at 2.4e-6, 2.6e-3 and 2.2e-2."""


@dataclass(frozen=True)
class GoldenReport:
    """A server that passed."""

    endpoint: str
    tolerance: float
    digest: str
    """Of the server's answer: servers with the same one are the same to the last bit."""
    differences: Mapping[str, float] = field(default_factory=dict)
    """By tensor, as `row_difference`."""
    unchecked: tuple[str, ...] = ()
    """Tensors that the trainer has no stages for."""

    def __str__(self) -> str:
        worst = max(self.differences, key=lambda name: self.differences[name], default="")
        checked = f"{len(self.differences)} outputs agree to {self.differences[worst]:.2g} ({worst})" if worst else "no output was compared"
        left = f"; {', '.join(self.unchecked)} could not be compared here" if self.unchecked else ""
        return f"{self.endpoint}: {checked}; allowed {self.tolerance:g}{left}"


@torch.no_grad()
def check_golden(
    connection: Connection,
    welcome: Welcome,
    *,
    pairs: tuple[TeachingPair, ...],
    meta: FrozenMeta,
    data: DataConfig,
    device: torch.device,
    dtype: torch.dtype,
    deadline_s: float,
    teachers: Mapping[int, nn.Module] | None = None,
    tolerance: float | None = None,
) -> GoldenReport:
    """Ask twice and compare. `meta`, `teachers`: whatever stages this trainer holds, in `dtype` on `device`.

    Raises FeedError(mismatch) naming the tensor and the largest difference, LinkError(corrupt) for an answer to another question.
    """
    request = Golden(instance=welcome.instance, pairs=tuple(pair.index for pair in pairs))
    answer = connection.golden(request, deadline_s)
    _check_form(answer, request, data)
    _refuse_chance(connection.endpoint, answer, connection.golden(request, deadline_s))
    allowed = TOLERANCES[dtype] if tolerance is None else tolerance
    differences: dict[str, float] = {}
    for name, expected in _own(answer, pairs, meta, teachers or {}, golden_images(data.image_size).to(device, dtype)):
        given = answer.tensors[name]
        if given.shape != expected.shape:
            raise FeedError("mismatch", f"{connection.endpoint}: golden {name} is {list(given.shape)}, here it is {list(expected.shape)}")
        _check_dtype(connection.endpoint, name, given, expected, dtype)
        differences[name] = row_difference(given, expected)
        # Written so that NaN is refused, too.
        if not differences[name] <= allowed:
            raise FeedError("mismatch", _told(connection.endpoint, name, given, expected, allowed, dtype))
    unchecked = tuple(name for name in answer.tensors if name not in differences)
    return GoldenReport(connection.endpoint, allowed, _digest(answer), differences, unchecked)


def _check_form(answer: Answer, request: Golden, data: DataConfig) -> None:
    """Names, dtypes and shapes as far as they are known before anything is computed."""
    names = {f"{kind}.{i}" for i in request.pairs for kind in ("hidden", "module", "logits")}
    if answer.head.instance != request.instance or answer.head.plan != "golden" or answer.tensors.keys() != names:
        raise LinkError("corrupt", f"an answer with {sorted(answer.tensors)[:8]} to a request for the golden outputs of {request.pairs}")
    for name, tensor in answer.tensors.items():
        kind, _, pair = name.partition(".")
        images = (len(golden_images(1)), 3, data.image_size, data.image_size)
        expected = images if name == "hidden.0" else (images[0], data.num_classes) if kind == "logits" else None
        if tensor.dtype != torch.float32 or (expected is not None and tensor.shape != expected):
            raise LinkError("corrupt", f"golden {name} is {tensor.dtype} {list(tensor.shape)}; expected fp32 {expected or ''}")
        if not is_finite(tensor):
            raise FeedError("poisoned", f"golden {name}: the output of pair {pair} is not finite")


def _refuse_chance(endpoint: str, first: Answer, second: Answer) -> None:
    for name, tensor in first.tensors.items():
        again = second.tensors.get(name)
        if again is None or again.shape != tensor.shape or not torch.equal(tensor, again):
            by = f" by {float((tensor - again).abs().max()):g}" if again is not None and again.shape == tensor.shape else ""
            raise FeedError(
                "mismatch",
                f"{endpoint}: golden {name} differs{by} between two answers to the same question; this server is not deterministic, so a "
                "batch that is asked for twice would not be the same batch: find the module or kernel that draws random numbers there",
            )


def _own(
    answer: Answer, pairs: tuple[TeachingPair, ...], meta: FrozenMeta, teachers: Mapping[int, nn.Module], images_BCHW: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Name and our value, fp32 on the CPU, of everything that can be made from stages held here."""

    def given(name: str) -> Tensor:
        # What the server computed with: its numbers of this dtype, without a rounding of ours.
        return answer.tensors[name].to(images_BCHW.device, images_BCHW.dtype)

    reachable = [pair for pair in pairs if all(stage in meta.stages for stage in pair.prefix_stages)]
    hidden = meta.hidden_states(images_BCHW, reachable) if reachable else {}
    for pair in pairs:
        i = pair.index
        if i in hidden:
            yield f"hidden.{i}", hidden[i].float().cpu()
        if i in teachers:
            yield f"module.{i}", teachers[i](given(f"hidden.{i}")).float().cpu()
        if all(stage in meta.stages for stage in pair.suffix_stages):
            yield f"logits.{i}", meta.suffix(pair, given(f"module.{i}")).float().cpu()


def _check_dtype(endpoint: str, name: str, given: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Numbers made in 16 bits say so: rounding to these leaves them as they are."""

    def fits(tensor: Tensor, narrow: torch.dtype) -> bool:
        return torch.equal(tensor.to(narrow).float(), tensor)

    if dtype == torch.float32:
        # Our own numbers may fit, too: an untrained head gives zeros.
        narrower = [narrow for narrow in (torch.bfloat16, torch.float16) if fits(given, narrow) and not fits(expected, narrow)]
        found = str(narrower[0]) if narrower else ""
    else:
        found = "" if fits(given, dtype) else "another dtype"
    if found:
        raise FeedError(
            "mismatch",
            f"{endpoint}: golden {name} was computed in {found} by the server, this trainer computes in {dtype}; start both with the "
            "same m2mkd.precision",
        )


def row_difference(given: Tensor, expected: Tensor) -> float:
    """Largest length of a difference over the length of what was expected, both of rows [..., D]: a token's, or an image's logits.

    By rows, because trained ViTs have a few tokens a hundred times as large as the others, behind which these could be anything.
    """
    given, expected = given.double(), expected.double()
    return float(((given - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())


def _told(endpoint: str, name: str, given: Tensor, expected: Tensor, allowed: float, dtype: torch.dtype) -> str:
    return (
        f"{endpoint}: golden {name} of pair {name.rpartition('.')[2]} differs by {float((given - expected).abs().max()):.3g} "
        f"and in one row by {row_difference(given, expected):.3g} of its length; allowed is {allowed:g} in {dtype}. Server and trainer do "
        "not compute the same: compare precision, torch.backends settings (TF32), versions and the weights' files on both sides"
    )


def _digest(answer: Answer) -> str:
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(answer.tensors):
        total.update(answer.tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
