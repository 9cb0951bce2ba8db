"""Router and auxiliary losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.losses import importance_loss, switch_loss, z_loss
from m2mkd_ds.moe.routers.topk import TopKRouter
from m2mkd_ds.moe.routing import top_k_ids
from tests.moe.router_oracle import identity_router

# exp(logits) = 1, 2, 3, 4, sum 10: softmax = .1, .2, .3, .4
LOGITS_TE = torch.tensor([1.0, 2.0, 3.0, 4.0]).log()[None]


@pytest.mark.parametrize(
    ("softmax", "renormalize", "weights"),
    [
        ("before", False, [0.4, 0.3]),  # V-MoE: raw softmax values of the two best
        ("before", True, [4 / 7, 3 / 7]),  # divided by .4 + .3
        ("after", False, [4 / 7, 3 / 7]),  # softmax over the logits ln 4 and ln 3 alone
    ],
)
def test_weights_of_the_three_settings(softmax: str, renormalize: bool, weights: list[float]) -> None:
    routing = identity_router(4, softmax=softmax, renormalize=renormalize)(LOGITS_TE)
    assert routing.expert_ids_TK.tolist() == [[3, 2]]
    assert routing.weights_TK.dtype == torch.float32
    torch.testing.assert_close(routing.weights_TK, torch.tensor([weights]))


def test_bias_moves_choice_and_weight() -> None:
    router = identity_router(4, softmax="before")
    with torch.no_grad():
        router.bias.copy_(torch.tensor([8.0, 1.0, 1.0, 1.0]).log())  # type: ignore[union-attr]
    routing = router(LOGITS_TE)  # exp(logits) = 8, 2, 3, 4, sum 17
    assert routing.expert_ids_TK.tolist() == [[0, 3]]
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[8 / 17, 4 / 17]]))
    assert TopKRouter(4, 4, RouterConfig(bias=False)).bias is None


@pytest.mark.parametrize("k", [1, 2, 4])
def test_stats_of_two_tokens(k: int) -> None:
    x_TE = torch.cat([LOGITS_TE, LOGITS_TE.flip(1)])
    stats = identity_router(4, top_k=k, softmax="before")(x_TE).stats
    # Token 0 ranks the experts 3, 2, 1, 0 and token 1 ranks them 0, 1, 2, 3, with softmax values .4, .3, .2, .1.
    load = {1: [1, 0, 0, 1], 2: [1, 1, 1, 1], 4: [2, 2, 2, 2]}[k]
    importance = {1: [0.4, 0, 0, 0.4], 2: [0.4, 0.3, 0.3, 0.4], 4: [0.5, 0.5, 0.5, 0.5]}[k]
    assert stats.load_E.tolist() == load
    torch.testing.assert_close(stats.importance_E, torch.tensor(importance))
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert float(stats.entropy) == pytest.approx(entropy, rel=1e-6)
    assert float(stats.max_logit) == pytest.approx(math.log(4))


def test_importance_loss_is_cv_squared() -> None:
    # Sums per expert 1.4 and 0.6: mean 1, population variance (0.4^2 + 0.4^2) / 2 = 0.16.
    assert float(importance_loss(torch.tensor([[0.9, 0.1], [0.5, 0.5]]))) == pytest.approx(0.16)
    assert float(importance_loss(torch.eye(4)[:1].expand(6, 4))) == pytest.approx(3.0)  # collapsed: E - 1


def test_switch_loss_by_hand() -> None:
    # Shares 3/4 and 1/4 of the rows, mean probabilities 0.7 and 0.3: 2 * (0.75 * 0.7 + 0.25 * 0.3) = 1.2.
    probs_TE = torch.tensor([[0.9, 0.1], [0.5, 0.5]], requires_grad=True)
    loss = switch_loss(probs_TE, torch.tensor([3, 1]))
    assert loss.item() == pytest.approx(1.2)
    loss.backward()
    # d/dp[t, e] = E * f_e / T = f_e here.
    torch.testing.assert_close(probs_TE.grad, torch.tensor([[0.75, 0.25], [0.75, 0.25]]))


def test_z_loss_by_hand() -> None:
    logits_TE = torch.cat([LOGITS_TE, torch.zeros(1, 4)])  # logsumexp: ln 10 and ln 4
    assert float(z_loss(logits_TE)) == pytest.approx((math.log(10) ** 2 + math.log(4) ** 2) / 2)


def test_losses_carry_their_weight_and_zero_ones_are_absent() -> None:
    assert identity_router(4)(LOGITS_TE).losses == {}
    losses = identity_router(4, importance_weight=0.5, switch_weight=0.1, z_weight=2.0)(LOGITS_TE).losses
    assert set(losses) == {"importance", "switch", "z"}
    # One token, softmax .1 .2 .3 .4: mean .25, variance (.15^2 + .05^2) / 2 = .0125, CV^2 = .2.
    assert losses["importance"].item() == pytest.approx(0.5 * 0.2)
    # Experts 3 and 2 got half of the rows each: 4 * (.5 * .4 + .5 * .3) = 1.4.
    assert losses["switch"].item() == pytest.approx(0.1 * 1.4)
    assert losses["z"].item() == pytest.approx(2.0 * math.log(10) ** 2)


def test_no_token_gives_empty_routing_and_finite_zero_losses() -> None:
    routing = identity_router(4, importance_weight=1.0, switch_weight=1.0, z_weight=1.0)(torch.empty(0, 4))
    assert routing.expert_ids_TK.shape == routing.weights_TK.shape == (0, 2)
    assert [v.item() for v in routing.losses.values()] == [0.0, 0.0, 0.0]
    assert routing.stats.load_E.tolist() == [0, 0, 0, 0]
    assert float(routing.stats.entropy) == float(routing.stats.max_logit) == 0.0


def test_equal_logits_choose_the_lower_expert() -> None:
    assert top_k_ids(torch.zeros(3, 8), 3).tolist() == [[0, 1, 2]] * 3
    assert top_k_ids(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), 3).tolist() == [[1, 2, 3]]


def test_logits_stay_fp32_in_bf16_and_under_autocast() -> None:
    router = identity_router(4)
    x_TE = LOGITS_TE + 1e-4  # a difference that bf16 does not hold
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(router.logits(x_TE), router.logits(x_TE).float())
        torch.testing.assert_close(router.logits(x_TE), x_TE, rtol=0, atol=1e-6)
    assert router.to(torch.bfloat16).logits(x_TE.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("softmax", ["before", "after"])
def test_gradients_pass_through_the_weights_and_all_losses(softmax: str) -> None:
    config = RouterConfig(top_k=2, softmax=softmax, importance_weight=0.3, switch_weight=0.2, z_weight=0.1)  # type: ignore[arg-type]
    router = TopKRouter(6, 4, config).double()
    x_TD = torch.randn(5, 6, dtype=torch.double, generator=torch.Generator().manual_seed(3), requires_grad=True)

    def outputs(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        routing = torch.func.functional_call(router, {"weight": weight, "bias": bias}, (x,))
        return (routing.weights_TK, *routing.losses.values())

    assert torch.autograd.gradcheck(outputs, (x_TD, router.weight, router.bias))


def test_wrong_settings_are_named() -> None:
    with pytest.raises(ValueError, match=r"router.top_k is 5; allowed is 1 to num_experts = 4"):
        TopKRouter(8, 4, RouterConfig(top_k=5))
    with pytest.raises(ValueError, match="router.softmax is 'never'; allowed is `before` or `after`"):
        TopKRouter(8, 4, RouterConfig(softmax="never"))  # type: ignore[arg-type]


def test_a_router_that_cannot_learn_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    TopKRouter(8, 4, RouterConfig(top_k=1, softmax="before", switch_weight=0.0))
    assert not caplog.records
    TopKRouter(8, 4, RouterConfig(top_k=1, softmax="after", switch_weight=0.0))
    assert "router gets no gradient" in caplog.text
