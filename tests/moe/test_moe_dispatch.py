"""Dispatch and combine: a permutation that loses nothing, with gradients equal to those of plain indexing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from m2mkd_ds.moe.dispatch import combine, make_plan, permute


def random_ids(num_tokens: int, num_experts: int, k: int) -> Tensor:
    """K different experts a token."""
    return torch.rand(num_tokens, num_experts, generator=torch.Generator().manual_seed(num_tokens)).argsort(dim=1)[:, :k].contiguous()


def test_plan_by_hand() -> None:
    # Choices in flat order (token*2 + choice): t0 -> 2, 0; t1 -> 0, 3; t2 -> 2, 3. Expert 1 gets nothing.
    plan = make_plan(torch.tensor([[2, 0], [0, 3], [2, 3]]), 4)
    # Expert 0 owns flat 1, 2; expert 2 owns flat 0, 4; expert 3 owns flat 3, 5.
    assert plan.order_R.tolist() == [1, 2, 0, 4, 3, 5]
    assert plan.offsets_E.tolist() == [2, 2, 4, 6]
    assert plan.offsets_E.dtype == torch.int32
    assert plan.rows_TK.tolist() == [[2, 0], [1, 4], [3, 5]]
    rows = permute(torch.tensor([[10.0], [20.0], [30.0]]), plan)
    assert rows[:, 0].tolist() == [10, 20, 10, 30, 20, 30]
    # Rows back with weights: t0 = 1 * 10 + 2 * 10, t1 = 3 * 20 + 4 * 20, t2 = 5 * 30 + 6 * 30.
    assert combine(rows, torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), plan)[:, 0].tolist() == [30, 140, 330]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 7, 64, 129])
@pytest.mark.parametrize("ids", ["random", "all to the last", "all to the first"])
def test_one_choice_with_weight_one_is_the_identity(num_tokens: int, ids: str) -> None:
    ids_TK = {"random": random_ids(num_tokens, 5, 1), "all to the last": torch.full((num_tokens, 1), 4)}.get(
        ids, torch.zeros(num_tokens, 1, dtype=torch.int64)
    )
    plan = make_plan(ids_TK, 5)
    x_TD = torch.randn(num_tokens, 6)
    assert plan.offsets_E[-1] == num_tokens
    assert torch.equal(combine(permute(x_TD, plan), torch.ones(num_tokens, 1), plan), x_TD)


@pytest.mark.parametrize("num_tokens", [0, 1, 9, 33])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_rows_lie_in_their_experts_segment(num_tokens: int, k: int) -> None:
    ids_TK = random_ids(num_tokens, 5, k)
    plan = make_plan(ids_TK, 5)
    ends = plan.offsets_E.tolist()
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        owners = sorted(plan.order_R[start:end].tolist())
        assert owners == plan.order_R[start:end].tolist()  # stable
        assert owners == (ids_TK.reshape(-1) == expert).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("k", [1, 2, 5])
def test_values_and_gradients_equal_plain_indexing(k: int) -> None:
    ids_TK = random_ids(11, 5, k)
    plan = make_plan(ids_TK, 5)
    x_TD = torch.randn(11, 3, dtype=torch.double, requires_grad=True)
    weights_TK = torch.rand(11, k, dtype=torch.double, requires_grad=True)
    scale_RD = torch.randn(11 * k, 3, dtype=torch.double, requires_grad=True)

    def ours(x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        return combine(permute(x, plan) * scale, weights, plan)

    def plain(x: Tensor, weights: Tensor, scale: Tensor) -> Tensor:
        rows = x[plan.order_R // k] * scale
        return (torch.empty(11 * k, 3, dtype=x.dtype).index_put((plan.order_R,), rows).view(11, k, 3) * weights[..., None]).sum(1)

    inputs = (x_TD, weights_TK, scale_RD)
    torch.testing.assert_close(ours(*inputs), plain(*inputs))
    grad_TD = torch.randn(11, 3, dtype=torch.double)
    wants = torch.autograd.grad(plain(*inputs), inputs, grad_TD)
    for got, want in zip(torch.autograd.grad(ours(*inputs), inputs, grad_TD), wants, strict=True):
        torch.testing.assert_close(got, want)
    assert torch.autograd.gradcheck(ours, inputs)


def test_bf16_rows_are_summed_in_fp32() -> None:
    # 1 + 4 * 2^-9 = 1 + 2^-7, a bf16 number; summed in bf16 each 2^-9, a quarter of the last place, would vanish.
    plan = make_plan(torch.tensor([[0, 1, 2, 3, 4]]), 5)
    rows_RD = torch.tensor([[1.0], [2**-9], [2**-9], [2**-9], [2**-9]]).bfloat16()
    assert combine(rows_RD, torch.ones(1, 5), plan).item() == 1 + 2**-7
    assert sum(rows_RD[:, 0].unbind()).item() == 1.0  # type: ignore[union-attr]


def test_bf16_gradients_of_a_token_are_summed_in_fp32() -> None:
    # The same numbers on the way back: one token, five rows.
    x_TD = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    rows_RD = permute(x_TD, make_plan(torch.tensor([[0, 1, 2, 3, 4]]), 5))
    rows_RD.backward(torch.tensor([[1.0], [2**-9], [2**-9], [2**-9], [2**-9]]).bfloat16())
    assert x_TD.grad is not None and x_TD.grad.item() == 1 + 2**-7


def test_repeated_runs_are_bitwise_equal_and_strided_input_works() -> None:
    plan = make_plan(random_ids(50, 5, 2), 5)
    x_DT = torch.randn(8, 50)
    results = []
    for x_TD in (x_DT.t(), x_DT.t().contiguous()):
        leaf = x_TD.detach().requires_grad_()
        y_TD = combine(permute(leaf, plan).sin(), torch.full((50, 2), 0.3), plan)
        y_TD.sum().backward()  # an expanded gradient with stride 0
        results.append((y_TD, leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]


def test_dropped_choices_by_hand() -> None:
    # Three experts, 3 stands for none; at most 4 of 6 choices have one. Flat choices: t0 -> 1, none; t1 -> 0, 1; t2 -> none, none.
    plan = make_plan(torch.tensor([[1, 3], [0, 1], [3, 3]]), 3, max_rows=4)
    assert plan.offsets_E.tolist() == [1, 3, 3]
    assert plan.order_R[:3].tolist() == [2, 0, 3]  # row 3 is nobody's
    x_TD = torch.tensor([[10.0], [20.0], [30.0]], requires_grad=True)
    rows = permute(x_TD, plan)
    assert rows[:3, 0].tolist() == [20, 10, 20]
    weights = torch.tensor([[1.0, 0.0], [2.0, 3.0], [0.0, 0.0]], requires_grad=True)
    behind = torch.tensor([[5.0], [6.0], [7.0], [torch.nan]], requires_grad=True)
    out = combine(behind, weights, plan)
    assert out[:, 0].tolist() == [6, 2 * 5 + 3 * 7, 0]
    out.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert behind.grad is not None and weights.grad is not None
    assert behind.grad[:3, 0].tolist() == [20, 1, 30]  # weight times the token's gradient
    assert weights.grad.tolist() == [[6, 0], [50, 70], [0, 0]]  # row times the token's gradient; none, not NaN, where there is no row
    rows.backward(torch.tensor([[1.0], [2.0], [4.0], [torch.nan]]))
    assert x_TD.grad is not None and x_TD.grad[:, 0].tolist() == [2, 1 + 4, 0]


def test_row_0_may_be_nobodys_and_there_may_be_no_row() -> None:
    for max_rows in (0, 2):
        plan = make_plan(torch.full((3, 2), 4), 4, max_rows)
        rows = torch.full((max_rows, 5), torch.nan, requires_grad=True)
        x_TD, weights = torch.ones(3, 5, requires_grad=True), torch.zeros(3, 2, requires_grad=True)
        out = combine(permute(x_TD, plan) * 0 + rows, weights, plan)
        out.sum().backward()
        assert torch.equal(out, torch.zeros(3, 5)) and torch.equal(weights.grad, torch.zeros(3, 2))  # type: ignore[arg-type]
        assert torch.equal(x_TD.grad, torch.zeros(3, 5))  # type: ignore[arg-type]


def test_gradcheck_with_dropped_choices() -> None:
    ids_TK = random_ids(6, 4, 2)
    ids_TK[1], ids_TK[4, 0] = 4, 4
    plan = make_plan(ids_TK, 4, max_rows=12)
    x_TD = torch.randn(6, 3, dtype=torch.double, requires_grad=True)
    weights_TK = torch.rand(6, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: combine(permute(x, plan).sin(), w, plan), (x_TD, weights_TK))


class LargeTensors(TorchDispatchMode):
    """Counts distinct results of operators with at least `size` elements."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.found |= {t.data_ptr() for t in tree_leaves(out) if isinstance(t, Tensor) and t.numel() >= self.size}
        return out


def test_combine_makes_no_copy_of_all_rows() -> None:
    plan = make_plan(random_ids(32, 5, 4), 5)
    rows = torch.randn(128, 6, requires_grad=True)
    weights = torch.rand(32, 4, requires_grad=True)
    with LargeTensors(2 * 32 * 6) as mode:
        out = combine(rows, weights, plan)
    assert not mode.found
    grad = torch.randn(32, 6)
    with LargeTensors(2 * 32 * 6) as mode:
        out.backward(grad)
    assert mode.found == {rows.grad.data_ptr()}  # type: ignore[union-attr]
