"""Weak scaling: rows by hand, the clock around collectives, and one real launch of two ranks."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from m2mkd_ds.bench.collective_time import CollectiveTime, timed_collectives
from m2mkd_ds.bench.scaling import Measured
from m2mkd_ds.bench.scaling_options import ScalingBench
from m2mkd_ds.bench.scaling_plot import draw
from m2mkd_ds.bench.scaling_rows import make_rows, notes
from m2mkd_ds.cli import main

ONE = Measured(
    workload="m2mkd", layout="zero2", ranks=1, ep_size=1, step_s=[0.5, 0.4, 0.6], collective_s=[[0.0, 0.0, 0.0]], collective_calls=3,
    collective_bytes=1000, unmeasured=0, parameters=10, loss=1.0, threads=1, cores=2,
)  # fmt: skip
TWO = replace(ONE, ranks=2, step_s=[0.6, 0.5, 0.7], collective_s=[[0.3, 0.1, 0.2], [0.1, 0.1, 0.1]])
FOUR = replace(ONE, ranks=4, layout="zero2_ep", ep_size=4, step_s=[1.0, 1.0, 1.0], collective_s=[[0.5, 0.5, 0.5]] * 4)


def test_rows_hold_efficiency_against_one_rank_and_against_the_cores() -> None:
    four, one, two = sorted(make_rows([FOUR, TWO, ONE], micro_batch=8), key=lambda row: (row.layout != "zero2_ep", row.ranks))
    # 8 images in the median 0.5 s; 16 in 0.6 s; 32 in 1 s.
    assert (one.images_per_s, two.images_per_s, four.images_per_s) == pytest.approx((16, 80 / 3, 32))
    assert (one.efficiency, two.efficiency, four.efficiency) == pytest.approx((1, 80 / 3 / 32, 32 / 64))
    # Four ranks of one thread on two cores can do what two could: 32 images/s are all of it. Spread experts are compared with zero2.
    assert (two.core_efficiency, four.core_efficiency) == pytest.approx((80 / 3 / 32, 1))
    # Of 1.8 s, rank 0 was inside for 0.6 and rank 1 for 0.3.
    assert (two.communication_share, two.least_share) == pytest.approx((0.25, 1 / 6))
    assert (one.cores_per_rank, four.cores_per_rank) == (2, 0.5)
    assert any("With 4 ranks the host has fewer cores" in line for line in notes([one, two, four]))
    assert draw([one, two, four]) == draw([one, two, four])


def test_without_one_rank_there_is_no_efficiency_and_unmeasured_time_is_refused() -> None:
    (row,) = make_rows([TWO], 8)
    assert (row.efficiency, row.core_efficiency) == (None, None)
    with pytest.raises(RuntimeError, match="3 asynchronous collectives"):
        make_rows([replace(TWO, unmeasured=3)], 8)


def test_only_the_outermost_collective_is_timed_and_bytes_are_those_handed_in() -> None:
    clock = CollectiveTime()

    def inner(x: torch.Tensor, async_op: bool = False) -> None:
        time.sleep(0.02)

    timed_inner = clock.wrap(inner)
    timed_outer = clock.wrap(lambda tensors: [timed_inner(x) for x in tensors])
    timed_outer([torch.zeros(10), torch.zeros(5)])
    taken = clock.take()
    assert (taken.calls, taken.num_bytes, taken.unmeasured) == (1, 60, 0)
    assert 0.04 <= taken.seconds < 5
    timed_inner(torch.zeros(1), async_op=True)
    assert clock.take().unmeasured == 1
    assert clock.take().calls == 0


def test_torchs_functions_are_back_afterwards_even_after_an_error() -> None:
    before = torch.distributed.all_reduce

    def fails() -> None:
        with timed_collectives():
            assert torch.distributed.all_reduce is not before
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.distributed.all_reduce is before


@pytest.mark.parametrize(
    ("change", "told"), [({"ranks": (1, 1)}, "different numbers"), ({"dim": 100}, "multiple of 64"), ({"steps": 0}, "--steps is 0")]
)
def test_numbers_that_make_no_measurement_are_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(ScalingBench(), **change).check()


def test_a_quick_run_has_two_ranks_at_most_and_the_command_can_be_typed_again() -> None:
    bench = ScalingBench(quick=True, steps=20)
    assert (bench.resolved().ranks, bench.resolved().steps) == ((1, 2), 4)
    assert bench.command() == "m2mkd bench scaling --steps 20 --quick"


@pytest.mark.slow
def test_two_ranks_are_launched_and_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    words = "--ranks 2 --dim 64 --experts 4 --micro-batch 2 --steps 2 --warm-up 1 --workloads m2mkd --layouts zero2 zero2_ep"
    main(["bench", "scaling", *words.split(), "--out", str(tmp_path)])
    result = json.loads((tmp_path / "scaling_cpu.json").read_text())
    whole, spread = result["rows"]
    assert [(row["layout"], row["ranks"], row["ep_size"]) for row in result["rows"]] == [("zero2", 2, 1), ("zero2_ep", 2, 2)]
    assert whole["parameters"] == spread["parameters"]  # the job's, however they are spread
    assert 0 < whole["least_share"] <= whole["communication_share"] < 1
    # Spread experts exchange rows in both directions of both blocks, and counts before: more calls than two pairs with whole experts.
    assert spread["collective_calls"] > whole["collective_calls"] >= 4
    # A gradient of every parameter and its whole weight are handed over at least once, in fp32.
    assert whole["collective_mb"] * 1e6 >= 8 * whole["parameters"] and math.isfinite(spread["images_per_s"])
    assert (tmp_path / "scaling_cpu.md").read_text().count("| m2mkd |") == 2
