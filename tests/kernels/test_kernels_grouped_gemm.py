"""The naive grouped GEMM defines correctness, so it is checked by hand and by finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from m2mkd_kernels.grouped_gemm.naive import grouped_gemm_naive


def test_two_groups_by_hand() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    weight = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 2.0], [1.0, -1.0]]])
    bias = torch.tensor([[10.0, 20.0, 30.0], [0.5, 0.5, 0.5]])
    out = grouped_gemm_naive(rows, weight, bias, torch.tensor([1, 3], dtype=torch.int32))
    # Row 0 with group 0: 1+10, 2+20, 3+30. Rows 1, 2 with group 1: 2*3+.5, 2*4+.5, 3-4+.5 and 2*5+.5, 2*6+.5, 5-6+.5.
    assert out.tolist() == [[11, 22, 33], [6.5, 8.5, -0.5], [10.5, 12.5, -0.5]]
    no_bias = grouped_gemm_naive(rows, weight, None, torch.tensor([1, 3], dtype=torch.int32))
    assert no_bias[0].tolist() == [1, 2, 3]


def test_gelu_is_the_erf_form() -> None:
    one = torch.ones(1, 1, 1)
    out = grouped_gemm_naive(torch.tensor([[-0.7]]), one, None, torch.tensor([1]), activation="gelu")
    assert out.item() == pytest.approx(-0.7 * 0.5 * (1 + math.erf(-0.7 / math.sqrt(2))), rel=1e-6)


@pytest.mark.parametrize("ends", [[2, 2, 5], [0, 0, 5], [5, 5, 5], [1, 3, 5]])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_gradients_by_finite_differences(ends: list[int], activation: str) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (3, 2, 3), (3, 2)]
    inputs = [torch.randn(s, dtype=torch.double, generator=g, requires_grad=True) for s in shapes]
    offsets = torch.tensor(ends, dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *t: grouped_gemm_naive(*t, offsets, activation=activation), inputs)


def test_no_rows() -> None:
    out = grouped_gemm_naive(torch.empty(0, 3), torch.ones(2, 4, 3), None, torch.tensor([0, 0]))
    assert out.shape == (0, 4)


@pytest.mark.parametrize("ends", [[3, 2, 5], [1, 2, 6], [-1, 2, 5]])
def test_wrong_offsets_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match=r"must rise and not go beyond the number of rows, 5"):
        grouped_gemm_naive(torch.ones(5, 3), torch.ones(3, 2, 3), None, torch.tensor(ends))


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation is 'relu'; allowed is `none`, `gelu` or `swiglu`"):
        grouped_gemm_naive(torch.ones(1, 3), torch.ones(1, 2, 3), None, torch.tensor([1]), activation="relu")  # type: ignore[arg-type]
