"""V-MoE's noisy router against numbers by hand and a slow loop that gets the same noise."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from m2mkd_ds.config import ROUTER_PRESETS
from m2mkd_ds.moe.losses import load_loss
from m2mkd_ds.moe.routers import make_router
from tests.moe.router_oracle import identity_router, slow_top_k, softmax

SETTINGS = {"kind": "noisy_topk", "softmax": "before"}


def phi(x: float) -> float:
    """The normal distribution function, by the error function."""
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def test_load_loss_by_hand() -> None:
    # One token, two experts, K = 1, std .5. Logits 0 and .5, with noise .2 and .4: expert 1 wins, threshold .4.
    # p0 = 1 - Phi((.4 - 0) / .5) = 1 - Phi(.8) = .211855; p1 = 1 - Phi((.4 - .5) / .5) = Phi(.2) = .579260.
    # Mean .395557, population std = half the difference = .183702; (std / mean)^2 = .215680.
    logits_TE, noisy_TE = torch.tensor([[0.0, 0.5]]), torch.tensor([[0.2, 0.4]])
    assert load_loss(logits_TE, noisy_TE, torch.tensor([[1]]), 0.5).item() == pytest.approx(0.215680, rel=1e-4)
    # K = 2: the threshold is the smaller noisy logit, .2. p0 = 1 - Phi(.4) = .344578, p1 = 1 - Phi(-.6) = .725747.
    # Mean .535163, half the difference .190584; squared ratio .126825.
    assert load_loss(logits_TE, noisy_TE, torch.tensor([[1, 0]]), 0.5).item() == pytest.approx(0.126825, rel=1e-4)


def test_load_loss_is_zero_when_all_experts_are_alike_and_for_no_token() -> None:
    noisy_TE = torch.zeros(3, 4)
    assert load_loss(torch.zeros(3, 4), noisy_TE, torch.zeros(3, 2, dtype=torch.int64), 0.25).item() == pytest.approx(0.0, abs=1e-12)
    assert load_loss(torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 2, dtype=torch.int64), 0.25).item() == 0.0


@pytest.mark.parametrize(("tokens", "experts", "k", "noise"), [(40, 4, 2, 1.0), (25, 8, 1, 3.0), (30, 5, 3, 0.5)])
@pytest.mark.parametrize("priority", ["order", "batch"])
def test_training_equals_the_slow_definition(tokens: int, experts: int, k: int, noise: float, priority: str) -> None:
    router = identity_router(
        experts, top_k=k, noise=noise, importance_weight=0.5, load_weight=0.25, capacity_factor=0.9, capacity_multiple=2,
        capacity_priority=priority, bias=False, **SETTINGS,
    )  # fmt: skip
    clean_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(k))
    torch.manual_seed(11)
    routing = router(clean_TE)
    torch.manual_seed(11)
    std = noise / experts
    noisy = (clean_TE + std * torch.randn(tokens, experts)).tolist()
    capacity = math.ceil(tokens * k * 0.9 / experts)
    ids, weights = slow_top_k(noisy, k, capacity + capacity % 2, batch=priority == "batch")
    assert routing.expert_ids_TK.tolist() == ids
    torch.testing.assert_close(routing.weights_TK, torch.tensor(weights))  # raw softmax values: they do not sum to 1
    clean = clean_TE.tolist()
    sums = [sum(softmax(row)[e] for row in clean) for e in range(experts)]
    importance = (statistics.pstdev(sums) / statistics.mean(sums)) ** 2
    thresholds = [sorted(row, reverse=True)[k - 1] for row in noisy]
    chances = [statistics.mean(1 - phi((thresholds[t] - clean[t][e]) / std) for t in range(tokens)) for e in range(experts)]
    load = (statistics.pstdev(chances) / statistics.mean(chances)) ** 2
    assert set(routing.losses) == {"importance", "load"}
    assert routing.losses["importance"].item() == pytest.approx(0.5 * importance, rel=1e-4)
    assert routing.losses["load"].item() == pytest.approx(0.25 * load, rel=1e-4)


def test_evaluation_has_no_noise_and_no_load_loss_and_draws_nothing() -> None:
    router = identity_router(4, importance_weight=1.0, load_weight=1.0, noise=5.0, **SETTINGS)
    x_TE = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    first, second = router(x_TE), router(x_TE)
    assert not torch.equal(first.expert_ids_TK, second.expert_ids_TK)  # training draws new noise
    router.eval()
    state = torch.get_rng_state()
    a, b = router(x_TE), router(x_TE)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK) and torch.equal(a.weights_TK, b.weights_TK)
    assert a.expert_ids_TK.tolist() == slow_top_k(x_TE.tolist(), 2, 30, batch=False)[0]
    assert set(a.losses) == {"importance"}


def test_the_importance_loss_does_not_see_the_noise() -> None:
    router = identity_router(4, importance_weight=1.0, noise=5.0, **SETTINGS)
    x_TE = torch.randn(30, 4)
    assert router(x_TE).losses["importance"].item() == router.eval()(x_TE).losses["importance"].item()


def test_the_preset_has_no_bias_and_the_published_numbers() -> None:
    router = make_router(16, 8, ROUTER_PRESETS["vmoe"])
    assert list(router.state_dict()) == ["weight"]
    # 100 tokens: C = ceil(100 * 2 * 1.05 / 8) = 27, rounded up to 28.
    assert router(torch.randn(100, 16)).max_rows == min(200, 8 * 28)
    assert router.eval()(torch.randn(100, 16)).max_rows is None  # factor 4: room for all
