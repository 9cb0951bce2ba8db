"""What holds for every router: no token, gradients, evaluation that repeats itself, precision, no wait for the device, refusals."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from m2mkd_ds.moe import dispatch, losses, routers, routing
from m2mkd_ds.moe.dispatch import make_plan
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routers import make_router

NOISY: dict[str, Any] = {"kind": "noisy_topk", "softmax": "before", "switch_weight": 0.0, "importance_weight": 0.3, "load_weight": 0.2}
EXPERT_CHOICE: dict[str, Any] = {"kind": "expert_choice", "softmax": "before", "switch_weight": 0.0, "capacity_factor": 0.8}
CONFIGS = {
    "after": RouterConfig(importance_weight=0.1, z_weight=0.1),
    "before, order": RouterConfig(softmax="before", capacity_factor=0.5, eval_capacity_factor=0.5),
    "renormalize, batch": RouterConfig(
        softmax="before", renormalize=True, capacity_factor=0.5, eval_capacity_factor=0.5, capacity_priority="batch"
    ),
    "noisy": RouterConfig(**NOISY, z_weight=0.1, capacity_factor=0.7, capacity_priority="batch"),
    "expert choice": RouterConfig(**EXPERT_CHOICE, z_weight=0.1),
    "loss free": ROUTER_PRESETS["loss_free"],
    "balanced": RouterConfig(kind="balanced", capacity_factor=0.5),
    "zipf": RouterConfig(kind="zipf", capacity_factor=0.5),
}
every_router = pytest.mark.parametrize("name", CONFIGS)


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_no_token_gives_empty_routing_and_finite_losses(name: str, training: bool) -> None:
    layer = MoELayer(6, 4, 4, CONFIGS[name], "reference").train(training)
    y_BLD, decided = layer(torch.empty(0, 3, 6))
    assert y_BLD.shape == (0, 3, 6)
    assert decided.expert_ids_TK.shape[0] == 0 and decided.stats.load_E.tolist() == [0, 0, 0, 0]
    assert all(value.item() == 0.0 for value in decided.losses.values())
    assert float(decided.stats.drop_rate) == float(decided.stats.uncovered) == 0.0
    (y_BLD.sum() + sum(decided.losses.values())).backward()
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_ids_weights_and_rows_keep_the_contract(name: str, training: bool) -> None:
    decided = make_router(6, 4, CONFIGS[name]).train(training)(torch.randn(21, 6))
    ids_TK, weights_TK = decided.expert_ids_TK, decided.weights_TK
    assert ids_TK.dtype == torch.int64 and weights_TK.dtype == torch.float32 and ids_TK.is_contiguous()
    assert int(ids_TK.min()) >= 0 and int(ids_TK.max()) <= (3 if decided.max_rows is None else 4)
    assert not weights_TK[ids_TK == 4].any() and bool((weights_TK[ids_TK < 4] > 0).all())
    for row in ids_TK.tolist():
        kept = [e for e in row if e < 4]
        assert len(set(kept)) == len(kept)  # no expert twice
    rows = int((ids_TK < 4).sum())
    plan = make_plan(ids_TK, 4, decided.max_rows)
    assert int(plan.offsets_E[-1]) == rows <= len(plan.order_R)
    assert decided.stats.drop_rate.item() == pytest.approx(1 - rows / int(decided.stats.load_E.sum()), abs=1e-6)


@every_router
def test_gradients_reach_the_router_through_weights_and_losses(name: str) -> None:
    router = make_router(6, 4, CONFIGS[name]).double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 6, generator=g))
    x_TD = torch.randn(9, 6, dtype=torch.double, generator=g, requires_grad=True)

    def outputs(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)  # the same noise in every call
        decided = torch.func.functional_call(router, {"weight": weight}, (x,))
        return (decided.weights_TK, *decided.losses.values())

    assert torch.autograd.gradcheck(outputs, (x_TD, router.weight))
    (grad_ED,) = torch.autograd.grad((outputs(x_TD, router.weight)[0] ** 2).sum(), router.weight)
    assert bool(grad_ED.any())


@every_router
def test_evaluation_repeats_itself_bit_for_bit(name: str) -> None:
    layer = MoELayer(6, 4, 4, CONFIGS[name], "reference").eval()
    x_BLD = torch.randn(3, 7, 6)
    torch.manual_seed(1)
    first, _ = layer(x_BLD)
    torch.manual_seed(2)
    assert torch.equal(layer(x_BLD)[0], first)


@every_router
def test_autocast_and_bf16_weights_change_no_precision(name: str) -> None:
    router = make_router(6, 4, CONFIGS[name]).eval()
    x_TD = torch.randn(20, 6)
    want = router(x_TD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(x_TD)
    assert torch.equal(cast.weights_TK, want.weights_TK) and torch.equal(cast.expert_ids_TK, want.expert_ids_TK)
    assert router.bfloat16()(x_TD.bfloat16()).weights_TK.dtype == torch.float32


@every_router
@pytest.mark.parametrize("training", [True, False])
def test_routing_reads_no_value_on_the_host(name: str, training: bool) -> None:
    # Tensors of the meta device have no values: .item(), nonzero and indexing by a mask fail on them. (So does autocast: no logits.)
    router = make_router(6, 4, CONFIGS[name]).train(training).to("meta")
    decided = router.route(torch.empty(40, 4, device="meta"))
    plan = make_plan(decided.expert_ids_TK, 4, decided.max_rows)
    assert plan.order_R.is_meta and decided.stats.load_E.is_meta


def test_no_file_of_the_routing_uses_atomics() -> None:
    files = [*Path(routers.__file__).parent.glob("*.py"), *(Path(m.__file__) for m in (routing, losses, dispatch))]
    forbidden = {"item", "tolist", "cpu", "numpy", "nonzero", "bincount", "unique", "masked_select", "scatter_add", "scatter_add_",
                 "index_add", "index_add_", "index_put_", "scatter_reduce", "topk"}  # fmt: skip
    assert len(files) > 9
    for file in files:
        used = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not used & forbidden, (file.name, used & forbidden)


def test_a_router_without_a_rule_of_its_own_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract class LinearRouter .*'?route'?"):
        routers.LinearRouter(6, 4, RouterConfig())  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "hash"}, "router.kind is 'hash'; allowed is one of"),
        ({"capacity_priority": "random"}, "router.capacity_priority is 'random'; allowed is `order` or `batch`"),
        ({"capacity_factor": -1.0}, "router.capacity_factor is -1.0; it must be at least 0"),
        ({"eval_capacity_factor": -0.5}, "router.eval_capacity_factor is -0.5; it must be at least 0"),
        ({"capacity_multiple": 0}, "router.capacity_multiple is 0; it must be at least 1"),
        ({"noise": -1.0}, "router.noise is -1.0; it must be at least 0"),
        ({"balance_rate": -1.0}, "router.balance_rate is -1.0; it must be at least 0"),
        ({"load_weight": 0.1}, "router.load_weight is 0.1 with router.kind=topk: .*set kind=noisy_topk and noise > 0"),
        (NOISY | {"noise": 0.0}, "router.load_weight is 0.2 with router.kind=noisy_topk: .*noise > 0"),
        (NOISY | {"softmax": "after"}, "router.softmax is after with router.kind=noisy_topk: .*set it to before"),
        (NOISY | {"renormalize": True}, "router.renormalize is True with router.kind=noisy_topk"),
        (NOISY | {"balance_rate": 0.1}, "router.balance_rate is 0.1 with router.kind=noisy_topk: the load loss does not see"),
        (EXPERT_CHOICE | {"capacity_factor": 0.0}, "router.capacity_factor is 0.0 with router.kind=expert_choice: .*set it above 0"),
        (EXPERT_CHOICE | {"switch_weight": 0.01}, "router.switch_weight is 0.01 with router.kind=expert_choice: .*by construction"),
        (EXPERT_CHOICE | {"importance_weight": 0.1}, "router.importance_weight is 0.1 with router.kind=expert_choice"),
        (EXPERT_CHOICE | {"balance_rate": 0.1}, "router.balance_rate is 0.1 with router.kind=expert_choice: .*by construction"),
        (EXPERT_CHOICE | {"capacity_priority": "batch"}, "router.capacity_priority is batch with router.kind=expert_choice"),
        (EXPERT_CHOICE | {"softmax": "after"}, "router.softmax is after with router.kind=expert_choice"),
        ({"kind": "zipf", "balance_rate": 0.1}, "router.balance_rate is 0.1 with router.kind=zipf: its choice is fixed"),
        ({"kind": "zipf", "zipf_exponent": -1.0}, "router.zipf_exponent is -1.0"),
    ],
)
def test_settings_without_sense_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(6, 4, RouterConfig(**settings))
