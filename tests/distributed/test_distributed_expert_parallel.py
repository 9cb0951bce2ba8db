"""Experts spread over 2 and 4 ranks by the real launcher, ZeRO-1, -2 and -3, against one process. One start for each number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import ConfigError
from m2mkd_ds.distributed.groups import ExpertGroups, check_expert_parallel
from tests.distributed import experts_job as job
from tests.launching import launch

CASES = [(ranks, *case) for ranks, cases in job.CASES.items() for case in cases]
IDS = [f"{ranks} ranks-{name}-{precision}-ep{ep}" for ranks, name, precision, ep in CASES]
EXACT = [case for case in CASES if case[2] == "fp32"]
Results = dict[int, dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    out = tmp_path_factory.mktemp("experts")
    found = {}
    for ranks in job.CASES:
        launch(Path(job.__file__), [str(out)], ranks=ranks)
        found[ranks] = torch.load(out / f"world_{ranks}.pt", weights_only=True)
    return found


def of(results: Results, case: tuple[int, str, str, int]) -> dict[str, Any]:
    ranks, name, precision, ep_size = case
    return results[ranks][f"{name}_{precision}_{ep_size}"]


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference; names and shapes must agree. By torch's max, which passes NaN on (Python's does not)."""
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    return float(torch.stack([(left[k] - right[k]).abs().max() for k in left]).max())


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_equals_one_process_on_the_concatenated_batch(results: Results, case: tuple[int, str, str, int]) -> None:
    result = of(results, case)
    weights, norms = job.reference(case[0], losses=False)
    assert worst(result["plain"], weights) <= 1e-6
    assert result["plain_norms"] == pytest.approx(norms, rel=1e-5)
    assert min(norms) > job.PHASE.clip_grad  # clipping was at work in every step
    assert worst(weights, job.reference(case[0], losses=False, steps=0)[0]) > 1e-2  # and the weights moved


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_equals_one_process_with_router_losses(results: Results, case: tuple[int, str, str, int]) -> None:
    result = of(results, case)
    weights, norms = job.reference(case[0], losses=True)
    assert worst(result["end"], weights) <= 1e-6
    assert result["norms"] == pytest.approx(norms, rel=1e-5)
    assert worst(weights, job.reference(case[0], losses=False)[0]) > 1e-4  # the router losses do something


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == "bf16"], ids=str)
def test_bf16_stays_near_the_fp32_run(results: Results, case: tuple[int, str, str, int]) -> None:
    weights, norms = job.reference(case[0], losses=True)
    # AdamW would hide a wrong scale of the gradients, their norms do not: measured deviations are up to 0.2 %.
    assert of(results, case)["norms"] == pytest.approx(norms, rel=0.02)
    # bf16 keeps 8 bits; Adam turns a gradient's rounded sign into a step of size lr, so the bound is the summed learning rates.
    difference = worst(of(results, case)["end"], weights)
    assert 1e-6 < difference <= sum(job.RATES)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_rank_starts_from_the_weights_of_rank_0(results: Results, case: tuple[int, str, str, int]) -> None:
    assert worst(of(results, case)["start"], job.make_net(0, losses=True).state_dict()) == 0.0


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_resume_is_bitwise_the_uninterrupted_run(results: Results, case: tuple[int, str, str, int]) -> None:
    result = of(results, case)
    assert worst(result["loaded"], result["middle"]) == 0.0
    assert worst(result["resumed"], result["end"]) == 0.0
    assert worst(result["resumed_ema"], result["ema"]) == 0.0
    assert result["again"] == result["norms"][2:]
    assert worst(result["ema"], result["end"]) > 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case[1] != "zero3"], ids=str)
def test_another_ep_size_reads_the_same_weights_and_average(results: Results, case: tuple[int, str, str, int]) -> None:
    result = of(results, case)
    assert worst(result["moved"], result["middle"]) == 0.0
    assert worst(result["moved_ema"], result["middle_ema"]) == 0.0


@pytest.mark.parametrize(("saved", "wanted"), [("zero1", "zero3"), ("zero3", "zero2")])
def test_another_zero_stage_goes_on_from_a_checkpoint(results: Results, saved: str, wanted: str) -> None:
    moved, stayed = results[2][f"{saved}_to_{wanted}"], of(results, (2, saved, "fp32", 1))
    assert worst(moved["loaded"], stayed["middle"]) == 0.0
    assert worst(moved["end"], stayed["end"]) <= 1e-6
    assert worst(moved["ema"], stayed["middle"]) > 1e-4  # the average came along, and is not the weights


def test_every_router_and_backend_computes_the_same_with_spread_experts(results: Results) -> None:
    found = results[2]["spread_and_whole"]
    assert len(found) == (len(job.BACKENDS) + 1) * len(job.ROUTERS) and len(job.ROUTERS) >= 6
    assert not {name: differences for name, differences in found.items() if not all(d <= 1e-6 for d in differences)}


def test_a_closed_engine_gives_its_memory_back(results: Results) -> None:
    assert results[2]["left_alive"] == {"zero1": 0, "zero3": 0}


@pytest.mark.parametrize(("ranks", "ep_size"), [(2, 2), (4, 2), (4, 4)])
def test_uneven_tokens_and_an_idle_expert_give_the_gradients_of_one_process(results: Results, ranks: int, ep_size: int) -> None:
    result, want = results[ranks][f"uneven_{ep_size}"], job.uneven_reference(ranks)
    assert [y.shape[0] for y, _, _ in result["ranks"]] == list(job.TOKENS[ranks])
    for got, expected in zip(result["ranks"], want["ranks"], strict=True):
        for left, right in zip(got, expected, strict=True):
            wanted = torch.zeros_like(left, dtype=torch.double) if right is None else right  # None: a rank without tokens
            torch.testing.assert_close(left.double(), wanted, atol=2e-6, rtol=2e-5)
    for name, grad in want["grads"].items():
        torch.testing.assert_close(result["grads"][name].double(), grad, atol=2e-6, rtol=2e-5, msg=name)


def test_shares_are_contiguous_and_cover_all_experts() -> None:
    shares = [list(ExpertGroups(size=4, rank=r, data_size=1, data_rank=0).share(8)) for r in range(4)]
    assert shares == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize(
    ("ep_size", "num_experts", "world_size", "zero", "message"),
    [
        (2, None, 4, {"stage": 1}, "m2mkd.ep_size is 2, but the model of this phase has no experts; set it to 1"),
        (3, 8, 3, {"stage": 1}, r"m2mkd.ep_size is 3 and student.moe.num_experts is 8; allowed are the divisors 1, 2, 4, 8"),
        (4, 8, 6, {"stage": 2}, "m2mkd.ep_size is 4 and the job has 6 ranks; allowed are the divisors 1, 2, 3, 6"),
        (2, 8, 2, {"stage": 3}, r"its ds_config has zero_optimization.stage 3: .* use ds_config=zero2, or ep_size=1"),
        (2, 8, 2, {"stage": 2, "overlap_comm": True}, "zero_optimization.overlap_comm true: .* set overlap_comm to false"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    ep_size: int, num_experts: int | None, world_size: int, zero: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_expert_parallel("m2mkd", ep_size, num_experts=num_experts, world_size=world_size, zero=zero)
    check_expert_parallel("m2mkd", 1, num_experts=num_experts, world_size=world_size, zero=zero)
