"""The ledger of slots: what the ranks trained on is the plan, each slot once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distributed.world import World
from m2mkd_ds.train import ledger as ledgers
from m2mkd_ds.train.ledger import SlotLedger, SlotLedgerError, slot_hash

LAYOUT = BatchLayout(micro_batch_size=3, accumulation=2, world=2)


def filled(monkeypatch: pytest.MonkeyPatch, change: dict[int, int]) -> SlotLedger:
    """The ledger of rank 0 after steps 4 to 6, the other rank's sums added by a stand-in for the collective."""
    world = World(0, 2, 0, 2, torch.device("cpu"))
    ours, theirs = SlotLedger(LAYOUT, 4, world), SlotLedger(LAYOUT, 4, world)
    for step in range(4, 7):
        for micro_step in range(2):
            for rank, side in enumerate((ours, theirs)):
                slots = [change.get(p, p) for p in LAYOUT.positions(step, micro_step, rank)]
                side.add(torch.tensor([p for p in slots if p >= 0], dtype=torch.int64))
    monkeypatch.setattr(ledgers, "all_reduce_sum", lambda sums: sums + torch.tensor([theirs._count, ledgers._signed(theirs._hash)]))
    return ours


def test_the_slots_of_the_plan_pass_and_the_next_check_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = filled(monkeypatch, {})
    ledger.check(7)
    with pytest.raises(SlotLedgerError, match="steps 7 to 7 should have used 12 slots"):
        ledger.check(8)  # nothing came for step 7, but the stand-in repeats the other rank's old sums


@pytest.mark.parametrize("change", [{50: 51}, {50: -1}, {48: 60}], ids=["one twice", "one lost", "one of another step"])
def test_a_slot_lost_or_used_twice_is_found(monkeypatch: pytest.MonkeyPatch, change: dict[int, int]) -> None:
    ledger = filled(monkeypatch, change)  # steps 4 to 6 own positions 48 to 83
    with pytest.raises(SlotLedgerError, match=r"steps 4 to 6 should have used 36 slots"):
        ledger.check(7)


def test_the_hash_is_splitmix64() -> None:
    # First output of splitmix64 with state 0, from its published reference implementation.
    assert slot_hash(np.array([0])) == 0xE220A8397B1DCDAF


@given(st.lists(st.integers(0, 2**40), max_size=30), st.randoms())
def test_the_hash_of_a_set_is_the_sum_of_its_members(positions: list[int], random: object) -> None:
    total = sum(slot_hash(np.array([p])) for p in positions) % 2**64
    shuffled = list(positions)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert slot_hash(np.array(shuffled, dtype=np.int64)) == total
