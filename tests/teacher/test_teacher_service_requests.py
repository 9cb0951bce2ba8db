"""Requests that no trainer of ours makes: each is a refusal with a reason, before any work, whatever the numbers in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.handshake import plan_digest
from m2mkd_ds.teacher.protocol.packing import pack, unpack
from m2mkd_ds.teacher.protocol.wire import FeedError, GetBatch
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import TeacherService
from tests.teacher.asking import LAYOUT, asked, service_of
from tests.teacher.conftest import make_parts

EDGES = st.sampled_from(
    [0, 1, 2, 3, 4, 8, 64, 65, 2**31, 2**61, 2**62 - 5, 2**62 - 4, 2**62, 2**63, 2**64, 10**30, -1, -4, -(2**61), -(2**63)]
)
NUMBERS = EDGES | st.integers(-20, 80) | st.integers()


@pytest.fixture(scope="module")
def service(tiny_config: RunConfig, tiny_index: ShardIndex) -> TeacherService:
    return service_of(Producer(make_parts(tiny_config, tiny_index)), tiny_config, tiny_index)


def layout_of(sizes: tuple[int, int, int, int]) -> BatchLayout:
    micro_batch_size, accumulation, world, origin = sizes
    return BatchLayout(micro_batch_size=max(1, micro_batch_size), accumulation=max(1, accumulation), world=max(1, world), origin=origin)


@given(
    layout=st.just(LAYOUT) | st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(layout_of),
    start=NUMBERS,
    pairs=st.lists(st.sampled_from([0, 1, 2]) | NUMBERS, max_size=5).map(tuple),
    payload=st.sampled_from(["hidden", "image", "logits"]),
    wire_dtype=st.sampled_from(["fp32", "bf16", "fp16", "int8"]),
    with_teacher=st.booleans(),
    good_plan=st.booleans(),
)
@example(layout=LAYOUT, start=2**61, pairs=(2, 0), payload="hidden", wire_dtype="int8", with_teacher=True, good_plan=True)
@example(
    layout=BatchLayout(micro_batch_size=4, accumulation=10**6, world=10**6, origin=-(2**61)), start=2**61, pairs=(1,), payload="hidden",
    wire_dtype="fp32", with_teacher=True, good_plan=True,
)  # fmt: skip
@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_request_is_answered_or_refused_with_a_reason(service: TeacherService, good_plan: bool, **asked_for: Any) -> None:
    """Also of a client in the same process, whose messages no types have checked."""
    layout, start, pairs = asked_for["layout"], asked_for["start"], asked_for["pairs"]
    plan = plan_digest(service._fingerprints, layout) if good_plan else "another"
    request = asked(service, plan=plan, **asked_for)
    before = service.counters()
    try:
        answer = service.get(request)
    except FeedError as err:
        assert err.code in ("bad_request", "mismatch") and str(err)
        after = service.counters()
        assert after["misses_decode"] == before["misses_decode"] and after["decode_s"] == before["decode_s"], "refused after work"
        assert after["in_flight"] == 0
        # What is certainly good must not be refused.
        fine = (
            layout == LAYOUT and 0 <= start < 2**61 and start % 4 == 0 and good_plan and pairs and len(set(pairs)) == len(pairs)
            and set(pairs) <= {0, 1, 2} and (asked_for["payload"] == "hidden" or asked_for["wire_dtype"] != "int8")
            and (asked_for["payload"] != "logits" or asked_for["with_teacher"])
        )  # fmt: skip
        assert not fine, err
        return
    assert good_plan and answer.head.answers(request)
    assert (start - layout.origin) % layout.micro_batch_size == 0 and start >= 0 and set(pairs) <= {0, 1, 2}
    assert all(len(tensor) == layout.micro_batch_size for name, tensor in answer.tensors.items() if name.startswith(("hidden", "logits")))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"start": 2}, "start: position 2 is not where a micro-batch of 4 begins"),
        ({"start": 2**62 - 4}, r"start: 4611686018427387900 with origin 0 is beyond what a stream can have"),
        ({"pairs": (0, 0)}, r"pairs: \(0, 0\): each pair once, and at least one"),
        ({"pairs": (3,)}, r"pair 3 is not served"),
        ({"layout": BatchLayout(micro_batch_size=4, accumulation=1, world=10**30)}, r"layout.world: 10+; this server allows 1 to 1000000"),
        ({"layout": BatchLayout(micro_batch_size=4, accumulation=1, world=1, origin=8), "start": 4}, "step 0 begins at 8"),
        ({"layout": BatchLayout(micro_batch_size=5, accumulation=1, world=1)}, "layout: micro_batch_size is 5 and data.augment.mix_group"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(service: TeacherService, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(FeedError, match=told) as bad:
        service.get(asked(service, **changes))
    assert bad.value.code == "bad_request"


def test_an_order_that_has_no_place_for_so_many_ranks_is_a_bad_layout(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    """repeat_mode=deit with an origin: the order itself refuses it."""
    augment = replace(tiny_config.data.augment, repeats=2, repeat_mode="deit")
    config = replace(tiny_config, data=replace(tiny_config.data, augment=augment))
    service = service_of(Producer(make_parts(config, tiny_index)), config, tiny_index)
    with pytest.raises(FeedError, match="layout: repeat_mode=deit belongs to one global batch") as bad:
        service.get(asked(service, 4, layout=replace(LAYOUT, origin=4)))
    assert bad.value.code == "bad_request"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: "[" * 10_000 + "]" * 10_000,
        lambda tree: json.dumps({**tree, "extra": 1}),
        lambda tree: json.dumps({**tree, "start": -4}),
        lambda tree: json.dumps({**tree, "start": 10**400}),
        lambda tree: json.dumps({**tree, "pairs": list(range(300))}),
        lambda tree: json.dumps({**tree, "layout": {**tree["layout"], "world": 0}}),
        lambda tree: json.dumps({**tree, "client": "x" * 100_000}),
        lambda tree: json.dumps({name: value for name, value in tree.items() if name != "plan"}),
        lambda tree: "\x00",
    ],
)
def test_a_message_that_cannot_be_one_of_ours_is_refused(service: TeacherService, spoil: Callable[[dict[str, Any]], str]) -> None:
    packed = pack(asked(service))
    assert unpack(GetBatch, packed) == asked(service)
    with pytest.raises(FeedError) as bad:
        unpack(GetBatch, spoil(json.loads(packed)).encode())
    assert bad.value.code == "bad_request"
