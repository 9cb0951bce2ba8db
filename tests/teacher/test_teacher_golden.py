"""The golden check: a server that computes something else than the trainer does is refused before anything is trained on."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.golden import TOLERANCES, GoldenReport, check_golden
from m2mkd_ds.teacher.protocol.handshake import golden_answer, golden_images
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Golden, Hello, LinkError, Welcome
from m2mkd_ds.teacher.server.produce import Producer, TeacherParts
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)


@dataclass
class Side:
    """A trainer's models beside a server whose parts a test may spoil first."""

    config: RunConfig
    index: ShardIndex
    prints: dict[str, str]

    made: dict[torch.dtype, TeacherParts] = field(default_factory=dict)

    def parts(self, dtype: torch.dtype = torch.float32) -> TeacherParts:
        """A copy that the test may spoil."""
        if dtype not in self.made:
            self.made[dtype] = make_parts(self.config, self.index, dtype)
        parts = self.made[dtype]
        return replace(parts, meta=FrozenMeta(copy.deepcopy(parts.meta.stages)), teachers=copy.deepcopy(dict(parts.teachers)))

    def link(self, server: TeacherParts, link_class: type[LocalConnection] = LocalConnection) -> tuple[LocalConnection, Welcome]:
        """The fingerprints are the honest ones: only the golden outputs can tell."""
        service = TeacherService(Producer(server), self.prints, ServiceOptions(limits=LIMITS, max_bytes=2**28))
        link = link_class(service, "here:1")
        hello = Hello(
            oldest_protocol=2, newest_protocol=2, client="test", rank=0, layout=LAYOUT, pairs=(0, 1, 2), payload="hidden",
            wire_dtype="fp32", with_teacher=True, fingerprints=self.prints,
        )  # fmt: skip
        return link, link.hello(hello, 5.0)

    def check(
        self, server: TeacherParts, dtype: torch.dtype = torch.float32, *, meta: FrozenMeta | None = None,
        teachers: Mapping[int, nn.Module] | None = None, link_class: type[LocalConnection] = LocalConnection,
    ) -> GoldenReport:  # fmt: skip
        link, welcome = self.link(server, link_class)
        own = self.parts(dtype)
        return check_golden(
            link, welcome, pairs=own.pairs, meta=own.meta if meta is None else meta, data=self.config.data, device=own.device,
            dtype=dtype, deadline_s=5.0, teachers=teachers,
        )  # fmt: skip

    def refused(self, server: TeacherParts, dtype: torch.dtype = torch.float32, **kept: Any) -> str:
        with pytest.raises(FeedError) as refusal:
            self.check(server, dtype, **kept)
        assert refusal.value.code == "mismatch" and str(refusal.value).startswith("here:1: golden ")
        return str(refusal.value)


@pytest.fixture(scope="module")
def side(tiny_config: RunConfig, tiny_index: ShardIndex) -> Side:
    return Side(tiny_config, tiny_index, tiny_fingerprints(tiny_config, tiny_index))


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_an_honest_server_passes_in_every_precision(side: Side, dtype: torch.dtype) -> None:
    report = side.check(side.parts(dtype), dtype, teachers=side.parts(dtype).teachers)
    # the same code on the same CPU: not a bit differs
    assert report.differences == {f"{kind}.{i}": 0.0 for i in range(3) for kind in ("hidden", "module", "logits")}
    assert report.unchecked == () and report.tolerance == TOLERANCES[dtype]
    assert str(report).startswith("here:1: 9 outputs agree to 0 (hidden.0); allowed ")


def test_what_the_trainer_has_no_stages_for_is_said(side: Side) -> None:
    stages = side.parts().meta.stages
    report = side.check(side.parts(), meta=FrozenMeta({2: stages[2]}))
    # no prefix: h_0 is the image, h_1 and h_2 need stages 0 and 1; suffixes: pair 0 needs 1 and 2, pair 1 stage 2, pair 2 none
    assert set(report.differences) == {"hidden.0", "logits.1", "logits.2"}
    assert report.unchecked == ("module.0", "logits.0", "hidden.1", "module.1", "hidden.2", "module.2")
    assert str(report).endswith("could not be compared here")
    report = side.check(side.parts(), meta=FrozenMeta({0: stages[0], 1: stages[1]}))
    assert set(report.differences) == {"hidden.0", "hidden.1", "hidden.2", "logits.2"}


def test_two_servers_with_the_same_bits_have_the_same_digest(side: Side) -> None:
    first, second = side.check(side.parts()), side.check(side.parts())
    assert first.digest == second.digest
    spoilt = side.parts()
    with torch.no_grad():
        spoilt.teachers[1].blocks["2"].mlp.fc1.bias[0] += 1e-7  # type: ignore[union-attr,index,operator]
    assert side.check(spoilt).digest != first.digest  # within the tolerance, and told apart


