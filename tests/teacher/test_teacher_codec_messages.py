"""Messages from strangers: read as what they are, or refused with bad_request, never anything else."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.packing import negotiate, pack, unpack
from m2mkd_ds.teacher.protocol.wire import MAX_MESSAGE_BYTES, AnswerHead, FeedError, GetBatch, Golden, Hello, Limits, Status, Welcome

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)
LIMITS = Limits(max_count=64, max_answer_bytes=10**6, max_in_flight=4, heartbeat_s=1.0)
ASKED: dict[str, Any] = {"pairs": (0, 2), "payload": "hidden", "wire_dtype": "bf16", "with_teacher": True}
MESSAGES = (
    Hello(oldest_protocol=2, newest_protocol=2, client="c", rank=1, layout=LAYOUT, fingerprints={"seed": "7"}, **ASKED),
    Welcome(protocol=2, instance="i", plan="p", fingerprints={"seed": "7"}, limits=LIMITS),
    GetBatch(instance="i", plan="p", client="c", layout=LAYOUT, start=8, attempt=0, **ASKED),
    Golden(instance="i", pairs=(0, 1)),
    Status(instance="i", ready=True, draining=False, in_flight=1, clients=2, endpoints=("h:1",)),
    AnswerHead(instance="i", plan="p", start=8, attempt=0, lost="gone", **ASKED),
)
KINDS = tuple(type(message) for message in MESSAGES)


def tree_of(message: Any) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(pack(message))
    return tree


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_a_message_comes_back_equal(message: Any) -> None:
    assert unpack(type(message), pack(message)) == message


def refused(kind: Any, packed: bytes) -> FeedError:
    with pytest.raises(FeedError) as caught:
        unpack(kind, packed)
    assert len(str(caught.value)) < 600 and str(caught.value).isascii() and str(caught.value).isprintable()
    return caught.value


@FUZZ
@given(st.sampled_from(KINDS), st.binary(max_size=200))
def test_random_bytes_are_a_bad_request(kind: Any, packed: bytes) -> None:
    assert refused(kind, packed).code == "bad_request"


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=15,
)


@FUZZ
@given(st.sampled_from(MESSAGES), st.data())
def test_garbage_in_any_field_is_refused_or_a_value_of_its_type(message: Any, data: st.DataObject) -> None:
    tree = tree_of(message)
    kind = data.draw(st.sampled_from(["replace", "nested", "extra", "lose", "whole", "text"]))
    if kind == "whole":
        packed = json.dumps(data.draw(json_trees))
    elif kind == "text":
        packed = json.dumps(tree)
        at = data.draw(st.integers(0, len(packed) - 1))
        packed = packed[:at] + data.draw(st.text(max_size=3)) + packed[at + data.draw(st.integers(0, 3)) :]
    else:
        name = data.draw(st.sampled_from(sorted(tree)))
        if kind == "lose":
            del tree[name]
        elif kind == "extra":
            tree[data.draw(st.text(max_size=300))] = data.draw(json_trees)
        elif kind == "nested" and isinstance(tree[name], dict):
            tree[name][data.draw(st.sampled_from(sorted(tree[name]) or ["x"]))] = data.draw(json_trees)
        else:
            tree[name] = data.draw(json_trees)
        packed = json.dumps(tree)
    try:
        got = unpack(type(message), packed.encode(errors="surrogatepass"))
    except FeedError as err:
        assert err.code == "bad_request" or "protocol" in str(err)
        return
    assert unpack(type(message), pack(got)) == got
    for field in fields(got):
        kept = getattr(got, field.name)
        assert type(kept) is type(getattr(message, field.name))


WRONG: dict[str, tuple[Any, dict[str, Any], str]] = {
    "micro-batch without end": (GetBatch, {"layout": {**vars(LAYOUT), "micro_batch_size": 10**30}}, "layout"),
    "negative micro-batch": (GetBatch, {"layout": {**vars(LAYOUT), "micro_batch_size": -4}}, "layout"),
    "origin far away": (Hello, {"layout": {**vars(LAYOUT), "origin": -(2**80)}}, "layout"),
    "number as text": (GetBatch, {"layout": {**vars(LAYOUT), "world": "2"}}, "layout.world"),
    "truth as a number": (GetBatch, {"start": True}, "start"),
    "fraction": (GetBatch, {"start": 8.0}, "start"),
    "negative position": (GetBatch, {"start": -1}, "start"),
    "position out of 62 bits": (GetBatch, {"start": 2**62}, "start"),
    "pair twice": (GetBatch, {"pairs": [1, 1]}, "named twice"),
    "no pairs": (Golden, {"pairs": []}, "pairs"),
    "300 pairs": (Golden, {"pairs": list(range(300))}, "pairs"),
    "negative pair": (Golden, {"pairs": [-1]}, "pairs"),
    "payload unknown": (GetBatch, {"payload": "everything"}, "payload"),
    "foreign field": (Golden, {"__class__": "os.system"}, "__class__"),
    "line feeds in a name": (Golden, {"a\nERROR all is lost\x1b[31m": 1}, "a\\nERROR"),
    "long instance": (Golden, {"instance": "i" * 129}, "instance"),
    "long fingerprint": (Hello, {"fingerprints": {"seed": "x" * 129}}, "fingerprints"),
    "many fingerprints": (Hello, {"fingerprints": {str(i): "x" for i in range(1025)}}, "fingerprints"),
    "damage without end": (AnswerHead, {"erase_pixels": 2**40}, "erase_pixels"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_value_out_of_bounds_is_named(case: str) -> None:
    kind, change, told = WRONG[case]
    message = next(message for message in MESSAGES if type(message) is kind)
    error = refused(kind, json.dumps({**tree_of(message), **change}).encode())
    assert error.code == "bad_request" and told in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_length_and_huge_numbers_are_a_bad_request(kind: Any) -> None:
    deep, number = (b"[" * 10_000 + b"]" * 10_000, b'{"pairs":' * 7_000), b'{"start":' + b"9" * 60_000 + b"}"
    for packed in (*deep, number, b" " * (MAX_MESSAGE_BYTES + 1)):
        assert refused(kind, packed).code == "bad_request"


def test_an_answer_belongs_to_one_request_and_one_attempt() -> None:
    request, head = MESSAGES[2], MESSAGES[5]
    assert isinstance(request, GetBatch) and isinstance(head, AnswerHead) and head.answers(request)
    other: dict[str, Any] = {
        "instance": "j", "plan": "q", "start": 12, "pairs": (0,), "payload": "image", "wire_dtype": "fp32", "with_teacher": False,
        "attempt": 1,
    }  # fmt: skip
    for name, value in other.items():
        assert not head.answers(replace(request, **{name: value})), name
    assert head.answers(replace(request, client="d"))


@pytest.mark.parametrize(
    ("oldest", "newest", "ours", "both"), [(1, 1, (1, 1), 1), (1, 3, (2, 5), 3), (2, 9, (1, 4), 4), (3, 3, (1, 3), 3), (1, 2, (2, 2), 2)]
)
def test_the_newest_common_protocol_is_spoken(oldest: int, newest: int, ours: tuple[int, int], both: int) -> None:
    assert negotiate(oldest, newest, ours=ours) == both


@pytest.mark.parametrize(
    ("oldest", "newest", "ours", "older"), [(1, 1, (2, 3), "trainer"), (2, 3, (1, 1), "server"), (5, 9, (3, 4), "server")]
)
def test_no_common_protocol_is_refused_and_says_who_is_older(oldest: int, newest: int, ours: tuple[int, int], older: str) -> None:
    with pytest.raises(FeedError, match=f"the trainer speaks {oldest} to {newest}.*newer m2mkd_ds for the {older}") as refused:
        negotiate(oldest, newest, ours=ours)
    assert refused.value.code == "mismatch"


def test_a_newer_trainer_is_understood_or_told_about_protocols_not_about_its_fields() -> None:
    newer = {**tree_of(MESSAGES[0]), "newest_protocol": 3, "compression": "zstd", "topics": {"a": [1]}}
    understood = unpack(Hello, json.dumps(newer).encode())
    assert understood == replace(MESSAGES[0], newest_protocol=3)  # type: ignore[type-var]
    error = refused(Hello, json.dumps({**newer, "oldest_protocol": 3}).encode())
    assert error.code == "mismatch" and "protocol: the trainer speaks 3 to 3, the server 2 to 2" in str(error)
    # of our own protocol, an unknown field is a mistake
    assert refused(Hello, json.dumps({**newer, "newest_protocol": 2}).encode()).code == "bad_request"
