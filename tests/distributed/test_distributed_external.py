"""DeepSpeed's and Tutel's own MoE layers against ours, and the conventions in which the three differ.

Weights of the hand-worked cases: gate rows are unit vectors, so a token's first E entries are its logits.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.distributed.external.canonical import LayerShape, matching_router
from m2mkd_ds.distributed.external.deepspeed_moe import DeepSpeedMoE
from m2mkd_ds.moe.layer import MoELayer

PEERS = ["deepspeed", pytest.param("tutel", marks=pytest.mark.tutel)]


def build(peer: str, shape: LayerShape, **options: Any) -> Any:
    if peer == "deepspeed":
        return DeepSpeedMoE(shape, **options)
    from m2mkd_ds.distributed.external.tutel import TutelMoE

    return TutelMoE(shape, **options)


def our_layer(shape: LayerShape, seed: int = 0) -> MoELayer:
    generator = torch.Generator().manual_seed(seed)
    layer = MoELayer(shape.dim, shape.hidden, shape.num_experts, matching_router(shape.top_k), "reference", generator=generator)
    with torch.no_grad():
        for parameter in layer.parameters():  # larger than at a start, biases too, so that every term counts
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_with_nothing_dropped_a_peer_equals_our_layer_in_output_and_gradients(peer: str, top_k: int) -> None:
    shape = LayerShape(dim=16, hidden=24, num_experts=5, top_k=top_k)
    ours = our_layer(shape)
    other = build(peer, shape)
    other.load_canonical(ours.state_dict())
    x_BLD = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    left, right = x_BLD.clone().requires_grad_(), x_BLD.clone().requires_grad_()
    y_BLD, routing = ours(left)
    peer_BLD, _, counts_E = other(right)
    grad_BLD = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2))
    y_BLD.backward(grad_BLD)
    peer_BLD.backward(grad_BLD)
    assert counts_E.tolist() == routing.stats.load_E.tolist()
    assert relative(peer_BLD, y_BLD) < 1e-5
    assert left.grad is not None and right.grad is not None and relative(right.grad, left.grad) < 1e-5
    grads = other.to_canonical(grads=True)
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 1e-3, name
        assert relative(grads.pop(name), parameter.grad) < 1e-5, name
    assert grads == {}


@pytest.mark.parametrize("peer", PEERS)
def test_weights_come_back_bit_for_bit_and_every_expert_is_its_own(peer: str) -> None:
    shape = LayerShape(dim=8, hidden=12, num_experts=4, top_k=2)
    weights = our_layer(shape).state_dict()
    layer = build(peer, shape)
    layer.load_canonical(weights)
    back = layer.to_canonical()
    assert list(back) == list(shape.names()) and all(torch.equal(back[name], weights[name]) for name in back)
    assert not torch.equal(back["experts.up_proj"][0], back["experts.up_proj"][1])
    zero_bias = {**weights, "router.bias": torch.zeros(4)}
    layer.load_canonical(zero_bias)
    with pytest.raises(ValueError, match="router.bias is not zero"):
        layer.load_canonical({**weights, "router.bias": torch.tensor([0.0, 0, 1, 0])})
    with pytest.raises(ValueError, match=r"missing \['router.weight'\], unknown \['gate'\]"):
        layer.load_canonical({("gate" if n == "router.weight" else n): w for n, w in weights.items()})
    with pytest.raises(ValueError, match=r"shapes .*\(4, 9\)"):
        layer.load_canonical({**weights, "router.weight": torch.zeros(4, 9)})


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_two_evaluations_are_bitwise_equal_also_when_experts_overflow(peer: str, top_k: int) -> None:
    # DeepSpeed as it comes fails this: it draws the second expert (k = 2) and the tokens to keep (k = 1) at random in eval().
    shape = LayerShape(dim=16, hidden=8, num_experts=4, top_k=top_k)
    layer = build(peer, shape, capacity_factor=0.5).eval()
    layer.load_canonical(our_layer(shape).state_dict())
    x_BLD = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        first, _, counts_E = layer(x_BLD)
        assert int(counts_E.max()) > layer.capacity(32, int(counts_E.max()))  # it does overflow
        assert torch.equal(layer(x_BLD)[0], first)


def overflow(peer: str, factor: float, logits: list[list[float]]) -> tuple[Tensor, Any, dict[str, Tensor], Tensor]:
    """Output [T, D] of a k = 2 layer with three experts for tokens with these logits; the layer, its weights, the tokens."""
    shape = LayerShape(dim=8, hidden=4, num_experts=3, top_k=2)
    weights = our_layer(shape).state_dict() | {"router.weight": torch.eye(3, 8)}
    layer = build(peer, shape, capacity_factor=factor, **({"min_capacity": 1} if peer == "deepspeed" else {}))
    layer.load_canonical(weights)
    x_TD = torch.randn(len(logits), 8, generator=torch.Generator().manual_seed(4))
    x_TD[:, :3] = torch.tensor(logits)
    return layer(x_TD[None])[0][0].detach(), layer, weights, x_TD


def expert_output(weights: dict[str, Tensor], expert: int, x_D: Tensor) -> Tensor:
    up_F = F.gelu(weights["experts.up_proj"][expert] @ x_D + weights["experts.up_proj_bias"][expert])
    return weights["experts.down_proj"][expert] @ up_F + weights["experts.down_proj_bias"][expert]


# Four tokens, k = 2, three experts. Experts 0 and 1 are wanted by tokens 0, 1 and 2, expert 2 by token 3 as its first choice and
# expert 1 as its second. Weights of token 0: e^2 / (e^2 + e^1) = 1 / (1 + e^-1) for expert 0, the rest for expert 1.
LOGITS = [[2.0, 1.0, -9.0], [2.0, 1.0, -9.0], [1.0, 2.0, -9.0], [-9.0, 1.0, 2.0]]
BIG = 1 / (1 + math.exp(-1))


def test_deepspeed_rounds_the_capacity_up_and_renormalises_over_the_survivors() -> None:
    # ceil(4 / 3 * 0.5 * 2) = 2 slots each. First choices: expert 0 by tokens 0, 1; expert 1 by token 2; expert 2 by token 3.
    # Second choices: token 0 takes the last slot of expert 1; token 1 finds none there; token 2 finds none at expert 0; token 3 none.
    y_TD, layer, weights, x_TD = overflow("deepspeed", 0.5, LOGITS)
    assert layer.capacity(4, 4) == 2
    expected = [
        BIG * expert_output(weights, 0, x_TD[0]) + (1 - BIG) * expert_output(weights, 1, x_TD[0]),
        expert_output(weights, 0, x_TD[1]),
        expert_output(weights, 1, x_TD[2]),
        expert_output(weights, 2, x_TD[3]),
    ]
    assert torch.allclose(y_TD, torch.stack(expected), atol=1e-6)
    # min_capacity wins over a small factor: ceil(4 / 3 * 0.1 * 2) = 1, at least 4.
    assert DeepSpeedMoE(LayerShape(8, 4, 3, 2), capacity_factor=0.1).capacity(4, 4) == 4


@pytest.mark.tutel
def test_tutel_rounds_the_capacity_down_and_normalises_over_dropped_choices_too() -> None:
    # 2 * int(0.5 * ceil(4 / 3)) = 2 slots each, filled as above; but a survivor keeps its share of the two selected.
    y_TD, layer, weights, x_TD = overflow("tutel", 0.5, LOGITS)
    assert layer.capacity(4, 4) == 2
    expected = [
        BIG * expert_output(weights, 0, x_TD[0]) + (1 - BIG) * expert_output(weights, 1, x_TD[0]),
        BIG * expert_output(weights, 0, x_TD[1]),
        BIG * expert_output(weights, 1, x_TD[2]),
        BIG * expert_output(weights, 2, x_TD[3]),
    ]
    assert torch.allclose(y_TD, torch.stack(expected), atol=1e-6)
    # 2 * int(0.9 * 2) = 2, where rounding up would give 3 or 4.
    assert overflow("tutel", 0.9, LOGITS)[1].capacity(4, 4) == 2


def test_an_absent_tutel_says_how_to_get_it() -> None:
    from m2mkd_ds.distributed.external import tutel

    cpu = torch.device("cpu")
    reason = tutel.why_not(device=cpu, dtype=torch.bfloat16)
    assert "not on PyPI" in reason or "no torch.bfloat16" in reason
    with pytest.raises(ValueError, match="even widths"):
        tutel.TutelMoE(LayerShape(7, 8, 2, 1))


def test_deepspeed_refuses_a_group_that_does_not_divide_the_experts() -> None:
    with pytest.raises(ValueError, match="ep_size is 3; it must divide the number of experts, 4"):
        DeepSpeedMoE(LayerShape(8, 8, 4, 1), ep_size=3)
