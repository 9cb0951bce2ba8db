"""The grouped GEMM kernels against the naive loop in fp64: values, gradients, tiles, gathering, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from m2mkd_kernels.configs import TileConfig
from m2mkd_kernels.grouped_gemm.launch import RowIndex, prepare_act_grad, prepare_gemm, prepare_weight_grad
from m2mkd_kernels.grouped_gemm.naive import grouped_gemm_naive
from m2mkd_kernels.grouped_gemm.op import grouped_gemm
from tests.kernels.kernel_cases import COUNTS, ends_of, judge, make_gather, randn, value_and_grads

F32 = torch.float32


@pytest.mark.parametrize(
    ("counts", "width_in", "width_out", "activation", "bias"),
    [
        ("ragged with an empty one", 37, 70, "none", True),
        ("ragged with an empty one", 64, 64, "gelu", False),
        ("empty ends", 40, 70, "swiglu", True),
        ("no rows", 8, 6, "gelu", True),
        ("one row", 3, 1, "none", False),
        ("one group", 33, 10, "swiglu", False),
    ],
)
def test_values_and_gradients_follow_fp64(
    device: torch.device, counts: str, width_in: int, width_out: int, activation: str, bias: bool
) -> None:
    num_groups, owned = len(COUNTS[counts]), sum(COUNTS[counts])
    rows = randn(owned + 2, width_in, seed=1, dtype=F32, device=device)
    rows[owned:] = torch.nan
    leaves = [rows, randn(num_groups, width_out, width_in, seed=2, dtype=F32, device=device)]
    leaves += [randn(num_groups, width_out, seed=3, dtype=F32, device=device)] * bias
    grad = randn(owned + 2, width_out // 2 if activation == "swiglu" else width_out, seed=4, dtype=F32, device=device)
    grad[owned:] = torch.nan
    offsets = ends_of(COUNTS[counts], device)

    def fused(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return grouped_gemm(rows, weight, bias, offsets, activation=activation)  # type: ignore[arg-type]

    def naive(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return grouped_gemm_naive(rows, weight, bias, offsets, activation=activation)  # type: ignore[arg-type]

    got = value_and_grads(fused, leaves, grad, owned)
    short = [rows[:owned], *leaves[1:]]
    truth = value_and_grads(naive, [leaf.double() for leaf in short], grad[:owned])
    judge(("out", "rows", "weight", "bias")[: len(got)], got, value_and_grads(naive, short, grad[:owned]), truth, F32)


def test_gathered_tokens_are_the_permuted_rows(device: torch.device) -> None:
    ids = [[t % 3, (t + 1) % 3] for t in range(20)]
    gather, offsets = make_gather(ids, 3)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    x, weight = randn(20, 24, seed=1, dtype=F32, device=device), randn(3, 16, 24, seed=2, dtype=F32, device=device)
    bias, grad = randn(3, 16, seed=3, dtype=F32, device=device), randn(40, 16, seed=4, dtype=F32, device=device)

    def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_gemm(x, weight, bias, offsets.to(device), activation="gelu", gather=gather)

    def naive(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return grouped_gemm_naive(x[gather.order_R // 2], weight, bias, offsets, activation="gelu")

    leaves = [x, weight, bias]
    truth = value_and_grads(naive, [leaf.double() for leaf in leaves], grad)
    judge(("out", "x", "weight", "bias"), value_and_grads(fused, leaves, grad), value_and_grads(naive, leaves, grad), truth, F32)


@pytest.mark.parametrize("tiles", [TileConfig(16, 32, 16, 1, 4, 2), TileConfig(32, 16, 64, 3, 4, 2), TileConfig(128, 64, 32, 8, 4, 3)])
def test_any_tiles_and_order_of_tiles_cover_the_result(device: torch.device, tiles: TileConfig) -> None:
    counts = [50, 0, 17, 1]
    offsets = ends_of(counts, device)
    rows, weight = randn(68, 40, seed=1, dtype=F32, device=device), randn(4, 70, 40, seed=2, dtype=F32, device=device)
    launch, z, h = prepare_gemm(rows, weight, None, offsets, activation="gelu", want_h=True, tiles=tiles)
    launch.run()
    want_z = grouped_gemm_naive(rows.double(), weight.double(), None, offsets)
    assert z is not None and h is not None
    torch.testing.assert_close(z.double(), want_z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(h.double(), torch.nn.functional.gelu(want_z), rtol=1e-5, atol=1e-6)
    launch, dweight = prepare_weight_grad(z, rows, offsets, tiles=tiles)
    launch.run()
    groups = zip(z.double().split(counts), rows.double().split(counts), strict=True)
    torch.testing.assert_close(dweight.double(), torch.stack([a.t() @ b for a, b in groups]), rtol=1e-5, atol=1e-5)


def test_seventy_groups_one_row_each(device: torch.device) -> None:
    # More than the 64 up to which programs of the largest group go first.
    rows, x = randn(70, 4, seed=1, dtype=F32, device=device), randn(70, 3, seed=2, dtype=F32, device=device)
    launch, dweight = prepare_weight_grad(rows, x, ends_of([1] * 70, device))
    launch.run()
    assert torch.equal(dweight, rows[:, :, None] * x[:, None, :])


def test_only_what_is_wanted_is_made(device: torch.device) -> None:
    rows, weight, offsets = torch.ones(2, 4, device=device), torch.ones(1, 6, 4, device=device), ends_of([2], device)
    _, z, h = prepare_gemm(rows, weight, None, offsets, activation="gelu", want_z=False, want_h=True)
    assert z is None and h is not None
    _, z, h = prepare_gemm(rows, weight, None, offsets)
    assert z is not None and h is None


def test_wrong_operands_are_refused(device: torch.device) -> None:
    rows, weight, offsets = torch.ones(2, 4, device=device), torch.ones(1, 5, 4, device=device), ends_of([2], device)
    with pytest.raises(ValueError, match=r"activation is 'relu'; allowed is `none`, `gelu` or `swiglu`"):
        grouped_gemm(rows, weight, None, offsets, activation="relu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"swiglu needs an even width of gate and value together, given 5"):
        grouped_gemm(rows, weight, None, offsets, activation="swiglu")
    with pytest.raises(ValueError, match=r"bias has shape \(1, 4\); it must be \(1, 5\)"):
        grouped_gemm(rows, weight, torch.ones(1, 4, device=device), offsets)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 4\); it must be \[G, O, I\]"):
        grouped_gemm(rows, weight[0], None, offsets)
    with pytest.raises(ValueError, match=r"index is torch.int32; it must be int64"):
        prepare_gemm(rows, weight, None, offsets, index=RowIndex(torch.zeros(2, dtype=torch.int32, device=device)))
    elsewhere = RowIndex(torch.zeros(2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=rf"index is on meta; it must be on {device}"):
        prepare_gemm(rows, weight, None, offsets, index=elsewhere)
    index, z, down = (
        RowIndex(torch.zeros(2, dtype=torch.int64, device=device)),
        torch.ones(2, 5, device=device),
        torch.ones(1, 4, 5, device=device),
    )
    with pytest.raises(ValueError, match=r"scale is torch.float64; it must be contiguous float32"):
        prepare_act_grad(rows, down, z, offsets, activation="gelu", index=index, scale_N=torch.ones(2, dtype=torch.float64, device=device))
    with pytest.raises(ValueError, match=rf"scale is on meta; it must be on {device}"):
        prepare_act_grad(rows, down, z, offsets, activation="gelu", index=index, scale_N=torch.ones(2, device="meta"))


def test_meta_tensors_are_prepared_and_not_run() -> None:
    rows, weight = torch.ones(2, 4, device="meta"), torch.ones(1, 5, 4, device="meta")
    with pytest.raises(ValueError, match=r"the kernels cannot run on meta tensors"):
        grouped_gemm(rows, weight, None, torch.ones(1, dtype=torch.int32, device="meta"))


def test_an_index_that_changes_before_the_backward_is_noticed(device: torch.device) -> None:
    gather, offsets = make_gather([[0], [0]], 1)
    gather = gather._replace(order_R=gather.order_R.to(device), rows_TK=gather.rows_TK.to(device))
    x = torch.ones(2, 4, device=device, requires_grad=True)
    out = grouped_gemm(x, torch.ones(1, 5, 4, device=device), None, offsets.to(device), gather=gather)
    gather.order_R.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
