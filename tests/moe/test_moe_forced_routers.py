"""The benchmark routers: their loads by arithmetic, and that they stay trainable."""

from __future__ import annotations

import pytest
import torch

from tests.moe.router_oracle import identity_router


@pytest.mark.parametrize(("tokens", "experts", "k"), [(12, 4, 2), (10, 4, 3), (7, 5, 5), (5, 8, 1)])
def test_balanced_loads_differ_by_one_at_most(tokens: int, experts: int, k: int) -> None:
    routing = identity_router(experts, kind="balanced", top_k=k)(torch.randn(tokens, experts))
    assert routing.expert_ids_TK.tolist() == [[(t * k + j) % experts for j in range(k)] for t in range(tokens)]
    load = routing.stats.load_E.tolist()
    assert sum(load) == tokens * k and max(load) - min(load) <= 1


def test_weights_are_a_softmax_over_the_chosen_logits() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]]).log()
    routing = identity_router(4, kind="balanced")(logits_TE)
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[1 / 3, 2 / 3], [3 / 7, 4 / 7]]))  # experts 0, 1 and 2, 3


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_zipf_draws_experts_by_their_rank(exponent: float) -> None:
    load_E = identity_router(6, kind="zipf", top_k=1, zipf_exponent=exponent)(torch.zeros(20_000, 6)).stats.load_E
    weights = [1 / (e + 1) ** exponent for e in range(6)]
    want = torch.tensor([20_000 * w / sum(weights) for w in weights])
    # 20 000 draws: a standard deviation is at most 71, five of them 354.
    assert float((load_E - want).abs().max()) < 354


def test_zipf_draws_different_experts_without_replacement() -> None:
    ids_TK = identity_router(5, kind="zipf", top_k=3, zipf_exponent=1.5)(torch.zeros(4000, 5)).expert_ids_TK
    assert all(len(set(row)) == 3 for row in ids_TK.tolist())
    # P(second = 1 | first = 0) = p1 / (1 - p0), p ~ 1, .3536, .1925, .125, .0894 -> .3536 / .7605 = .465.
    second = ids_TK[ids_TK[:, 0] == 0, 1]
    assert float((second == 1).double().mean()) == pytest.approx(0.465, abs=0.05)


def test_zipf_is_a_function_of_the_number_of_tokens_alone() -> None:
    router = identity_router(5, kind="zipf")
    torch.manual_seed(1)
    first = router(torch.randn(50, 5)).expert_ids_TK
    torch.manual_seed(2)
    assert torch.equal(router.eval()(torch.randn(50, 5)).expert_ids_TK, first)
    assert torch.equal(router(torch.randn(80, 5)).expert_ids_TK[:50], first)
