"""Every backend against fp64 `reference` values and gradients over a table of shapes, and the reasons they give for refusing."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.moe.backends import ExpertWeights, get_backend, grouped, reference

CPU = torch.device("cpu")
COUNTS = {
    "ragged": [3, 8, 1, 5],
    "empty first": [0, 4, 4, 1],
    "empty last": [5, 4, 2, 0],
    "one gets all": [0, 0, 17, 0],
    "no rows": [0, 0, 0, 0],
    "one row": [0, 1, 0, 0],
    "one expert": [129],
}
# Largest error relative to the largest fp64 value. fp32 sums 16 to 129 products; bf16 keeps 8 bits and rounds four times.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 3e-2}


def make_inputs(counts: list[int], dtype: torch.dtype, dim: int = 16, hidden: int = 24) -> tuple[list[Tensor], Tensor, Tensor]:
    """(rows, up, up_b, down, down_b) as fp64 leaves rounded to `dtype`, offsets, output gradient."""
    g = torch.Generator().manual_seed(sum(counts))
    e, r = len(counts), sum(counts)
    shapes = [(r, dim), (e, hidden, dim), (e, hidden), (e, dim, hidden), (e, dim), (r, dim)]
    tensors = [torch.randn(s, generator=g).mul(0.5).to(dtype).double() for s in shapes]
    return tensors[:5], torch.tensor(counts).cumsum(0).to(torch.int32), tensors[5]


def run_with_gradients(run: object, tensors: list[Tensor], offsets: Tensor, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    rows, *weights = leaves
    out = run(rows, offsets, ExpertWeights(*weights))  # type: ignore[operator]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", COUNTS)
@pytest.mark.parametrize("name", ["reference", "grouped"])
def test_values_and_all_gradients_follow_fp64(name: str, case: str, dtype: torch.dtype) -> None:
    tensors, offsets, grad = make_inputs(COUNTS[case], dtype)
    run = get_backend(name, device=CPU, dtype=dtype, dim=16, hidden=24).run
    want = run_with_gradients(reference.run, tensors, offsets, grad, torch.float64)
    got = run_with_gradients(run, tensors, offsets, grad, dtype)
    for label, g, w in zip(("out", "rows", "up", "up_bias", "down", "down_bias"), got, want, strict=True):
        assert g.dtype == dtype and g.shape == w.shape, label
        error = (g.double() - w).abs().max().item() if w.numel() else 0.0
        scale = w.abs().max().item() if w.numel() else 1.0
        assert error <= TOLERANCE[dtype] * max(scale, 1.0), (label, error, scale)


@pytest.mark.parametrize("name", ["reference", "grouped"])
def test_experts_without_rows_get_exactly_zero_gradient(name: str) -> None:
    tensors, offsets, grad = make_inputs([0, 4, 0, 1], torch.float32)
    run = get_backend(name, device=CPU, dtype=torch.float32, dim=16, hidden=24).run
    for weight_grad in run_with_gradients(run, tensors, offsets, grad, torch.float32)[2:]:
        assert not weight_grad[0].any() and not weight_grad[2].any()
        assert weight_grad[1].any() and weight_grad[3].any()


@pytest.mark.parametrize("name", ["reference", "grouped"])
def test_repeated_runs_are_bitwise_equal(name: str) -> None:
    tensors, offsets, grad = make_inputs(COUNTS["ragged"], torch.float32)
    run = get_backend(name, device=CPU, dtype=torch.float32, dim=16, hidden=24).run
    first, second = (run_with_gradients(run, tensors, offsets, grad, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("case", COUNTS)
def test_grouped_and_reference_agree_bit_by_bit_in_fp32_on_the_cpu(case: str) -> None:
    tensors, offsets, _ = make_inputs(COUNTS[case], torch.float32, dim=64, hidden=256)
    rows, *weights = [t.float() for t in tensors]
    assert torch.equal(grouped.run(rows, offsets, ExpertWeights(*weights)), reference.run(rows, offsets, ExpertWeights(*weights)))


def test_grouped_takes_strided_rows_and_expanded_gradients() -> None:
    tensors, offsets, _ = make_inputs(COUNTS["ragged"], torch.float32)
    rows, *weights = [t.float() for t in tensors]
    strided = rows.t().contiguous().t().requires_grad_()
    out = grouped.run(strided, offsets, ExpertWeights(*weights))
    assert torch.equal(out, grouped.run(rows, offsets, ExpertWeights(*weights)))
    out.sum().backward()  # stride 0 in every dimension
    assert strided.grad is not None and strided.grad.isfinite().all()


def test_the_reference_gelu_is_the_exact_one() -> None:
    # One row, one expert, identity weights: gelu(x) = x * (1 + erf(x / sqrt 2)) / 2; the tanh form is off by 1e-4 here.
    one = torch.ones(1, 1, 1, dtype=torch.double)
    zero = torch.zeros(1, 1, dtype=torch.double)
    x = torch.tensor([[1.5]], dtype=torch.double)
    out = reference.run(x, torch.tensor([1], dtype=torch.int32), ExpertWeights(one, zero, one, zero))
    torch.testing.assert_close(out, x * (1 + torch.erf(x / 2**0.5)) / 2, rtol=1e-14, atol=0)


def test_refusals_say_why() -> None:
    with pytest.raises(ValueError, match=r"moe.backend is 'fast'; allowed is one of \['auto', 'reference', 'grouped'\]"):
        get_backend("fast", device=CPU, dtype=torch.float32, dim=16, hidden=16)
    with pytest.raises(ValueError, match=r"grouped_mm has no torch.float64; use moe.backend=reference"):
        get_backend("grouped", device=CPU, dtype=torch.float64, dim=16, hidden=16)
    with pytest.raises(ValueError, match=r"moe.backend=auto .* multiples of 4, given embed_dim 30"):
        get_backend("auto", device=CPU, dtype=torch.float32, dim=30, hidden=16)
    with pytest.raises(ValueError, match=r"multiples of 8, given embed_dim 16 and expert width 20"):
        get_backend("grouped", device=CPU, dtype=torch.bfloat16, dim=16, hidden=20)


def test_auto_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    get_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="m2mkd_ds"):
        for _ in range(3):
            assert get_backend("auto", device=CPU, dtype=torch.float32, dim=16, hidden=64) is grouped
    assert [r.message for r in caplog.records] == ["moe.backend=auto: `grouped` for cpu, torch.float32, width 16 -> 64"]


def test_older_torch_uses_the_private_operator_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, offsets, grad = make_inputs(COUNTS["ragged"], torch.float32)
    want = run_with_gradients(grouped.run, tensors, offsets, grad, torch.float32)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    got = run_with_gradients(grouped.run, tensors, offsets, grad, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert "has no grouped_mm" in grouped.why_not(device=CPU, dtype=torch.float32, dim=16, hidden=16, activation="gelu")
