"""Expert choice by hand and against a slow loop over experts."""

from __future__ import annotations

import pytest
import torch

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.layer import MoELayer
from tests.moe.router_oracle import identity_router, slow_expert_choice

SETTINGS = {"kind": "expert_choice", "softmax": "before"}


def test_each_expert_takes_its_best_tokens_by_hand() -> None:
    # softmax rows; capacity ceil(3 * 1 / 2) = 2. Expert 0 takes tokens 0 (.9) and 1 (.8); expert 1 takes 2 (.7) and 1 (.2).
    probs_TE = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    routing = identity_router(2, capacity_factor=1.0, **SETTINGS)(probs_TE.log())
    assert routing.expert_ids_TK.tolist() == [[0, 2], [0, 1], [2, 1]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.9, 0.0], [0.8, 0.2], [0.0, 0.7]]))
    assert routing.max_rows == 4 and routing.losses == {}
    assert routing.stats.load_E.tolist() == [2, 2]
    torch.testing.assert_close(routing.stats.importance_E, torch.tensor([1.7, 0.9]))
    assert routing.stats.uncovered.item() == routing.stats.drop_rate.item() == 0.0


def test_tokens_that_nobody_takes_are_counted() -> None:
    # One token an expert: ceil(4 * .5 / 2) = 1. Both experts want token 0 most (.6 and .4 of their columns' best).
    probs_TE = torch.tensor([[0.5, 0.5], [0.6, 0.4], [0.6, 0.4], [0.55, 0.45]])
    routing = identity_router(2, capacity_factor=0.5, **SETTINGS)(probs_TE.log())
    assert routing.expert_ids_TK.tolist() == [[2, 1], [0, 2], [2, 2], [2, 2]]  # of equal tokens the first
    assert routing.stats.uncovered.item() == 0.5 and routing.stats.drop_rate.item() == 0.0


@pytest.mark.parametrize(("tokens", "experts", "factor"), [(30, 4, 2.0), (17, 5, 0.7), (6, 3, 9.0), (1, 4, 1.0)])
def test_router_equals_the_slow_loop(tokens: int, experts: int, factor: float) -> None:
    logits_TE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(tokens))
    router = identity_router(experts, top_k=99, capacity_factor=factor, **SETTINGS)  # top_k is not used
    capacity = min(tokens, -int(-tokens * factor // experts))
    want = torch.tensor(slow_expert_choice(logits_TE.tolist(), capacity))
    for mode in (True, False):  # evaluation takes the training factor when it has none of its own
        routing = router.train(mode)(logits_TE)
        torch.testing.assert_close(routing.weights_TK, want)
        assert torch.equal(routing.expert_ids_TK < experts, want > 0)
        assert routing.max_rows == experts * capacity == int(routing.stats.load_E.sum())


def test_evaluation_may_have_a_factor_of_its_own() -> None:
    router = identity_router(4, capacity_factor=1.0, eval_capacity_factor=2.0, **SETTINGS)
    x_TE = torch.randn(20, 4)
    assert router(x_TE).max_rows == 20 and router.eval()(x_TE).max_rows == 40


def test_layer_adds_up_what_the_experts_took() -> None:
    config = RouterConfig(kind="expert_choice", softmax="before", switch_weight=0.0, capacity_factor=1.5)
    layer = MoELayer(8, 6, 3, config, "reference", generator=torch.Generator().manual_seed(0)).double()
    x_BLD = torch.randn(2, 5, 8, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    logits_TE = layer.router.logits(x_BLD.reshape(10, 8))
    weights_TE = torch.tensor(slow_expert_choice(logits_TE.tolist(), 5), dtype=torch.double)  # ceil(10 * 1.5 / 3)
    e = layer.experts
    want_TD = torch.zeros(10, 8, dtype=torch.double)
    for i in range(3):
        hidden = torch.nn.functional.gelu(x_BLD.reshape(10, 8) @ e.up_proj[i].t() + e.up_proj_bias[i])
        want_TD += weights_TE[:, i, None] * (hidden @ e.down_proj[i].t() + e.down_proj_bias[i])
    torch.testing.assert_close(layer(x_BLD)[0].reshape(10, 8), want_TD)
