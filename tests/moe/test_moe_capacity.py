"""Capacity: who is dropped, by hand and against a slow loop over claims."""

from __future__ import annotations

import math

import pytest
import torch

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routers.capacity import apply_capacity, expert_capacity
from tests.moe.router_oracle import identity_router, slow_top_k


@pytest.mark.parametrize(
    ("choices", "experts", "factor", "multiple", "capacity"),
    [
        (12, 4, 1.0, 1, 3),
        (12, 4, 1.05, 1, 4),  # 3.15 rounded up
        (12, 4, 1.05, 4, 4),
        (20, 4, 1.05, 4, 8),  # 5.25 -> 6 -> 8
        (2 * 197 * 8, 8, 1.05, 4, 416),  # 413.7 -> 414 -> 416
        (0, 4, 1.25, 4, 0),
        (2760, 4, 1.1, 1, 759),  # exactly 759; in floating point a little more
    ],
)
def test_capacity_is_the_share_times_the_factor_rounded_up(choices: int, experts: int, factor: float, multiple: int, capacity: int) -> None:
    assert expert_capacity(choices, experts, factor, multiple) == capacity


def test_order_serves_the_first_tokens_and_batch_the_surest() -> None:
    ids_TK, weights_TK = torch.zeros(4, 1, dtype=torch.int64), torch.tensor([[0.6], [0.9], [0.7], [0.8]])
    # All four want expert 0, which has two places. In order: tokens 0 and 1. By weight: tokens 1 (.9) and 3 (.8).
    ids, weights = apply_capacity(ids_TK, weights_TK, 2, 2, "order")
    assert ids.flatten().tolist() == [0, 0, 2, 2]
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.6, 0.9, 0.0, 0.0]))
    ids, weights = apply_capacity(ids_TK, weights_TK, 2, 2, "batch")
    assert ids.flatten().tolist() == [2, 0, 2, 0]
    torch.testing.assert_close(weights.flatten(), torch.tensor([0.0, 0.9, 0.0, 0.8]))


@pytest.mark.parametrize("priority", ["order", "batch"])
def test_all_first_choices_come_before_any_second_one(priority: str) -> None:
    # One place an expert. Token 0 wants 0 then 1, token 1 wants 1 then 0: both get their first choice, nobody the second.
    ids, _ = apply_capacity(torch.tensor([[0, 1], [1, 0]]), torch.tensor([[0.6, 0.4], [0.7, 0.3]]), 3, 1, priority)
    assert ids.tolist() == [[0, 3], [1, 3]]


def test_equal_weights_are_served_in_order() -> None:
    ids, _ = apply_capacity(torch.zeros(5, 1, dtype=torch.int64), torch.full((5, 1), 0.5), 2, 3, "batch")
    assert ids.flatten().tolist() == [0, 0, 0, 2, 2]


SHAPES = [(33, 4, 2, 0.5), (20, 5, 3, 1.0), (64, 8, 1, 1.25), (7, 3, 3, 0.4), (1, 2, 1, 1.0)]


@pytest.mark.parametrize("priority", ["order", "batch"])
@pytest.mark.parametrize(("tokens", "experts", "k", "factor"), SHAPES)
def test_router_equals_the_slow_loop(priority: str, tokens: int, experts: int, k: int, factor: float) -> None:
    g = torch.Generator().manual_seed(tokens)
    logits_TE = torch.randn(tokens, experts, generator=g) + torch.linspace(1, 0, experts)  # the first experts overflow
    router = identity_router(
        experts, top_k=k, softmax="before", capacity_factor=factor, eval_capacity_factor=1.5 * factor, capacity_priority=priority
    )
    wanted, _ = slow_top_k(logits_TE.tolist(), k, tokens, batch=False)
    for training, scale in ((True, factor), (False, 1.5 * factor)):
        capacity = math.ceil(tokens * k * scale / experts)
        routing = router.train(training)(logits_TE)
        ids, weights = slow_top_k(logits_TE.tolist(), k, capacity, batch=priority == "batch")
        assert routing.expert_ids_TK.tolist() == ids
        torch.testing.assert_close(routing.weights_TK, torch.tensor(weights))
        dropped = sum(row.count(experts) for row in ids)
        assert routing.stats.drop_rate.item() == pytest.approx(dropped / (tokens * k))
        assert routing.stats.uncovered.item() == pytest.approx(sum(row == [experts] * k for row in ids) / tokens)
        # Demand: what was chosen, whether there was room or not.
        assert routing.stats.load_E.tolist() == [sum(row.count(e) for row in wanted) for e in range(experts)]
        assert routing.max_rows == (min(tokens * k, experts * capacity) if capacity < tokens else None)


def test_room_for_everybody_needs_no_bound_on_rows() -> None:
    # vmoe in evaluation: C = T * 2 * 4 / 8 = T, and a token chooses an expert once.
    routing = identity_router(8, eval_capacity_factor=4.0).eval()(torch.randn(24, 8))
    assert routing.max_rows is None and int(routing.expert_ids_TK.max()) < 8


@pytest.mark.parametrize("priority", ["order", "batch"])
def test_a_dropped_token_gets_nothing_from_the_layer(priority: str) -> None:
    config = RouterConfig(top_k=1, softmax="before", capacity_factor=0.5, capacity_priority=priority)  # type: ignore[arg-type]
    layer = MoELayer(8, 6, 4, config, "reference", generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.experts.down_proj_bias.fill_(1.0)  # an expert's answer is not zero by chance
    x_BLD = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(1))
    y_BLD, routing = layer(x_BLD)
    kept_T = routing.expert_ids_TK[:, 0] < 4
    assert 0 < int(kept_T.sum()) <= 12 == routing.max_rows  # C = ceil(24 * .5 / 4) = 3, of 4 experts
    y_TD = y_BLD.reshape(24, 8)
    assert not y_TD[~kept_T].any() and bool(y_TD[kept_T].any(dim=1).all())
    dropless = MoELayer(8, 6, 4, RouterConfig(top_k=1, softmax="before"), "reference")
    dropless.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y_TD[kept_T], dropless(x_BLD)[0].reshape(24, 8)[kept_T])


def test_losses_see_the_demand_and_not_the_drops() -> None:
    logits_TE = torch.tensor([[2.0, 0.0]] * 8)  # everybody wants expert 0
    free = identity_router(2, top_k=1, switch_weight=1.0)(logits_TE)
    bound = identity_router(2, top_k=1, switch_weight=1.0, capacity_factor=1.0)(logits_TE)
    assert bound.stats.drop_rate.item() == 0.5 and bound.losses == free.losses
    assert bound.stats.load_E.tolist() == [8, 0]
