"""Frames: what comes out is what went in, to the bit, and whatever is not the frame of an answer is refused before there is room for it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.buffers import BufferPool
from m2mkd_ds.teacher.protocol.wire import MAX_BAD, MAX_BAD_TEXT, TORCH_DTYPES, Answer, AnswerHead, LinkError

FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
HEAD = AnswerHead(
    instance="abc", plan="def", start=128, pairs=(0, 1), payload="hidden", wire_dtype="bf16", with_teacher=True, attempt=2, step=3
)
BAD = BadSample(kind="undecodable", shard="s.tar", key="k", sample=1, position=2, substitute=3, message="no image")


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def an_answer() -> Answer:
    generator = torch.Generator().manual_seed(5)
    random = torch.randn(3, 5, 7, generator=generator)
    return Answer(
        HEAD,
        {
            "hidden.1": random.bfloat16(),
            "logits.1": random[:, 0].contiguous(),
            "nothing": torch.empty(0, 4),
            "scalar": torch.tensor(2.5),
            "labels": torch.tensor([1, -(2**40), 3]),
            "flags": torch.tensor([True, False, True]),
        },
    )


PARTS = list(codec.encode(an_answer(), chunk_bytes=64).parts())
"""hidden.1 has 210 bytes: pieces of 64, 64, 64, 18; logits.1 84: 64, 20; scalar 4; labels 24; flags 3. With head and tail 11 parts."""


def same(answer: Answer, other: Answer) -> bool:
    return answer.head == other.head and {n: (t.dtype, t.shape, raw(t)) for n, t in answer.tensors.items()} == {
        n: (t.dtype, t.shape, raw(t)) for n, t in other.tensors.items()
    }


@pytest.mark.parametrize("pool", [None, BufferPool(2, 2**20)])
def test_a_frame_gives_back_every_bit_of_its_answer(pool: BufferPool | None) -> None:
    assert [len(part) for part in PARTS[1:-1]] == [64, 64, 64, 18, 64, 20, 4, 24, 3]
    got = codec.read(PARTS, max_bytes=1000, pool=pool)
    assert same(got, an_answer())
    assert got.tensors["scalar"].shape == () and got.tensors["nothing"].shape == (0, 4)
    assert got.num_bytes == 210 + 84 + 0 + 4 + 24 + 3


@FUZZ
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(TORCH_DTYPES)), st.lists(st.integers(0, 4), max_size=4), st.integers(0, 2**32 - 1)), max_size=5
    ),
    st.integers(1, 200),
)
def test_any_tensors_in_pieces_of_any_size_come_back(shapes: list[tuple[str, list[int], int]], chunk: int) -> None:
    tensors = {}
    for number, (dtype, shape, seed) in enumerate(shapes):
        high = 2 if dtype == "bool" else 256
        size = torch.empty(shape, dtype=TORCH_DTYPES[dtype])
        generator = torch.Generator().manual_seed(seed)
        bytes_N = torch.randint(high, (size.numel() * size.element_size(),), dtype=torch.uint8, generator=generator)
        tensors[f"t{number}"] = bytes_N.view(TORCH_DTYPES[dtype]).view(shape) if size.numel() else size  # NaN and all
    answer = Answer(HEAD, tensors)
    assert same(codec.read(list(codec.encode(answer, chunk).parts()), max_bytes=10**6), answer)


def test_pieces_are_views_and_the_checksum_is_xxh3() -> None:
    answer = an_answer()
    frame = codec.encode(answer)
    answer.tensors["hidden.1"].zero_()
    assert bytes(frame.pieces[0]) == bytes(210)
    # from the xxHash repository's tables for XXH3_64bits: no bytes, seed 0
    assert codec.checksum(b"") == 0x2D06800538D394C2


@FUZZ
@given(st.integers(0, 8 * sum(memoryview(p).nbytes for p in PARTS) - 1))
def test_one_flipped_bit_anywhere_is_noticed(bit: int) -> None:
    parts, at = [bytes(part) for part in PARTS], bit // 8
    for number, part in enumerate(parts):
        if at < len(part):
            parts[number] = part[:at] + bytes([part[at] ^ 1 << bit % 8]) + part[at + 1 :]
            break
        at -= len(part)
    with pytest.raises(LinkError) as caught:
        codec.read(parts, max_bytes=1000)
    assert caught.value.fault == "corrupt"


def test_every_flipped_bit_of_head_and_tail_is_noticed() -> None:
    for number in (0, len(PARTS) - 1):
        part = bytes(PARTS[number])
        for bit in range(8 * len(part)):
            flipped = part[: bit // 8] + bytes([part[bit // 8] ^ 1 << bit % 8]) + part[bit // 8 + 1 :]
            with pytest.raises(LinkError):
                codec.read([flipped if n == number else p for n, p in enumerate(PARTS)], max_bytes=1000)


@FUZZ
@given(st.data())
def test_cut_lost_swapped_and_repeated_parts_are_noticed(data: st.DataObject) -> None:
    parts = [bytes(part) for part in PARTS]
    place, other = data.draw(st.integers(0, len(parts) - 1)), data.draw(st.integers(0, len(parts) - 1))
    kind = data.draw(st.sampled_from(["end", "lose", "cut", "grow", "swap", "repeat", "move", "empty"]))
    if kind == "end":
        parts = parts[:place]
    elif kind == "lose":
        del parts[place]
    elif kind == "cut":
        parts[place] = parts[place][: data.draw(st.integers(0, len(parts[place]) - 1))]
    elif kind == "grow":
        parts[place] += data.draw(st.binary(min_size=1, max_size=80))
    elif kind == "swap":
        parts[place], parts[other] = parts[other], parts[place]
    elif kind == "repeat":
        parts.insert(other, parts[place])
    elif kind == "move":
        parts.insert(other, parts.pop(place))
    else:
        parts.insert(place, b"")
    if parts == [bytes(part) for part in PARTS]:
        return
    with pytest.raises(LinkError) as caught:
        codec.read(parts, max_bytes=1000)
    assert caught.value.fault == "corrupt"


@FUZZ
@given(st.lists(st.one_of(st.binary(max_size=100), st.sampled_from([bytes(part) for part in PARTS])), max_size=14))
def test_a_heap_of_parts_is_the_answer_itself_or_nothing(parts: list[bytes]) -> None:
    try:
        answer = codec.read(parts, max_bytes=1000)
    except LinkError as err:
        assert err.fault == "corrupt"
    else:
        assert same(answer, an_answer())


def test_two_frames_cannot_be_mixed() -> None:
    answer = an_answer()
    answer.tensors["hidden.1"].add_(1)
    other = list(codec.encode(answer, chunk_bytes=64).parts())
    assert bytes(other[0]) == PARTS[0]  # only bytes of hidden.1 differ: cuts behind the first piece mix two answers
    for cut in range(2, len(PARTS)):
        with pytest.raises(LinkError, match="checksum"):
            codec.read([*PARTS[:cut], *other[cut:]], max_bytes=1000)


def tree_of_head() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(PARTS[0])
    return tree


def with_tensors(tensors: Any) -> bytes:
    return json.dumps({**tree_of_head(), "tensors": tensors}).encode()


def with_answer(**fields: Any) -> bytes:
    return json.dumps({**tree_of_head(), "answer": {**tree_of_head()["answer"], **fields}}).encode()


def spec(shape: Any, dtype: Any = "fp32", name: Any = "a") -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape}


BAD_HEADS = {
    "nothing": b"",
    "not JSON": b"\xff\xfe{",
    "10k deep": b'{"answer":' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "10k deep objects": b'{"answer":' * 10_000,
    "huge number": with_tensors([spec([1])]).replace(b"[1]", b"[" + b"9" * 5000 + b"]"),
    "infinite number": with_tensors([spec([1])]).replace(b"[1]", b"[1e999]"),
    "NaN": with_tensors([spec([1])]).replace(b"[1]", b"[NaN]"),
    "fraction": with_tensors([spec([1.5])]),
    "whole fraction": with_tensors([spec([2.0])]),
    "text as number": with_tensors([spec(["2"])]),
    "truth as number": with_tensors([spec([True])]),
    "negative": with_tensors([spec([-1])]),
    "two negatives": with_tensors([spec([-5, -5])]),
    "a trillion": with_tensors([spec([2**40 - 1])]),
    "product": with_tensors([spec([2**20, 2**20, 2**20])]),
    "over the limit": with_tensors([spec([251])]),
    "sum over the limit": with_tensors([spec([126], name="a"), spec([126], name="b")]),
    "many empty dims": with_tensors([spec([0] * 9)]),
    "dtype unknown": with_tensors([spec([1], dtype="float32")]),
    "dtype a list": with_tensors([spec([1], dtype=["fp32"])]),
    "name twice": with_tensors([spec([1]), spec([1])]),
    "name too long": with_tensors([spec([1], name="n" * 300)]),
    "2000 tensors": with_tensors([spec([], name=str(i)) for i in range(2000)]),
    "tensor as a list": with_tensors([["a", "fp32", [1]]]),
    "unknown field": json.dumps({**tree_of_head(), "more": 1}).encode(),
    "no pieces": json.dumps({**tree_of_head(), "chunk_bytes": 0}).encode(),
    "a shape of millions": with_tensors([spec([0] * 600_000)]),
    "too long": b" " * (codec.MAX_HEAD_BYTES + 1),
    "position": with_answer(start=-1),
    "bad text": with_answer(bad=[{**vars(BAD), "message": "x" * 1025}]),
    "bad count": with_answer(bad=[vars(BAD)] * 257),
    "bad kind": with_answer(bad=[{**vars(BAD), "kind": "odd"}]),
    "bad number": with_answer(bad=[{**vars(BAD), "sample": 2**70}]),
}


@pytest.mark.parametrize("case", BAD_HEADS)
def test_an_impossible_head_is_refused_before_there_is_room_for_anything(case: str) -> None:
    pool = BufferPool(4, 2**40)
    reader = codec.FrameReader(max_bytes=1000, pool=pool)
    tracemalloc.start()
    with pytest.raises(LinkError) as caught:
        reader.head(BAD_HEADS[case])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.fault == "corrupt" and len(str(caught.value)) < 600
    assert pool.num_buffers == 0
    # reading costs a few copies of the head; tracemalloc does not see torch's memory, which the pool counts
    assert peak < 2_000_000 + 4 * len(BAD_HEADS[case])


json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


@FUZZ
@given(st.sampled_from(["tensors", "chunk_bytes", "answer", "answer.pairs", "answer.bad", "answer.step", "tensor", "shape"]), json_trees)
def test_a_head_with_garbage_in_one_place_is_refused_or_harmless(place: str, garbage: Any) -> None:
    tree = tree_of_head()
    if place == "tensor":
        tree["tensors"][1] = garbage
    elif place == "shape":
        tree["tensors"][0]["shape"] = garbage
    elif "." in place:
        tree["answer"][place.split(".")[1]] = garbage
    else:
        tree[place] = garbage
    reader = codec.FrameReader(max_bytes=1000)
    try:
        reader.head(json.dumps(tree).encode())
    except LinkError as err:
        assert err.fault == "corrupt"
        return
    _, specs = codec.parse_head(json.dumps(tree).encode(), 1000)
    assert sum(s.num_bytes for s in specs) <= 1000
    for part in PARTS[1:-1]:  # whatever it says, its checksum is not in the tail
        try:
            reader.piece(part)
        except LinkError:
            return
    with pytest.raises(LinkError):
        reader.tail(PARTS[-1])


def test_many_tiny_pieces_are_refused() -> None:
    tree = {**tree_of_head(), "chunk_bytes": 1, "tensors": [spec([codec.MAX_PIECES + 1], dtype="uint8")]}
    with pytest.raises(LinkError, match="16385 pieces"):
        codec.FrameReader(max_bytes=10**6).head(json.dumps(tree).encode())
    with pytest.raises(ValueError, match="at most 1024 and 16384 may travel"):
        codec.encode(Answer(HEAD, {"a": torch.zeros(codec.MAX_PIECES + 1, dtype=torch.uint8)}), chunk_bytes=1)


def test_a_reader_takes_one_frame_and_parts_in_order() -> None:
    reader = codec.FrameReader(max_bytes=1000)
    for early in (lambda: reader.piece(PARTS[1]), lambda: reader.tail(PARTS[-1])):
        with pytest.raises(LinkError):
            early()
    reader.head(PARTS[0])
    with pytest.raises(LinkError, match="second head"):
        reader.head(PARTS[0])
    for part in PARTS[1:-1]:
        reader.piece(part)
    with pytest.raises(LinkError, match="not what the head announced"):
        reader.piece(PARTS[1])
    answer = reader.tail(PARTS[-1])
    with pytest.raises(LinkError):
        reader.tail(PARTS[-1])
    assert same(answer, an_answer())


def test_who_accepts_sees_the_head_before_there_is_room() -> None:
    pool = BufferPool(1, 2**20)

    def accept(head: AnswerHead, specs: Any) -> None:
        assert head == HEAD and [s.name for s in specs] == list(an_answer().tensors)
        raise LinkError("corrupt", "nobody asked for this")

    with pytest.raises(LinkError, match="nobody asked"):
        codec.FrameReader(max_bytes=1000, pool=pool, accept=accept).head(PARTS[0])
    assert pool.num_buffers == 0


@pytest.mark.parametrize(
    ("tensor", "told"),
    [
        (torch.zeros(4, 4).t(), r"not contiguous \(strides \(1, 4\)\)"),
        (torch.zeros(4)[::2], "not contiguous"),
        (torch.zeros(2, device="meta"), "lies on meta"),
        (torch.zeros(2, dtype=torch.float64), "cannot travel; allowed are fp32, bf16"),
        (torch.zeros(2, dtype=torch.complex64), "cannot travel"),
        (torch.zeros([1] * 9), "cannot travel"),
    ],
)
def test_a_tensor_that_cannot_travel_is_refused(tensor: torch.Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        codec.encode(Answer(HEAD, {"x": tensor}))


def test_the_sender_keeps_what_it_tells_of_damaged_samples_within_bounds() -> None:
    bad = tuple(BadSample("io", "s" * 300, "k", i, i, -1, f"{i} " + "\U0001f600" * 2000) for i in range(MAX_BAD + 44))
    answer = Answer(AnswerHead(**{**vars(HEAD), "bad": bad, "lost": "x" * 9999}), {})
    got = codec.read(list(codec.encode(answer).parts()), max_bytes=0).head
    assert len(got.bad) == MAX_BAD and got.bad[0].message.startswith("0 ") and len(got.bad[0].message) == MAX_BAD_TEXT
    assert got.bad[-1].message.startswith("and 44 more damaged samples in this micro-batch; 255 ")
    assert len(got.bad[0].shard) == 256 and len(got.lost) == 4096


@pytest.mark.parametrize("pool", [None, BufferPool(1, 2**20)])
def test_tensors_that_torch_cannot_make_are_the_fault_of_the_head(pool: BufferPool | None) -> None:
    tree = json.loads(PARTS[0])
    tree["tensors"][2]["shape"] = [2**39, 2**39, 0]  # no bytes at all, and strides of 2^78
    with pytest.raises(LinkError, match=r"no room for the \d+ bytes that the head announces .*overflow") as refused:
        codec.FrameReader(max_bytes=1000, pool=pool).head(json.dumps(tree).encode())
    assert refused.value.fault == "corrupt"