@pytest.mark.parametrize(
    ("server", "trainer", "told"),
    [
        (torch.bfloat16, torch.float32, "computed in torch.bfloat16 by the server, this trainer computes in torch.float32"),
        (torch.float16, torch.float32, "computed in torch.float16 by the server"),
        (torch.float32, torch.bfloat16, "another dtype by the server, this trainer computes in torch.bfloat16"),
        (torch.float16, torch.bfloat16, "another dtype by the server"),
    ],
)
def test_a_server_in_another_precision_is_refused(side: Side, server: torch.dtype, trainer: torch.dtype, told: str) -> None:
    assert told in side.refused(side.parts(server), trainer)


class Autocast(nn.Module):
    """A stage under autocast: fp32 weights and residual stream, products in bf16."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.stage(x)


def test_a_server_under_autocast_is_refused_by_trainers_of_either_precision(side: Side) -> None:
    def server(dtype: torch.dtype) -> TeacherParts:
        parts = side.parts(dtype)
        return replace(parts, meta=FrozenMeta({i: Autocast(stage) for i, stage in parts.meta.stages.items()}))

    # bf16 logits, from a head under autocast
    assert "golden logits.0 was computed in torch.bfloat16" in side.refused(server(torch.float32), torch.float32)
    # the residual stream is fp32, as the trainer's: its numbers tell
    prefix = FrozenMeta({i: stage for i, stage in side.parts().meta.stages.items() if i < 2})
    message = side.refused(server(torch.float32), torch.float32, meta=prefix)
    assert "golden hidden.1 of pair 1 differs by" in message and "allowed is 0.0001 in torch.float32" in message
    assert "golden hidden.0 was computed in another dtype" in side.refused(server(torch.float32), torch.bfloat16)


def spoil(module: nn.Module, name: str, factor: float) -> None:
    with torch.no_grad():
        module.get_parameter(name).mul_(factor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_weight_is_refused_by_pair_and_largest_difference(side: Side, dtype: torch.dtype) -> None:
    prefix, suffix, module = side.parts(dtype), side.parts(dtype), side.parts(dtype)
    spoil(prefix.meta.stages[0], "patch_embed.proj.weight", 1.5)
    assert "golden hidden.1 of pair 1 differs by" in side.refused(prefix, dtype)
    spoil(suffix.meta.stages[2], "head.weight", 1.25)
    assert "golden logits.0 of pair 0 differs by" in side.refused(suffix, dtype)
    spoil(module.teachers[2], "head.weight", 1.25)
    assert set(side.check(module, dtype).differences.values()) == {0.0}  # the trainer holds no teacher: it cannot know
    assert "golden module.2 of pair 2 differs by" in side.refused(module, dtype, teachers=side.parts(dtype).teachers)


def test_another_epsilon_with_the_same_weights_is_refused(side: Side) -> None:
    server = side.parts()
    for module in server.meta.stages[0].modules():
        if hasattr(module, "eps"):
            module.eps = 1e-2
    assert "golden hidden.1 of pair 1 differs by" in side.refused(server)


def test_the_difference_that_is_told_is_the_largest(side: Side) -> None:
    server = side.parts()
    own = side.parts()
    with torch.no_grad():
        own_logits = own.meta.suffix(own.pairs[1], own.teachers[1](own.meta.hidden_states(golden_images(16), own.pairs)[1]))
        server.meta.stages[2].head.bias[4] += 0.5  # type: ignore[union-attr,index,operator]
    message = side.refused(server, meta=FrozenMeta({2: own.meta.stages[2]}))
    # one of ten logits of each image is 0.5 off
    assert f"golden logits.1 of pair 1 differs by 0.5 and in one row by {0.5 / float(own_logits.norm(dim=1).min()):.3g} of its" in message


class Noisy(nn.Module):
    """Adds what nobody can tell from rounding, and other numbers every time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1e-6 * torch.rand_like(x)


def test_a_server_that_is_not_deterministic_is_refused(side: Side) -> None:
    parts = side.parts()
    server = replace(parts, teachers={**parts.teachers, 1: nn.Sequential(parts.teachers[1], Noisy())})
    message = side.refused(server)
    assert "golden module.1 differs by" in message and "not deterministic" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_refused(side: Side, value: float) -> None:
    server = side.parts()
    with torch.no_grad():
        server.teachers[2].head.bias[0] = value  # type: ignore[union-attr,index,operator]
    with pytest.raises(FeedError, match=r"golden module\.2: the output of pair 2 is not finite") as refused:
        side.check(server)
    assert refused.value.code == "poisoned"


class Lying(LocalConnection):
    """Changes what comes back."""

    def golden(self, request: Golden, deadline_s: float) -> Answer:
        return self.change(super().golden(request, deadline_s))

    def change(self, answer: Answer) -> Answer:
        return answer


