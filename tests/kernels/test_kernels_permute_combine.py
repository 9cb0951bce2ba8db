"""Permute, combine and the bias gradient against their naive forms in fp64, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2mkd_kernels.bias_grad.launch import bias_grad, sum_tiles
from m2mkd_kernels.bias_grad.naive import bias_grad_naive
from m2mkd_kernels.combine.naive import combine_naive
from m2mkd_kernels.combine.op import combine
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.grouped_gemm.launch import RowIndex
from m2mkd_kernels.permute.naive import permute_naive, sum_rows_naive
from m2mkd_kernels.permute.op import permute
from tests.kernels.kernel_cases import COUNTS, ends_of, judge, make_gather, randn, value_and_grads

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


def plan_of(num_tokens: int, top_k: int, dropped: bool, device: torch.device) -> Gather:
    """Experts by a fixed rule; with `dropped`, every fourth choice has none and R is two rows longer than needed."""
    ids = [[(3 * t + k) % 5 for k in range(top_k)] for t in range(num_tokens)]
    if dropped:
        ids = [[5 if (t * top_k + k) % 4 == 0 else e for k, e in enumerate(row)] for t, row in enumerate(ids)]
    kept = sum(e < 5 for row in ids for e in row)
    gather, _ = make_gather(ids, 5, kept + 2 if dropped else None)
    return Gather(*(None if t is None else t.to(device) for t in gather))  # type: ignore[arg-type]


def test_combine_by_hand(device: torch.device) -> None:
    # Token 0 sits in rows 2 and 0, token 1 in row 1 only: y0 = .5*[5,6] + .25*[1,2] = [2.75, 3.5], y1 = 2*[3,4] = [6, 8].
    # For dy = [[1,1],[1,10]]: d rows = .25*[1,1], 2*[1,10], .5*[1,1]; d weights = 5+6, 1+2, 3+40, and 0 for the dropped choice.
    gather = Gather(torch.tensor([1, 2, 0]), torch.tensor([[2, 0], [1, 0]]), torch.tensor([[True, True], [True, False]]))
    gather = Gather(*(t.to(device) for t in gather))  # type: ignore[union-attr]
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device, requires_grad=True)
    weights = torch.tensor([[0.5, 0.25], [2.0, 7.0]], device=device, requires_grad=True)
    y = combine(rows, weights, gather)
    y.backward(torch.tensor([[1.0, 1.0], [1.0, 10.0]], device=device))
    assert y.tolist() == [[2.75, 3.5], [6.0, 8.0]]
    assert rows.grad is not None and rows.grad.tolist() == [[0.25, 0.25], [2, 20], [0.5, 0.5]]
    assert weights.grad is not None and weights.grad.tolist() == [[11, 3], [43, 0]]


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "width", "dropped", "dtype"),
    [
        (127, 2, 40, False, F32),
        (13, 2, 300, True, F32),
        (9, 5, 17, False, F16),
        (33, 1, 64, True, BF16),
        (1, 1, 1, False, F32),
        (0, 2, 8, False, F32),
    ],
)
def test_combine_and_permute_follow_fp64(
    device: torch.device, num_tokens: int, top_k: int, width: int, dropped: bool, dtype: torch.dtype
) -> None:
    gather = plan_of(num_tokens, top_k, dropped, device)
    gather = gather._replace(rows_TK=gather.rows_TK.view(num_tokens, top_k))
    owned = gather.num_rows - 2 if dropped else gather.num_rows
    rows = randn(gather.num_rows, width, seed=1, dtype=dtype, device=device)
    rows[owned:] = torch.nan
    x, grad = (randn(num_tokens, width, seed=seed, dtype=dtype, device=device) for seed in (2, 3))
    weights = randn(num_tokens, top_k, seed=4, dtype=F32, device=device)

    def combined(rows: Tensor, weights: Tensor) -> Tensor:
        return combine(rows, weights, gather)

    def by_index(rows: Tensor, weights: Tensor) -> Tensor:
        return combine_naive(rows, weights, gather.rows_TK, gather.kept_TK).to(rows.dtype)

    got = value_and_grads(combined, [rows, weights], grad)
    truth = value_and_grads(by_index, [rows.double(), weights.double()], grad)
    loop = value_and_grads(by_index, [rows, weights], grad)
    got[1], truth[1], loop[1] = got[1][:owned], truth[1][:owned], loop[1][:owned]
    judge(("y", "rows", "weights"), got, loop, truth, dtype)
    assert got[2].dtype == F32

    row_grad = randn(gather.num_rows, width, seed=5, dtype=dtype, device=device)
    row_grad[owned:] = torch.nan
    leaf = x.clone().requires_grad_()
    out = permute(leaf, gather)
    assert torch.equal(out, permute_naive(x, gather.order_R, top_k))
    (dx,) = torch.autograd.grad(out, leaf, row_grad)
    want = sum_rows_naive(row_grad.double(), gather.rows_TK, gather.kept_TK)
    judge(("x",), [dx], [want.to(dtype)], [want], dtype)


def test_sums_are_in_fp32(device: torch.device) -> None:
    # 1 + 2^-9 - 1 in bf16, rounded after every addition, is 0; the sum in fp32 is 2^-9, which bf16 holds.
    rows = torch.tensor([[1.0], [2.0**-9], [-1.0]], dtype=BF16, device=device)
    gather = Gather(torch.arange(3, device=device), torch.arange(3, device=device).view(1, 3))
    assert combine(rows, torch.ones(1, 3, device=device), gather).item() == 2.0**-9
    x = torch.zeros(1, 1, dtype=BF16, device=device, requires_grad=True)
    assert torch.autograd.grad(permute(x, gather), x, rows)[0].item() == 2.0**-9


def test_strided_rows_and_expanded_gradients(device: torch.device) -> None:
    gather = plan_of(6, 2, False, device)
    rows, weights = randn(12, 8, seed=1, dtype=F32, device=device), randn(6, 2, seed=2, dtype=F32, device=device)
    want = value_and_grads(lambda r, w: combine(r, w, gather), [rows, weights], torch.ones(6, 8, device=device))
    strided = rows.t().contiguous().t().requires_grad_()
    transposed = weights.t().contiguous().t().requires_grad_()
    out = combine(strided, transposed, gather)
    out.sum().backward()
    for got, expected in zip((out, strided.grad, transposed.grad), want, strict=True):
        assert got is not None and torch.equal(got, expected)


@pytest.mark.parametrize("counts", COUNTS)
def test_the_bias_gradient_sums_the_rows_of_each_group(device: torch.device, counts: str) -> None:
    owned = sum(COUNTS[counts])
    grad = randn(owned + 3, 21, seed=1, dtype=F32, device=device)
    grad[owned:] = torch.nan
    offsets = ends_of(COUNTS[counts], device)
    got = bias_grad(grad, offsets)
    judge(("bias",), [got], [bias_grad_naive(grad, offsets)], [bias_grad_naive(grad.double(), offsets)], F32)
    assert not any(got[g].any() for g, count in enumerate(COUNTS[counts]) if not count)


def test_the_sum_over_more_tiles_than_are_added_at_a_time(device: torch.device) -> None:
    # One row a tile; the second group has 70 of 73 tiles, added 32 at a time. Every tile counts once: 3 + ... + 72 = 2625.
    sums = torch.arange(73.0, device=device)[:, None].expand(73, 5).contiguous()
    got = sum_tiles(sums, ends_of([3, 70], device), 1, F32)
    assert got.tolist() == [[3.0] * 5, [2625.0] * 5]


def test_the_bias_gradient_of_gathered_and_scaled_rows(device: torch.device) -> None:
    # Rows are choices 3, 0, 2 of two tokens: tokens 1, 0, 1 with scales 8, 1, 4. Group 0 has the first row, group 1 the others.
    grad = torch.tensor([[1.0, 2.0], [10.0, 20.0]], device=device)
    index = RowIndex(torch.tensor([3, 0, 2], device=device), 2)
    scale = torch.tensor([1.0, 2.0, 4.0, 8.0], device=device)
    got = bias_grad(grad, ends_of([1, 2], device), index, scale)
    assert got.tolist() == [[80, 160], [1 + 40, 2 + 80]]


def test_wrong_indices_and_scales_of_the_bias_gradient_are_refused(device: torch.device) -> None:
    grad, ends, order = torch.ones(2, 3, device=device), ends_of([2], device), torch.zeros(2, dtype=torch.int64, device=device)
    for index, scale, message in (
        (order.int(), None, "index is torch.int32; it must be int64"),
        (order.to("meta"), None, "index is on meta; it must be on"),
        (order, torch.ones(2, dtype=torch.float16, device=device), "scale is torch.float16; it must be contiguous float32"),
        (order, torch.ones(2, device="meta"), "scale is on meta; it must be on"),
    ):
        with pytest.raises(ValueError, match=message):
            bias_grad(grad, ends, RowIndex(index), scale)


def test_wrong_plans_and_weights_are_refused(device: torch.device) -> None:
    gather = plan_of(4, 2, False, device)
    rows, weights = randn(8, 4, seed=1, dtype=F32, device=device), randn(4, 2, seed=2, dtype=F32, device=device)
    with pytest.raises(ValueError, match=r"weights_TK is torch.float64; combine weights are float32"):
        combine(rows, weights.double(), gather)
    with pytest.raises(ValueError, match=r"weights_TK has shape \(2, 4\); it must be \(4, 2\) like rows_TK"):
        combine(rows, weights.t(), gather)
    with pytest.raises(ValueError, match=r"there are 7 rows; the plan has 8"):
        combine(rows[:7], weights, gather)
    with pytest.raises(ValueError, match=r"order_R is torch.int32; it must be torch.int64"):
        combine(rows, weights, gather._replace(order_R=gather.order_R.int()))
    with pytest.raises(ValueError, match=r"rows_TK has shape \(4, 2\); it must be \(5, K\)"):
        permute(randn(5, 4, seed=1, dtype=F32, device=device), gather)
    with pytest.raises(ValueError, match=r"kept_TK must have the shape of rows_TK"):
        combine(rows, weights, gather._replace(kept_TK=torch.ones(8, dtype=torch.bool, device=device)))
