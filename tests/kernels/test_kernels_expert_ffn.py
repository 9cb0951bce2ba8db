"""The fused experts, forward and backward, against the naive loop in fp64."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m2mkd_kernels.expert_ffn.naive import expert_ffn_naive
from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_ffn, expert_layer
from tests.kernels.kernel_cases import COUNTS, check_layer, ends_of, judge, layer_inputs, make_gather, value_and_grads

F32 = torch.float32


def some_ids(num_tokens: int, top_k: int, num_experts: int) -> list[list[int]]:
    """Different experts for each token, expert 1 never."""
    draw = random.Random(num_tokens)
    allowed = [e for e in range(num_experts) if e != 1]
    return [draw.sample(allowed, top_k) for _ in range(num_tokens)]


@pytest.mark.parametrize(
    ("counts", "dim", "hidden", "activation"),
    [
        ("ragged with an empty one", 40, 72, "gelu"),
        ("ragged with an empty one", 64, 128, "swiglu"),  # every tile full
        ("empty ends", 5, 3, "swiglu"),
        ("no rows", 16, 24, "gelu"),
        ("one row", 1, 1, "gelu"),
        ("one group", 33, 70, "gelu"),
        ("more groups than 16", 16, 24, "gelu"),
    ],
)
def test_rows_follow_fp64_and_rows_of_nobody_are_not_read(
    device: torch.device, counts: str, dim: int, hidden: int, activation: str
) -> None:
    num_groups, owned = len(COUNTS[counts]), sum(COUNTS[counts])
    (rows, _, *weights), grad = layer_inputs(owned + 2, 1, num_groups, dim, hidden, F32, activation == "swiglu")
    rows[owned:], grad[owned:] = torch.nan, torch.nan
    offsets = ends_of(COUNTS[counts], device)
    leaves, grad = [leaf.to(device) for leaf in (rows, *weights)], grad.to(device)

    def fused(rows: Tensor, *weights: Tensor) -> Tensor:
        return expert_ffn(rows, offsets, FfnWeights(*weights), activation)  # type: ignore[arg-type]

    def naive(rows: Tensor, *weights: Tensor) -> Tensor:
        return expert_ffn_naive(rows, offsets, *weights, activation=activation)  # type: ignore[arg-type]

    got = value_and_grads(fused, leaves, grad, owned)
    short = [leaves[0][:owned], *leaves[1:]]
    truth = value_and_grads(naive, [leaf.double() for leaf in short], grad[:owned])
    judge(("out", "rows", "up", "up_bias", "down", "down_bias"), got, value_and_grads(naive, short, grad[:owned]), truth, F32)
    for group, count in enumerate(COUNTS[counts]):
        assert count or not any(g[group].any() for g in got[2:]), "a group without rows has gradients of exact zeros"


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "dtype", "activation"),
    [
        (129, 1, F32, "gelu"),
        (64, 2, F32, "swiglu"),
        (127, 2, torch.float16, "gelu"),
        (40, 2, torch.bfloat16, "gelu"),
        (40, 2, torch.bfloat16, "swiglu"),
        (1, 3, F32, "gelu"),
        (0, 2, F32, "gelu"),
    ],
)
def test_the_layer_follows_fp64_in_values_and_all_gradients(
    device: torch.device, num_tokens: int, top_k: int, dtype: torch.dtype, activation: str
) -> None:
    gather, offsets = make_gather(some_ids(num_tokens, top_k, 4), 4)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.view(num_tokens, top_k).to(device))
    leaves, grad = layer_inputs(num_tokens, top_k, 4, 40, 72, dtype, activation == "swiglu")
    check_layer([leaf.to(device) for leaf in leaves], grad.to(device), gather, offsets.to(device), activation, dtype)


def test_the_layer_with_all_experts_a_token(device: torch.device) -> None:
    gather, offsets = make_gather([list(order) for order in itertools.islice(itertools.permutations(range(4)), 20)], 4)
    leaves, grad = layer_inputs(20, 4, 4, 24, 40, F32, False)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    check_layer([leaf.to(device) for leaf in leaves], grad.to(device), gather, offsets.to(device), "gelu", F32)


def test_dropped_choices_add_nothing_and_a_token_without_rows_gets_zeros(device: torch.device) -> None:
    # Expert 3 stands for none. Token 2 keeps nothing: its x, its incoming gradient and its routing weights are NaN and reach nobody.
    ids = [[0, 3], [2, 0], [3, 3], [3, 2], [2, 0]]
    gather, offsets = make_gather(ids, 3, max_rows=9)
    gather = gather._replace(order_R=torch.where(torch.arange(9) < 6, gather.order_R, 2 * 2))  # rows of nobody name token 2
    leaves, grad = layer_inputs(5, 2, 3, 24, 40, F32, False)
    clean, clean_grad = [leaf.clone() for leaf in leaves], grad.clone()
    leaves[0][2], leaves[1][2], grad[2] = torch.nan, torch.nan, torch.nan
    on_device = type(gather)(*(t.to(device) for t in gather))  # type: ignore[union-attr]

    def fused(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        return expert_layer(x, routing, on_device, offsets.to(device), FfnWeights(*weights))

    def by_hand(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        y = [torch.zeros_like(x[0])] * 5
        for token, choices in enumerate(ids):
            for k, e in enumerate(choices):
                if e < 3:
                    up, up_bias, down, down_bias = (w[e] for w in weights)
                    y[token] = y[token] + routing[token, k] * (down @ torch.nn.functional.gelu(up @ x[token] + up_bias) + down_bias)
        return torch.stack(y)

    got = value_and_grads(fused, [leaf.to(device) for leaf in leaves], grad.to(device))
    want = value_and_grads(by_hand, [leaf.double() for leaf in clean], clean_grad)
    assert not got[0][2].any() and not got[1][2].any()
    assert got[2].cpu()[[0, 2, 2, 3], [1, 0, 1, 0]].tolist() == [0, 0, 0, 0]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-5, atol=1e-6)


def test_bits_repeat_in_a_second_run_a_second_backward_and_under_checkpoint(device: torch.device) -> None:
    gather, offsets = make_gather(some_ids(12, 2, 3), 3)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    leaves, grad = layer_inputs(12, 2, 3, 24, 40, F32, False)
    leaves = [leaf.to(device).requires_grad_() for leaf in leaves]
    grad = grad.to(device)

    def run(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        return expert_layer(x, routing, gather, offsets.to(device), FfnWeights(*weights))

    out = run(*leaves)
    first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    again = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    for other, grads in (
        (out, torch.autograd.grad(out, leaves, grad)),
        (again, torch.autograd.grad(again, leaves, grad)),
    ):
        assert torch.equal(out, other)
        assert all(torch.equal(a, b) for a, b in zip(first, grads, strict=True))


def test_strided_tokens_expanded_gradients_and_frozen_weights(device: torch.device) -> None:
    gather, offsets = make_gather(some_ids(12, 2, 3), 3)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    leaves, _ = layer_inputs(12, 2, 3, 24, 40, F32, False)
    x, routing, *weights = [leaf.to(device) for leaf in leaves]

    def run(x: Tensor) -> Tensor:
        return expert_layer(x, routing, gather, offsets.to(device), FfnWeights(*weights))

    plain = x.clone().requires_grad_()
    run(plain).backward(torch.ones_like(x))
    for strided in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, 24:], torch.stack([x, x], 1)[:, 0]):
        leaf = strided.detach().requires_grad_()
        assert leaf.stride() != x.stride()
        out = run(leaf)
        out.sum().backward()  # a gradient with stride 0 everywhere
        assert torch.equal(out, run(x)) and torch.equal(leaf.grad, plain.grad)


class Shapes(TorchDispatchMode):
    """Notes the shape of every output that a launch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.seen.append(tuple(out.shape))
        return out