class Without(Lying):
    def change(self, answer: Answer) -> Answer:
        return Answer(answer.head, {name: t for name, t in answer.tensors.items() if name != "module.1"})


class Flat(Lying):
    def change(self, answer: Answer) -> Answer:
        return Answer(answer.head, {**answer.tensors, "hidden.0": answer.tensors["hidden.0"].flatten(1)})


class Half(Lying):
    def change(self, answer: Answer) -> Answer:
        return Answer(answer.head, {name: t.half() for name, t in answer.tensors.items()})


class Elsewhere(Lying):
    def change(self, answer: Answer) -> Answer:
        return Answer(replace(answer.head, instance="another"), answer.tensors)


@pytest.mark.parametrize("link_class", [Without, Flat, Half, Elsewhere])
def test_an_answer_of_another_form_is_corrupt(side: Side, link_class: type[LocalConnection]) -> None:
    with pytest.raises(LinkError) as refused:
        side.check(side.parts(), link_class=link_class)
    assert refused.value.fault == "corrupt"


class Narrow(Lying):
    def change(self, answer: Answer) -> Answer:
        return Answer(answer.head, {**answer.tensors, "hidden.1": answer.tensors["hidden.1"][:, :9]})


def test_hidden_states_of_another_shape_are_named(side: Side) -> None:
    assert "golden hidden.1 is [2, 9, 32], here it is [2, 17, 32]" in side.refused(side.parts(), link_class=Narrow)


def test_golden_images_are_the_same_everywhere() -> None:
    images = golden_images(16)
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    # numpy's RandomState is frozen; fp32 of numbers from it is arithmetic that has one result
    assert hashlib.sha256(images.numpy().astype("<f4").tobytes()).hexdigest()[:16] == "716bd47270eca8e1"
    # 1536 uniform numbers of variance 1: mean 0 +- 0.026, variance 1 +- 0.023 (standard errors)
    assert abs(float(images.mean())) < 0.1 and abs(float(images.var()) - 1) < 0.1


def test_an_unknown_pair_is_a_bad_request(side: Side) -> None:
    with pytest.raises(FeedError, match=r"pairs: \[5\]") as refused:
        golden_answer(side.parts(), Golden(instance="i", pairs=(1, 5)))
    assert refused.value.code == "bad_request"


BOUNDS = {"fp32": (torch.float32, 1e-5), "fp16": (torch.float16, 5e-3), "bf16": (torch.bfloat16, 3e-2)}
"""Of the largest number, against fp64: unit round-offs are 6e-8, 5e-4 and 4e-3, and there are a few of them in a row of six blocks."""


@pytest.mark.parametrize("name", BOUNDS)
def test_outputs_of_every_precision_stay_near_those_of_fp64(side: Side, name: str) -> None:
    dtype, bound = BOUNDS[name]
    exact = side.parts(torch.float64)
    request = Golden(instance="i", pairs=(0, 1, 2))
    hidden = exact.meta.hidden_states(golden_images(16).double(), exact.pairs)
    given = golden_answer(side.parts(dtype), request).tensors
    with torch.no_grad():
        for pair in exact.pairs:
            output = exact.teachers[pair.index](hidden[pair.index])
            for kind, expected in (("hidden", hidden[pair.index]), ("module", output), ("logits", exact.meta.suffix(pair, output))):
                error = float((given[f"{kind}.{pair.index}"].double() - expected).abs().max() / expected.abs().max())
                assert error <= bound, (kind, pair.index, error)
                # not a bound that anything would keep: a precision below would break most of them
                assert error > bound / 3000 or kind == "hidden", (kind, pair.index, error)


@pytest.mark.parametrize(("wire", "roundoff"), [("fp32", 0.0), ("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_hidden_states_are_rounded_once_on_the_way(side: Side, wire: Any, roundoff: float) -> None:
    link, welcome = side.link(side.parts())
    request = GetBatch(
        instance=welcome.instance, plan=welcome.plan, client="t", layout=LAYOUT, start=4, pairs=(1, 2), payload="hidden", wire_dtype=wire,
        with_teacher=True, attempt=0,
    )  # fmt: skip
    given, exact = link.get(request, 5.0).tensors, link.get(replace(request, wire_dtype="fp32"), 5.0).tensors
    for i in (1, 2):
        error = (given[f"hidden.{i}"].float() - exact[f"hidden.{i}"]).abs()
        # 2^-25: half of fp16's smallest step, for numbers below its normal range
        assert (error <= roundoff * exact[f"hidden.{i}"].abs() + (2.0**-25 if wire == "fp16" else 0)).all()
        assert bool(error.any()) == (roundoff > 0)
        # the teacher runs on what was not rounded
        assert torch.equal(given[f"logits.{i}"], exact[f"logits.{i}"])
    assert torch.equal(given["targets"], exact["targets"])
