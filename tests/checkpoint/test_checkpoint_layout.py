"""Layouts: where every element of every weight lies, against padding and chunking whole tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2mkd_ds.checkpoint.state.layout import FlatGroup, PartedGroup, lay_out
from tests.checkpoint.checkpoint_maker import cut


def test_a_row_of_two_tensors_on_two_ranks_by_hand() -> None:
    # a has 3 elements, b 4: a row of 7, padded to 8, is 4 a rank. Rank 0: a0 a1 a2 b0; rank 1: b1 b2 b3 pad.
    flat = lay_out("flat", {"a": (3,), "b": (2, 2)}, data_size=2, ep_size=1)
    assert type(flat) is FlatGroup and flat.part_numel == 4
    assert [(s.name, s.start, s.length, s.offset) for s in flat.held()] == [("a", 0, 3, 0), ("b", 0, 1, 3)]
    assert [(s.name, s.start, s.length, s.offset) for s in flat.at(1).held()] == [("b", 1, 3, 0)]
    assert [(rank, s.start, s.length, s.offset) for rank, s in flat.find_whole("b", 0, 3)] == [(0, 0, 1, 3), (1, 1, 2, 0)]


def test_pieces_of_two_tensors_on_two_ranks_by_hand() -> None:
    # a is cut into 2 + 1 (and a zero), b into 2 + 2. Rank 0: a0 a1 b0 b1; rank 1: a2 pad b2 b3.
    parted = lay_out("parted", {"a": (3,), "b": (2, 2)}, data_size=2, ep_size=1)
    assert type(parted) is PartedGroup and parted.part_numel == 4
    assert [(s.name, s.start, s.length, s.offset) for s in parted.at(1).held()] == [("a", 2, 1, 0), ("b", 2, 2, 2)]
    assert [(rank, s.start, s.length, s.offset) for rank, s in parted.find_whole("a", 1, 3)] == [(0, 1, 1, 1), (1, 2, 1, 0)]


def test_spread_experts_by_hand() -> None:
    # 4 experts of 2 elements over 2 ranks that share them, each repeated twice: 4 ranks. Experts 0 and 1 are share 0 (ranks 0 and 2: 2
    # elements each), 2 and 3 are share 1 (ranks 1 and 3). Elements 3..5 of the whole tensor: the last of share 0, the first two of share 1.
    spread = lay_out("flat", {"w": (4, 2)}, data_size=2, ep_size=2)
    assert spread.shapes == ((2, 2),) and spread.canonical_shapes == {"w": (4, 2)} and spread.part_numel == 2
    assert [(rank, s.start, s.length, s.offset) for rank, s in spread.find_whole("w", 3, 6)] == [(2, 3, 1, 1), (1, 0, 2, 0)]
    assert (spread.at(3).ep_rank, spread.at(3).data_rank) == (1, 1)


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=2), min_size=1, max_size=5)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["flat", "parted"]), extents=shapes, data_size=st.integers(1, 7), ep_size=st.integers(1, 4), data=st.data())
def test_the_parts_of_any_cluster_join_to_the_original(
    kind: str, extents: list[list[int]], data_size: int, ep_size: int, data: st.DataObject
) -> None:
    names = [f"w{i}" for i in range(len(extents))]
    wholes = {name: (ep_size * (i + 1), *extent) for i, (name, extent) in enumerate(zip(names, extents, strict=True))}
    layout = lay_out(kind, wholes, data_size=data_size, ep_size=ep_size)
    assert layout.canonical_shapes == {name: torch.Size(shape) for name, shape in wholes.items()}
    first = 1.0  # no element is zero, as padding is
    tensors = {}
    for name, shape in wholes.items():
        numel = torch.Size(shape).numel()
        tensors[name] = torch.arange(first, first + numel).view(shape)
        first += numel
    # The oracle: whole tensors, chunked over the shares, then padded and chunked over the ranks that hold the same share.
    shares = [[tensors[name].chunk(ep_size)[share] for name in names] for share in range(ep_size)]
    parts = {part * ep_size + share: p for share in range(ep_size) for part, p in enumerate(cut(shares[share], kind, data_size))}
    assert {p.numel() for p in parts.values()} == {layout.part_numel}

    for rank, part_P in parts.items():
        here = layout.at(rank)
        rebuilt_P = torch.zeros(layout.part_numel)
        for span in here.held():
            at = here.ep_rank * here.numel_of[span.name] + span.start
            rebuilt_P[span.offset : span.offset + span.length] = tensors[span.name].flatten()[at : at + span.length]
        assert torch.equal(rebuilt_P, part_P)  # and so every place that `held` leaves out is padding
        named = dict(zip(names, shares[here.ep_rank], strict=True))
        assert torch.equal(here.local(here.join(named)), part_P)
        joined = here.split(torch.cat([parts[p * ep_size + here.ep_rank] for p in range(data_size)]))
        assert all(torch.equal(joined[name], named[name]) for name in names)

    for name, whole in tensors.items():
        start = data.draw(st.integers(0, whole.numel()))
        stop = data.draw(st.integers(start, whole.numel()))
        found = [parts[rank][span.offset : span.offset + span.length] for rank, span in layout.find_whole(name, start, stop)]
        assert torch.equal(torch.cat([torch.zeros(0), *found]), whole.flatten()[start:stop])


def test_parts_that_cannot_hold_their_tensors_are_refused() -> None:
    with pytest.raises(RuntimeError, match="2 parts of 3 elements cannot hold the 7 of a"):
        FlatGroup(("a",), (torch.Size((7,)),), 3, 0, 2)
