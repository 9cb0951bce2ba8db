"""The parts under `m2mkd bench experts`: workload, timing order, memory accounting, FLOPs; numbers by hand."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from m2mkd_ds.bench.cases import Absent, Case, Ran, ffn_cases
from m2mkd_ds.bench.experts import _check_load
from m2mkd_ds.bench.layer_cases import layer_cases
from m2mkd_ds.bench.measure import Spread, measure
from m2mkd_ds.bench.memory import account, run_once
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.bench.rows import Local, merge, useful_flops
from m2mkd_ds.bench.step import images_for, step_cases
from m2mkd_ds.bench.workload import Workload, make_workload, steered_tokens, wanted_experts
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import Progress
from m2mkd_ds.moe.backends import BACKENDS

CPU = torch.device("cpu")
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=CPU)


def workload(routing: Any, dtype: torch.dtype = torch.float32, **sizes: Any) -> Workload:
    options = ExpertBench(**{"tokens": 60, "dim": 32, "hidden": 48, "experts": 8, **sizes})
    return make_workload(options, routing, rank=0, device=CPU, dtype=dtype)


def test_the_load_of_a_trained_student_is_met_in_its_most_uneven_block(tmp_path: Path) -> None:
    (tmp_path / "evaluate").mkdir()
    blocks = {"0": [10, 10, 10, 10], "1": [60, 0, 20, 20], "2": [20, 10, 5, 5]}  # max/mean 1, 2.4, 2
    (tmp_path / "evaluate" / "results.json").write_text(json.dumps({"expert_load": {"student": blocks, "baseline": {"0": [1, 0, 0, 0]}}}))
    work = workload("run", experts=4, tokens=4000, top_k=1, load_from=tmp_path)
    # 4000 draws with shares 60, 1, 20, 20 of 101 (an expert without rows counts as one row): 2376, 40, 792, 792; four standard deviations
    # of the first are 4 * sqrt(4000 * .594 * .406) = 124
    assert work.load == pytest.approx([2376, 40, 792, 792], abs=125)
    with pytest.raises(ValueError, match=r"its student has \[4\] experts and --experts is 8; make them equal"):
        workload("run", load_from=tmp_path)
    with pytest.raises(ValueError, match="give the folder of a run that was evaluated"):
        workload("run", load_from=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--routing run and --load-from RUN belong together"):
        ExpertBench(routing=("run",)).check()


def test_flops_by_hand_and_by_torchs_counter() -> None:
    # 5 rows, D = 4, F = 8: up 2*5*4*8 = 320, down 320, forward 640; backward twice that: 1920. swiglu's third map: 2880.
    assert useful_flops(5, 4, 8, "gelu") == 1920 and useful_flops(5, 4, 8, "swiglu") == 2880
    for activation in ("gelu", "swiglu"):
        work = workload("balanced", activation=activation)
        for case in [*ffn_cases(work, ["dense"]), *layer_cases(work, ["dense"], ALONE)[:1]]:
            assert isinstance(case, Case) and case.peer == "dense"
            with FlopCounterMode(display=False) as counter:
                case.backward(case.forward().output)
            assert counter.get_total_flops() == useful_flops(120, 32, 48, activation)


@pytest.mark.parametrize("peer", [name for name in ("loop", "padded", "deepspeed") if name in (*BACKENDS, "deepspeed")])
def test_computed_rows_are_those_that_torchs_counter_sees(peer: str) -> None:
    work = workload("zipf")
    (case, *_) = layer_cases(work, [peer], ALONE)
    assert isinstance(case, Case)
    with FlopCounterMode(display=False) as counter:
        case.forward()
    # A row costs 4 * 32 * 48 = 6144 in the experts; router (2 * 60 * 32 * 8) off, DeepSpeed's gate is left with less than one row's.
    assert (counter.get_total_flops() - 2 * 60 * 32 * 8) // 6144 == case.computed_rows


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balanced_routing_gives_equal_loads_and_zipf_falling_ones(top_k: int) -> None:
    options = ExpertBench(tokens=4000, experts=8, top_k=top_k)
    for routing in ("balanced", "zipf"):
        ids_TK = wanted_experts(options, routing, torch.Generator().manual_seed(0))
        assert ids_TK.shape == (4000, top_k)
        assert all(len(set(ids)) == top_k for ids in ids_TK.tolist())
        load = torch.bincount(ids_TK.flatten(), minlength=8)
        if routing == "balanced":
            assert load.tolist() == [500 * top_k] * 8
        elif top_k == 1:
            # 1/n over the sum of 1/1..1/8 = 2.7179; five standard deviations of a binomial.
            for expert, count in enumerate(load.tolist()):
                share = 1 / (expert + 1) / 2.717857
                assert abs(count - 4000 * share) < 5 * math.sqrt(4000 * share * (1 - share))
        else:
            assert load.tolist() == sorted(load.tolist(), reverse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("routing", ["balanced", "zipf"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_gate_routes_the_tokens_as_planned_in_every_dtype(routing: str, dtype: torch.dtype, top_k: int) -> None:
    work = workload(routing, dtype, top_k=top_k)
    # An independent gate: fp64 logits of the rounded tokens; the chosen stand clear of the others.
    logits_TE = work.x_TD.double() @ work.layer.router.weight.detach().double().T
    top = logits_TE.topk(top_k + 1, dim=1)
    assert torch.equal(top.indices[:, :top_k], work.expert_ids_TK)
    assert float((top.values[:, :-1] - top.values[:, 1:]).min()) > 0.8  # 1.5 minus a third of it, minus rounding
    if routing == "balanced":
        assert max(work.load) - min(work.load) <= 1
    again = workload(routing, dtype, top_k=top_k)
    assert torch.equal(again.x_TD, work.x_TD) and torch.equal(again.rows_RD, work.rows_RD)


def test_steered_tokens_want_the_given_experts_in_the_given_order() -> None:
    ids_TK = torch.tensor([[2, 0], [1, 2], [0, 1]])
    directions_ED = torch.eye(3, 16)  # the logits are the first three entries
    x_TD = steered_tokens(ids_TK, directions_ED, torch.Generator().manual_seed(0))
    assert torch.equal(x_TD[:, :3].topk(2, dim=1).indices, ids_TK)
    # First choices at 2 * 1.5, second ones at 1.5, the third at 0, each plus up to 0.5; the rest of a token is noise of size 1.
    assert torch.all((x_TD[:, :3].sort(dim=1, descending=True).values - torch.tensor([3.0, 1.5, 0.0])) >= 0)
    assert float(x_TD[:, :3].max()) <= 3.5 and 0.5 < float(x_TD[:, 3:].std()) < 1.5


def test_a_peer_that_routes_otherwise_is_refused() -> None:
    work = workload("zipf")
    _check_load("peer", list(work.load), work)
    moved = [work.load[0] - 1, work.load[1] + 1, *work.load[2:]]
    with pytest.raises(RuntimeError, match="peer routes otherwise with routing zipf"):
        _check_load("peer", moved, work)


def stub(name: str, log: list[str], seconds: float = 0.0) -> Case:
    leaf = torch.zeros(1, requires_grad=True)

    def forward() -> Ran:
        log.append(name)
        time.sleep(seconds)
        return Ran(leaf * 2)

    return Case(name, forward, lambda y: y.backward(), [leaf], 1, 1)


def run(cases: list[Case], rounds: int, seconds: float) -> dict[str, Any]:
    with Progress(rounds * len(cases), "test", enabled=False) as bar:
        return measure(cases, rounds, seconds=seconds, device=CPU, world=ALONE, bar=bar)


def test_cases_are_measured_in_turn_and_stop_early_only_after_three_rounds() -> None:
    log: list[str] = []
    samples = run([stub("a", log), stub("b", log)], rounds=4, seconds=0)
    assert log == ["a", "b"] * 4
    assert all(len(s.forward_ms) == len(s.backward_ms) == 4 for s in samples.values())
    log.clear()
    samples = run([stub("a", log, 0.02)], rounds=50, seconds=0.001)
    assert len(log) == 3 and min(samples["a"].forward_ms) >= 20 and max(samples["a"].backward_ms) < 20
    log.clear()
    run([stub("a", log)], rounds=2, seconds=0.001)
    assert len(log) == 2


def test_spread_of_one_to_eleven() -> None:
    assert Spread.of([float(n) for n in range(11, 0, -1)]) == Spread(6.0, 2.0, 10.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_ranks_merge_to_the_slowest_time_and_the_sum_of_the_work() -> None:
    one = Local([1.0, 5.0], [2.0, 2.0], 10, 20, 24, [15, 5], 100, 50, 1e-6, 2e-6)
    two = Local([3.0, 4.0], [1.0, 9.0], 10, 20, 40, [5, 15], 200, 40, 3e-6, 1e-6)
    assert merge([one, two]) == Local([3.0, 5.0], [2.0, 9.0], 20, 40, 64, [20, 20], 200, 50, 3e-6, 2e-6)


def test_memory_events_are_added_up_in_order_of_time() -> None:
    def change(ts: float, num_bytes: int) -> dict[str, Any]:
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": num_bytes}}

    # 100, 140, 40 | mark | 90, 0: peak 140, at the mark 40.
    events = [change(5, 50), change(1, 100), change(3, -100), change(2, 40), {"name": "m2mkd/forward_ends", "ts": 4}, change(6, -90)]
    assert account(events) == (140, 40)


def test_saved_and_peak_bytes_of_a_pass_worked_out_by_hand() -> None:
    x = torch.randn(64, 32)
    weight = torch.randn(32, 256, requires_grad=True)

    def forward() -> Ran:
        return Ran(F.gelu(x @ weight))

    grad = torch.ones(64, 256)
    case = Case("hand", forward, lambda y: y.backward(grad), [weight], 64, 64)
    _, memory = run_once(case, CPU)
    # GELU keeps its input, 64 * 256 fp32; its output is the output.
    assert memory.saved_bytes == 64 * 256 * 4
    # Peak: that input, the output, and GELU's gradient, 65536 bytes each; the weight's gradient (32 * 256 * 4) comes while the first
    # and the output may still be held.
    assert 3 * 65536 <= memory.peak_bytes <= 3 * 65536 + 32768
    assert run_once(case, CPU)[1] == memory


def test_a_step_of_a_pair_has_one_loss_whatever_the_backend() -> None:
    options = ExpertBench(tokens=15, dim=16, hidden=32, experts=4)
    cases = step_cases(options, ["dense", *BACKENDS], rank=0, device=CPU, dtype=torch.float32)
    losses = {case.peer: float(case.forward().output.detach()) for case in cases if isinstance(case, Case)}
    assert {"dense", "reference", "grouped"} <= set(losses)
    ours = [loss for name, loss in losses.items() if name != "dense"]
    assert max(ours) - min(ours) < 1e-5 and abs(losses["dense"] - ours[0]) > 1e-6
    other = step_cases(replace(options, activation="swiglu"), ["dense"], rank=0, device=CPU, dtype=torch.float32)
    assert other[0].peer == "dense" and isinstance(other[0], Absent)
    case = next(case for case in cases if case.peer == "grouped")
    assert isinstance(case, Case)
    before = [leaf.detach().clone() for leaf in case.leaves]
    case.backward(case.forward().output)
    assert any(not torch.equal(leaf, old) for leaf, old in zip(case.leaves, before, strict=True))  # the optimizer is in the backward
    # 3152 = 16 * 197 tokens of 224-pixel images; 15 = 3 * 5 of 32-pixel ones, with four patches and the class token.
    assert (images_for(3152).count, images_for(3152).tokens) == (16, 3152) and (images_for(15).count, images_for(15).tokens) == (3, 15)
