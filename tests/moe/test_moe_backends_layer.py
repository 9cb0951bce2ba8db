"""Dispatch, backend and combine together, as `Experts` calls them: against a dense fp64 oracle with gradients of the combine
weights too, with dropped choices, under activation checkpointing, autocast's dtype, torch.compile; and what is kept in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.backends import Activation
from m2mkd_ds.moe.dispatch import make_plan
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.moe.layer import MoELayer

NAMES = ["reference", "loop", "grouped", "padded", "fused", pytest.param("tutel_dispatch", marks=pytest.mark.tutel)]


def make_experts(name: str, num_experts: int = 5, activation: Activation = "gelu", dim: int = 16, hidden: int = 24) -> Experts:
    g = torch.Generator().manual_seed(3)
    experts = Experts(dim, hidden, num_experts, name, activation, g)
    with torch.no_grad():
        for p in experts.parameters():  # large enough that every expert and bias matters
            p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return experts


def make_problem(num_tokens: int, k: int, num_experts: int = 5, drop: bool = False, dim: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, ids, combine weights, output gradient) in fp64; with `drop` a third of the choices, and all of token 0's, have no expert."""
    g = torch.Generator().manual_seed(10 * num_tokens + k)
    ids_TK = torch.rand(num_tokens, num_experts, generator=g).argsort(dim=1)[:, :k].contiguous()
    weights_TK = torch.rand(num_tokens, k, generator=g, dtype=torch.double)
    if drop:
        gone_TK = torch.rand(num_tokens, k, generator=g) < 1 / 3
        gone_TK[:1] = True
        ids_TK[gone_TK], weights_TK[gone_TK] = num_experts, 0.0
    x_TD, grad_TD = (torch.randn(num_tokens, dim, generator=g, dtype=torch.double) for _ in range(2))
    return x_TD, ids_TK, weights_TK, grad_TD


