"""ZeRO's engines moment by moment, with numbers worked out by hand; bytes unless said otherwise."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from m2mkd_ds.config import ROUTER_PRESETS
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.planner.engine_memory import EngineSettings, make_engine
from m2mkd_ds.planner.ledger import Ledger
from m2mkd_ds.planner.partition import FlatRow, Partition, partition
from m2mkd_ds.planner.shapes_of_experts import prepare_experts_
from m2mkd_ds.planner.step_trace import Arrival, StepTrace

PART_OF_TWO = Partition((FlatRow(("a", "b", "c"), (100, 60, 40), 2),), frozenset(), 2)
"""Three parameters of 200 elements, halves of 100: a lies in the first, b and c in the second."""
TRACE = StepTrace(
    forward_peak=5000, saved=4000,
    arrivals=(Arrival("c", 160, peak=4500, left=3000), Arrival("b", 240, peak=3500, left=1000), Arrival("a", 400, peak=1600, left=0)),
    end_peak=0,
)  # fmt: skip
"""Gradients come from the end of the model."""
GRADIENTS_ONLY = StepTrace(
    forward_peak=0, saved=0, arrivals=tuple(Arrival(x.name, x.grad_bytes, x.grad_bytes, 0) for x in TRACE.arrivals), end_peak=0
)
"""As if activations cost nothing."""


def settings(stage: int, *, precision: str = "fp32", bucket: int = 1000, is_gpu: bool = True, **zero: Any) -> EngineSettings:
    return EngineSettings(stage=stage, precision=precision, bucket=bucket, overlap=False, zero=zero, is_gpu=is_gpu)


def backward(given: EngineSettings, part: Partition = PART_OF_TWO, trace: StepTrace = TRACE) -> Ledger:
    """An engine after one micro-batch; only gradients and buffers are in the ledger, so that sums are small."""
    ledger = Ledger()
    engine = make_engine(given, part, ledger, "x")
    engine.backward(trace, is_first=True, is_last=True)
    return ledger


def test_a_rank_holds_weights_masters_and_moments() -> None:
    ledger = Ledger()
    make_engine(settings(1), PART_OF_TWO, ledger, "x").hold()
    # 200 weights of 4 bytes; 100 masters of 4 and two moments of 4.
    assert {name: size for name, size in ledger.parts.items() if size} == {"weights": 800, "masters": 400, "moments": 800}


def test_bf16_of_stage_1_holds_whole_fp32_gradients_too() -> None:
    ledger = Ledger()
    make_engine(settings(1, precision="bf16"), PART_OF_TWO, ledger, "x").hold()
    assert {n: s for n, s in ledger.parts.items() if s} == {"weights": 400, "gradients": 800, "masters": 400, "moments": 800}


def test_bf16_of_stage_1_keeps_bf16_gradients_until_the_update_is_over() -> None:
    ledger = Ledger()
    engine = make_engine(settings(1, precision="bf16"), PART_OF_TWO, ledger, "x")
    engine.backward(GRADIENTS_ONLY, is_first=True, is_last=True)
    # All three (800 here), and the largest (400) in fp32, twice as many bytes, on its way to the fp32 gradients. No copy for the
    # reduction, because there is one row only.
    assert (ledger.parts["gradients"], ledger.peak.total) == (800, 800 + 800)
    engine.update()
    assert ledger.parts["gradients"] == 0


def test_stage_1_keeps_all_gradients_until_the_last_and_then_its_own() -> None:
    ledger = backward(settings(1))
    # The forward pass has 5000 and nothing else. The second gradient: 3260 of activations, 240 of its own, the first (160), and the
    # bucket (4000) that came with the first. The first itself: 4340 + 160, no bucket yet.
    assert ledger.peak.total == 3260 + 240 + 160 + 4000
    assert ledger.peak.when == "x: backward"
    assert ledger.parts["gradients"] == 4 * 100  # a alone, or b and c: as many
    assert ledger.parts["buffers"] == 0


def test_stage_2_frees_a_gradient_when_it_is_in_the_bucket() -> None:
    ledger = backward(settings(2))
    # As above without the first gradient, which lies in the bucket.
    assert ledger.peak.total == 3260 + 240 + 4000
    assert ledger.parts["gradients"] == 4 * 100


def test_a_full_bucket_is_reduced_with_a_copy_while_the_backward_pass_goes_on() -> None:
    # A bucket of 100 elements: c and b fill it, a does not fit in any more. In that moment: 0 left of activations, a's gradient (400),
    # the bucket (400), the copy of c and b (400), and no own buffer yet (rank 0's own is a, rank 1's is b and c: 400 then).
    ledger = backward(settings(2, bucket=100), trace=GRADIENTS_ONLY)
    assert ledger.peak.total == 400 + 400 + 400
    assert ledger.peak.when == "x: reducing gradients"


def test_one_rank_reduces_without_a_copy() -> None:
    alone = Partition((FlatRow(("a", "b", "c"), (100, 60, 40), 1),), frozenset(), 1)
    ledger = backward(settings(2, bucket=200), alone, GRADIENTS_ONLY)
    # The bucket (800), and all 200 elements as its own.
    assert ledger.peak.total == 800 + 800


@pytest.mark.parametrize(("is_gpu", "copies"), [(True, 1), (False, 3)])
def test_the_update_copies_a_rows_gradients_and_on_a_cpu_adamw_needs_two_more(is_gpu: bool, copies: int) -> None:
    ledger = Ledger()
    engine = make_engine(settings(2, is_gpu=is_gpu), PART_OF_TWO, ledger, "x")
    engine.update()
    # One row of 100 elements a rank. On a CPU gloo's gathering (800 bytes for 200 weights) is less than three copies (1200).
    assert ledger.peak.total == copies * 400


def test_with_accumulation_stage_1_keeps_gradients_and_bucket_between_micro_batches() -> None:
    ledger = Ledger()
    engine = make_engine(settings(1), PART_OF_TWO, ledger, "x")
    engine.backward(TRACE, is_first=True, is_last=False)
    assert (ledger.parts["gradients"], ledger.parts["buffers"]) == (800, 4000)
    engine.backward(TRACE, is_first=False, is_last=True)
    # The second forward pass meets both.
    assert ledger.peak.total == 5000 + 800 + 4000
    assert (ledger.parts["gradients"], ledger.parts["buffers"]) == (400, 0)


def test_later_micro_batches_add_to_the_gradients_that_are_there() -> None:
    ledger = Ledger()
    engine = make_engine(settings(1), PART_OF_TWO, ledger, "x")
    engine.backward(GRADIENTS_ONLY, is_first=True, is_last=False)
    engine.backward(GRADIENTS_ONLY, is_first=False, is_last=True)
    # All gradients of the first micro-batch (800), the bucket (4000), and the largest new one (400) until it is added.
    assert ledger.peak.total == 800 + 4000 + 400


def test_parts_are_equal_and_the_fullest_rank_is_the_one_with_the_largest_parameters() -> None:
    # 10 + 90 + 11 = 111 elements, padded to 112 for two ranks: 56 each. Rank 0 has the first and reaches into the second (100), rank 1
    # has the rest of it and the third (101).
    row = FlatRow(("a", "b", "c"), (10, 90, 11), 2)
    assert (row.padded, row.part) == (112, 56)
    assert (row.reaching(0), row.reaching(1)) == (("a", "b"), ("b", "c"))
    assert Partition((row,), frozenset(), 2).own == {"b", "c"}


def test_a_module_has_a_row_for_matrices_one_for_the_rest_and_both_for_spread_experts() -> None:
    arch = VMoEArch(
        image_size=16, patch_size=8, num_classes=10, embed_dim=8, num_heads=2, mlp_ratio=2, num_blocks=1, moe_blocks=(0,), num_experts=4,
        router=ROUTER_PRESETS["fastmoe"],
    )  # fmt: skip
    module: nn.Module = VisionMoE(arch, StageSpan.whole(1), seed=None)
    prepare_experts_(module, "loop", 2)
    rows = partition(module, 4, 2).rows
    # Two experts a rank: 2 * (16 * 8) twice; their biases 2 * 16 and 2 * 8. Four ranks in groups of two: two ranks hold the same experts.
    assert [(row.numel, row.ranks) for row in rows[2:]] == [(512, 2), (48, 2)]
    # Matrices: patches 8*3*64, qkv 24*8, proj 8*8, router 4*8, head 10*8.
    assert (rows[0].numel, rows[0].ranks) == (8 * 3 * 64 + 24 * 8 + 64 + 32 + 80, 4)
    assert sum(row.numel for row in rows) == sum(p.numel() for p in module.parameters())
