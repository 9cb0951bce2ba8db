"""Loss-free balancing: the bias moves the choice and nothing else, survives casts, and its update is simple arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routers import make_router
from m2mkd_ds.moe.routers.balance import balanced_bias
from tests.moe.router_oracle import identity_router

LOGITS_TE = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[None]  # softmax .1 .2 .3 .4


def biased(bias: list[float], **config: object) -> torch.nn.Module:
    router = identity_router(4, balance_rate=0.001, **config)
    router.balance_bias.copy_(torch.tensor(bias))  # type: ignore[union-attr]
    return router


@pytest.mark.parametrize(("softmax", "weights"), [("before", [0.1, 0.4]), ("after", [0.2, 0.8])])
def test_the_bias_moves_the_choice_and_not_the_weights(softmax: str, weights: list[float]) -> None:
    # Scores .1 + .35 = .45, .2, .3, .4: experts 0 and 3. Their own softmax values are .1 and .4 (of the two alone .2 and .8).
    routing = biased([0.35, 0.0, 0.0, 0.0], softmax=softmax)(LOGITS_TE)
    assert routing.expert_ids_TK.tolist() == [[0, 3]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([weights]))
    plain = identity_router(4, softmax=softmax)(LOGITS_TE)
    assert plain.expert_ids_TK.tolist() == biased([0.0] * 4, softmax=softmax)(LOGITS_TE).expert_ids_TK.tolist() == [[3, 2]]


def test_update_by_hand() -> None:
    # Loads 5, 2, 1, 0: mean 2. More than that: down; the mean itself: stays; less: up.
    bias_E = balanced_bias(torch.tensor([0.0, 0.5, -0.1, 0.0]), torch.tensor([5, 2, 1, 0]), 0.1)
    torch.testing.assert_close(bias_E, torch.tensor([-0.1, 0.5, 0.0, 0.1]))
    # Counts beyond what fp32 tells apart, 2^24 + 1 against 2^24: still exact.
    near = torch.tensor([2**24 + 1, 2**24 - 1, 2**24])
    assert balanced_bias(torch.zeros(3), near, 1.0).tolist() == [-1.0, 1.0, 0.0]


def test_repeated_updates_balance_a_router() -> None:
    router = identity_router(4, top_k=1, softmax="before", balance_rate=0.01)
    x_TE = torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.5, 0.5, 0.0, -1.0])
    first = router(x_TE).stats.load_E
    for _ in range(150):
        router.balance_bias.copy_(balanced_bias(router.balance_bias, router(x_TE).stats.load_E, 0.01))  # type: ignore[arg-type, union-attr]
    last = router(x_TE).stats.load_E
    assert int(first.max()) > 220 and int(last.max()) < 115 and int(last.min()) > 85  # the even share is 100


def test_the_buffer_exists_with_a_rate_only_and_stays_fp32() -> None:
    assert "balance_bias" not in make_router(6, 4, RouterConfig()).state_dict()
    layer = MoELayer(8, 4, 4, RouterConfig(balance_rate=0.001))
    assert "router.balance_bias" in layer.state_dict() and not layer.router.balance_bias.any()
    exact_E = torch.tensor([1 / 3, 0.001, -0.001, 1.0])
    layer.router.balance_bias.copy_(exact_E)
    for cast in (layer.bfloat16, layer.half, layer.double, lambda: layer.to(torch.bfloat16), lambda: layer.to("cpu", torch.float16)):
        cast()
        assert layer.router.balance_bias.dtype == torch.float32 and torch.equal(layer.router.balance_bias, exact_E)
        assert layer.router.weight.dtype != torch.float32
        assert "balance_bias" in dict(layer.router.named_buffers())
    assert layer.to_empty(device="meta").router.balance_bias.is_meta


def test_forward_counts_by_return_alone_with_and_without_activation_checkpointing() -> None:
    config = RouterConfig(kind="noisy_topk", softmax="before", balance_rate=0.001, switch_weight=0.0)
    layer = MoELayer(8, 4, 4, config, "reference", generator=torch.Generator().manual_seed(0))
    x_BLD = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    results = []
    for run in (lambda x: layer(x), lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(3)
        y_BLD, routing = run(x_BLD)
        y_BLD.square().sum().backward()  # the second run does the forward pass again here, with the same noise
        results.append((routing.stats.load_E, layer.router.weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0]) and int(results[0][0].sum()) == 2 * 9 * 2
    assert torch.equal(results[0][1], results[1][1]) and bool(results[0][1].any())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_load_is_the_demand_before_drops() -> None:
    routing = biased([0.0] * 4, top_k=1, softmax="before", capacity_factor=1.0)(LOGITS_TE.expand(8, 4))
    assert routing.stats.load_E.tolist() == [0, 0, 0, 8]  # two of them have room
    assert float(routing.stats.drop_rate) == 0.75 and math.isclose(float(routing.stats.uncovered), 0.75)