def dense_oracle(experts: Experts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Every token through every expert, then a weighted sum in which a choice without expert counts nothing."""
    num_experts, _, hidden = experts.down_proj.shape
    z = torch.einsum("td,egd->etg", x_TD, experts.up_proj) + experts.up_proj_bias[:, None]
    if experts.activation == "gelu":
        h = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    else:
        gate, value = z.split(hidden, dim=-1)
        h = gate * torch.sigmoid(gate) * value
    y_ETD = torch.einsum("etf,edf->etd", h, experts.down_proj) + experts.down_proj_bias[:, None]
    share_TE = (weights_TK[..., None] * (ids_TK[..., None] == torch.arange(num_experts))).sum(1)
    return torch.einsum("etd,te->td", y_ETD, share_TE)


def run_with_gradients(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor, drop: bool = False) -> dict[str, Tensor]:
    """Output and gradients of x, combine weights and the four weights, through a plan with as many rows as choices."""
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    plan = make_plan(ids, experts.down_proj.shape[0], ids.numel() if drop else None)
    y = experts(x, weights, plan)
    return collect(experts, x, weights, y, grad)


def collect(experts: Experts, x: Tensor, weights: Tensor, y: Tensor, grad: Tensor) -> dict[str, Tensor]:
    names, params = zip(*experts.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, weights, *params], grad)
    return dict(zip(["y", "x", "weights", *names], [y.detach(), *grads], strict=True))


def oracle_with_gradients(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x, weights = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    return collect(experts, x, weights, dense_oracle(experts, x, ids, weights), grad.double())


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "dropped"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_follow_fp64(name: str, drop: bool, activation: Activation) -> None:
    experts = make_experts(name, activation=activation)
    oracle = make_experts(name, activation=activation).double()
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN: whoever reads it shows
    try:
        for num_tokens in (0, 1, 127, 129):
            for k in (1, 2, 5):
                x, ids, weights, grad = make_problem(num_tokens, k, drop=drop)
                got = run_with_gradients(experts, x.float(), ids, weights.float(), grad.float(), drop)
                want = oracle_with_gradients(oracle, x, ids, weights, grad)
                for label, w in want.items():
                    # A choice without expert has combine weight 0 and no gradient; 129 tokens sum up to 645 rows.
                    torch.testing.assert_close(
                        got[label].double(), w, rtol=0, atol=3e-6 * max(w.abs().max().item() if w.numel() else 1, 1), msg=label
                    )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("drop", [False, True], ids=["all kept", "dropped"])
def test_fused_layer_passes_gradcheck(drop: bool) -> None:
    experts = make_experts("fused", 3, "swiglu" if drop else "gelu", dim=3, hidden=4).double()
    x, ids, weights, _ = make_problem(4, 2, 3, drop, dim=3)
    plan = make_plan(ids, 3, 8 if drop else None)

    def forward(x: Tensor, weights: Tensor, *params: Tensor) -> Tensor:
        names = [name for name, _ in experts.named_parameters()]
        return torch.func.functional_call(experts, dict(zip(names, params, strict=True)), (x, weights, plan))

    inputs = (x.requires_grad_(), weights.requires_grad_(), *(p.detach().clone().requires_grad_() for p in experts.parameters()))
    assert torch.autograd.gradcheck(forward, inputs)


def test_fused_layer_equals_permute_run_combine_bit_by_bit_in_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids, weights, grad = (t.float() if t.is_floating_point() else t for t in make_problem(33, 2))
    whole = run_with_gradients(make_experts("fused"), x, ids, weights, grad)
    monkeypatch.delattr("m2mkd_ds.moe.backends.fused.run_layer")
    parts = run_with_gradients(make_experts("fused"), x, ids, weights, grad)
    assert torch.equal(whole["y"], parts["y"])
    for label, part in parts.items():
        torch.testing.assert_close(whole[label], part, rtol=1e-5, atol=1e-5, msg=label)


@pytest.mark.parametrize("name", ["grouped", "padded", "fused"])
def test_bf16_errs_at_most_twice_as_much_as_the_loop(name: str) -> None:
    x, ids, weights, grad = make_problem(257, 2, dim=64)
    x, grad = x.bfloat16(), grad.bfloat16()

    def errors(backend: str) -> dict[str, Tensor]:
        experts = make_experts(backend, dim=64, hidden=128).bfloat16()
        got = run_with_gradients(experts, x, ids, weights.float(), grad)
        want = oracle_with_gradients(experts.double(), x, ids, weights.float(), grad)
        return {label: got[label].double() - w for label, w in want.items()}

    baseline = errors("loop")
    for label, error in errors(name).items():
        assert error.abs().max() <= 2 * baseline[label].abs().max(), label
        assert error.square().mean() <= 4 * baseline[label].square().mean(), label  # rms, both sides squared


@pytest.mark.parametrize("name", NAMES)
def test_strided_input_expanded_gradient_and_repetition(name: str) -> None:
    x, ids, weights, _ = (t.float() if t.is_floating_point() else t for t in make_problem(50, 2))
    experts, ones = make_experts(name), torch.ones(())
    first, second = (run_with_gradients(experts, x, ids, weights, ones.expand(50, 16)) for _ in range(2))
    strided = run_with_gradients(experts, x.t().contiguous().t(), ids, weights.t().contiguous().t(), torch.ones(50, 16))
    for label in first:
        assert torch.equal(first[label], second[label]) and torch.equal(first[label], strided[label]), label


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_and_a_second_backward_change_no_bit(name: str) -> None:
    x, ids, weights, grad = (t.float() if t.is_floating_point() else t for t in make_problem(40, 2, drop=True))
    experts, plan = make_experts(name), make_plan(ids, 5, ids.numel())
    want = run_with_gradients(experts, x, ids, weights, grad, drop=True)
    for reentrant in (None, False, True):
        experts.zero_grad()
        leaf, leaf_weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = (
            experts(leaf, leaf_weights, plan)
            if reentrant is None
            else checkpoint(experts, leaf, leaf_weights, plan, use_reentrant=reentrant)
        )
        y.backward(grad, retain_graph=True)
        got = {"y": y, "x": leaf.grad, "weights": leaf_weights.grad, **{n: p.grad for n, p in experts.named_parameters()}}
        for label, w in want.items():
            assert torch.equal(got[label], w), (reentrant, label)  # type: ignore[arg-type]
        if not reentrant:  # reentrant checkpointing forbids a second pass
            leaf.grad = None
            y.backward(grad)
            assert torch.equal(leaf.grad, want["x"])  # type: ignore[arg-type]


@pytest.mark.parametrize("frozen", ["up_proj", "up_proj_bias", "down_proj", "down_proj_bias", "x", "weights"])
def test_fused_computes_no_gradient_that_nobody_wants(frozen: str) -> None:
    x, ids, weights, grad = (t.float() if t.is_floating_point() else t for t in make_problem(20, 2))
    experts, plan = make_experts("fused"), make_plan(ids, 5)
    want = run_with_gradients(experts, x, ids, weights, grad)
    leaves = {"x": x, "weights": weights, **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name != frozen)
    experts(x, weights, plan).backward(grad)
    assert leaves.pop(frozen).grad is None
    assert all(torch.equal(leaf.grad, want[name]) for name, leaf in leaves.items())  # type: ignore[arg-type]


def saved_bytes(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> int:
    """Bytes of distinct memory that forward keeps for backward, beside input, combine weights and parameters."""
    known = {t.untyped_storage().data_ptr() for t in (x, weights, *experts.parameters())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known and t.is_floating_point():
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = experts(x, weights, make_plan(ids, experts.down_proj.shape[0]))
    del y
    return sum(kept.values())


class PeakBytes(TorchDispatchMode):
    """Largest sum of live memory that operators under this mode have made, beside the storages of `known`."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.known = [t.untyped_storage() for t in known]
        self.live = {storage._cdata: 0 for storage in self.known}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def peak_bytes(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> int:
    """Of forward and backward."""
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    plan, grad = make_plan(ids, experts.down_proj.shape[0]), torch.ones_like(x)
    experts.zero_grad()
    with PeakBytes(x, weights, grad, *experts.parameters()) as mode:
        experts(x, weights, plan).backward(grad)
    return mode.peak


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_fused_keeps_the_pre_activations_only_and_peaks_below_the_loop(activation: Activation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd_ds.moe.backends.fused.BLOCK_ROWS", 160)  # to 500 tokens what 1024 is to a batch of 16 images
    x, ids, weights, _ = (t.float() if t.is_floating_point() else t for t in make_problem(500, 2, 4, dim=16))
    x.requires_grad_()
    fused, loop = (make_experts(name, 4, activation, dim=16, hidden=64) for name in ("fused", "loop"))
    # z: 1000 rows of 64 (swiglu: 128) fp32 numbers. The loop keeps z and h (swiglu: z, silu(gate) and h), and the rows twice
    # (before the experts and for combine).
    width = 64 if activation == "gelu" else 128
    assert saved_bytes(fused, x, ids, weights) == 1000 * width * 4
    assert saved_bytes(loop, x, ids, weights) >= 1000 * (width + 64 + 2 * 16) * 4
    to_two = torch.tensor([0, 3]).expand_as(ids).contiguous()
    for routed in (ids, to_two):
        assert peak_bytes(fused, x, routed, weights) < peak_bytes(loop, x, routed, weights)


class LiveAtGather(PeakBytes):
    """Live bytes at the last index_select: in backward, the sum over choices, when all experts are done."""

    last = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if "index_select" in str(func):
            self.last = sum(self.live.values())
        return out


def test_fused_frees_pre_activations_as_backward_passes_them() -> None:
    x, ids, weights, grad = (t.float() if t.is_floating_point() else t for t in make_problem(500, 2, 4, dim=16))
    experts, plan = make_experts("fused", 4, dim=16, hidden=64), make_plan(ids, 4)
    last = []
    for retain in (False, True):
        leaf = x.clone().requires_grad_()
        experts.zero_grad()
        with LiveAtGather(leaf, weights, grad, *experts.parameters()) as mode:
            experts(leaf, weights, plan).backward(grad, retain_graph=retain)
        last.append(mode.last)
    last_expert = int(plan.offsets_E[3] - plan.offsets_E[2])
    assert last[1] - last[0] == (1000 - last_expert) * 64 * 4  # z; that of the last expert is still in use


def test_fused_keeps_nothing_without_a_backward_pass() -> None:
    x, ids, weights, _ = (t.float() if t.is_floating_point() else t for t in make_problem(500, 1, 8, dim=8))
    experts, plan = make_experts("fused", 8, dim=8, hidden=128), make_plan(ids, 8)
    largest = int(plan.offsets_E.diff(prepend=torch.zeros(1, dtype=torch.int32)).max())
    with torch.no_grad(), PeakBytes(x, weights, *experts.parameters()) as mode:
        experts(x, weights, plan)
    # Two experts' z and h at most (the old ones go when the new ones are there) and a handful of [T, 8] buffers; z alone of all
    # rows would be [500, 128].
    assert mode.peak < (4 * largest * 128 + 6 * 500 * 8) * 4 < (500 + 2 * largest) * 128 * 4


def test_a_compiled_layer_gives_the_values_of_the_plain_one() -> None:
    layer = MoELayer(16, 24, 4, RouterConfig(), "fused", generator=torch.Generator().manual_seed(0))
    x_BLD = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    want, _ = layer(x_BLD)
    want.sum().backward()
    grads = [p.grad for p in layer.parameters()]
    layer.zero_grad()
    got, _ = torch.compile(layer, backend="eager")(x_BLD)  # traced in pieces: reading the offsets breaks the graph
    got.sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close([p.grad for p in layer.parameters()], grads)