def test_z_is_written_only_where_a_backward_may_come(device: torch.device) -> None:
    gather, offsets = make_gather(some_ids(5, 2, 3), 3)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    (x, routing, *weights), _ = layer_inputs(5, 2, 3, 8, 33, F32, False)
    x = x.to(device).requires_grad_()
    counts = []
    for grad_enabled in (True, False):
        with torch.set_grad_enabled(grad_enabled), Shapes() as shapes:
            expert_layer(x, routing.to(device), gather, offsets.to(device), FfnWeights(*(w.to(device) for w in weights)))
        counts.append(shapes.seen.count((10, 33)))
    assert counts == [2, 1]  # z and h; h alone


def test_there_is_no_second_order_gradient(device: torch.device) -> None:
    (rows, _, *weights), _ = layer_inputs(3, 1, 1, 4, 4, F32, False)
    rows = rows.to(device).requires_grad_()
    out = expert_ffn(rows, ends_of([3], device), FfnWeights(*(w.to(device) for w in weights)))
    with pytest.raises(RuntimeError, match="no second-order gradients: call backward without create_graph=True"):
        torch.autograd.grad(out.sum(), rows, create_graph=True)


def test_wrong_tensors_are_refused(device: torch.device) -> None:
    (rows, _, *weights), _ = layer_inputs(3, 1, 2, 4, 6, F32, False)
    rows, offsets, ffn = rows.to(device), ends_of([1, 2], device), FfnWeights(*(w.to(device) for w in weights))
    with pytest.raises(ValueError, match=r"rows is torch.float16; it must be torch.float32"):
        expert_ffn(rows.half(), offsets, ffn)
    with pytest.raises(ValueError, match=r"float32, bfloat16 or float16, given torch.float64"):
        expert_ffn(rows.double(), offsets, FfnWeights(*(w.double() for w in ffn)))
    with pytest.raises(ValueError, match=r"offsets are torch.int64; they must be int32"):
        expert_ffn(rows, offsets.long(), ffn)
    with pytest.raises(ValueError, match=r"offsets have shape \(3,\); one end a group is needed, \(2,\)"):
        expert_ffn(rows, ends_of([1, 1, 1], device), ffn)
    with pytest.raises(ValueError, match=r"rows are 3 wide; the weight wants 4"):
        expert_ffn(rows[:, :3], offsets, ffn)
    with pytest.raises(ValueError, match=r"down weight has shape \(2, 3, 6\); \[2, 4, F\] fits the up weight \(2, 6, 4\)"):
        expert_ffn(rows, offsets, ffn._replace(down_EDF=ffn.down_EDF[:, :3]))
