"""The whole layer against a per-token loop and against a dense network, and the metrics made of its statistics."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routing import RoutingStats
from m2mkd_ds.moe.telemetry import merge_stats, summarise


def make_layer(num_experts: int, k: int, backend: str, **router: object) -> MoELayer:
    g = torch.Generator().manual_seed(5)
    layer = MoELayer(16, 24, num_experts, RouterConfig(top_k=k, **router), backend, generator=g)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in layer.parameters():  # large enough that experts and biases matter
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return layer


def token_by_token(layer: MoELayer, x_TD: Tensor, k: int) -> Tensor:
    """The definition: softmax over the k best logits, weighted sum of those experts' networks."""
    out = []
    for x_D in x_TD:
        logits = layer.router.weight @ x_D + layer.router.bias
        best = logits.topk(k)
        e = layer.experts
        ys = [e.down_proj[i] @ F.gelu(e.up_proj[i] @ x_D + e.up_proj_bias[i]) + e.down_proj_bias[i] for i in best.indices.tolist()]
        out.append(sum(w * y for w, y in zip(best.values.softmax(0), ys, strict=True)))
    return torch.stack(out)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [("reference", torch.double, 1e-12), ("grouped", torch.float, 3e-6)])
def test_layer_equals_the_token_by_token_definition(k: int, backend: str, dtype: torch.dtype, tolerance: float) -> None:
    layer = make_layer(5, k, backend).to(dtype)
    x_BLD = torch.randn(2, 7, 16, dtype=dtype, generator=torch.Generator().manual_seed(1), requires_grad=True)
    oracle = make_layer(5, k, backend).double()
    x64 = x_BLD.detach().double().requires_grad_()
    grad = torch.randn(2, 7, 16, dtype=dtype)
    y_BLD, routing = layer(x_BLD)
    want = token_by_token(oracle, x64.reshape(14, 16), k).view(2, 7, 16)
    torch.testing.assert_close(y_BLD.double(), want, rtol=tolerance, atol=tolerance)
    y_BLD.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(x_BLD.grad.double(), x64.grad, rtol=10 * tolerance, atol=10 * tolerance)  # type: ignore[union-attr]
    for (name, p), q in zip(layer.named_parameters(), oracle.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=10 * tolerance, atol=10 * tolerance, msg=name)
    assert int(routing.stats.load_E.sum()) == 14 * k


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_one_expert_is_a_dense_network(backend: str) -> None:
    layer = make_layer(1, 1, backend)
    e = layer.experts
    x_BLD = torch.randn(3, 5, 16)
    dense = F.linear(F.gelu(F.linear(x_BLD, e.up_proj[0], e.up_proj_bias[0])), e.down_proj[0], e.down_proj_bias[0])
    torch.testing.assert_close(layer(x_BLD)[0], dense, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "grouped"])
def test_two_runs_give_the_same_bits_and_eval_equals_train(backend: str) -> None:
    layer = make_layer(5, 2, backend)
    x_BLD = torch.randn(4, 9, 16)
    grads = []
    for training in (True, False):
        layer.train(training).zero_grad()
        y_BLD, routing = layer(x_BLD)
        (y_BLD.square().sum() + sum(routing.losses.values())).backward()
        grads.append([y_BLD.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert len(grads[0]) == 7
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_no_token_and_one_token() -> None:
    layer = make_layer(5, 2, "grouped")
    y_BLD, routing = layer(torch.empty(0, 3, 16))
    (y_BLD.sum() + sum(routing.losses.values())).backward()
    assert y_BLD.shape == (0, 3, 16)
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    assert layer(torch.randn(1, 1, 16))[0].shape == (1, 1, 16)


def test_autocast_reaches_the_experts_and_not_the_router() -> None:
    layer = make_layer(4, 2, "auto")
    x_BLD = torch.randn(2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BLD, routing = layer(x_BLD)
    assert y_BLD.dtype == torch.bfloat16  # what a Linear would give
    assert torch.equal(routing.weights_TK, layer(x_BLD)[1].weights_TK)
    torch.testing.assert_close(y_BLD.float(), layer(x_BLD)[0], rtol=3e-2, atol=3e-2)


def test_experts_start_different_from_each_other() -> None:
    layer = MoELayer(16, 24, 3, RouterConfig(), generator=torch.Generator().manual_seed(0))
    for weight in (layer.experts.up_proj, layer.experts.down_proj):
        assert not torch.equal(weight[0], weight[1])
        assert 0.01 < weight.std().item() < 0.03
    assert not layer.experts.up_proj_bias.any() and not layer.experts.down_proj_bias.any()


def stats(load: list[int], entropy: float, max_logit: float, drop_rate: float, uncovered: float) -> RoutingStats:
    numbers = (torch.tensor(x) for x in (entropy, max_logit, drop_rate, uncovered))
    return RoutingStats(torch.tensor(load), torch.tensor(load).float() / 2, *numbers)


def test_metrics_by_hand() -> None:
    # 20 choices over 4 experts: shares .5 .4 .1 0; one dead; largest over mean = 10 / 5.
    metrics = summarise({3: stats([10, 8, 2, 0], 1.25, 7.0, 0.25, 0.125)})
    assert metrics == {
        "moe/3/load": [0.5, 0.4, 0.1, 0.0], "moe/3/dead": 1.0, "moe/3/max_over_mean": 2.0, "moe/3/entropy": 1.25,
        "moe/3/drop_rate": 0.25, "moe/3/uncovered": 0.125,
    }  # fmt: skip


def test_merging_weighs_means_by_choices() -> None:
    merged = merge_stats([stats([3, 1], 1.0, 2.0, 0.5, 0.0), stats([0, 12], 0.2, 5.0, 0.25, 1.0)])
    assert merged.load_E.tolist() == [3, 13] and merged.load_E.dtype == torch.int64
    assert merged.importance_E.tolist() == [1.5, 6.5]
    assert float(merged.entropy) == pytest.approx((4 * 1.0 + 12 * 0.2) / 16)
    assert float(merged.drop_rate) == pytest.approx((4 * 0.5 + 12 * 0.25) / 16)  # 2 + 3 dropped of 16
    assert float(merged.uncovered) == pytest.approx(12 / 16)
    assert float(merged.max_logit) == 5.0
    with pytest.raises(ValueError, match="no statistics"):
        merge_stats([])
