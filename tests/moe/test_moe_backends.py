"""Every backend's `run` against an fp64 oracle over a table of shapes: values, all gradients, rows of nobody, bits, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.moe.backends import BACKENDS, Activation, ExpertWeights, fused, get_backend, grouped, loop, padded, reference
from m2mkd_ds.moe.backends.auto_table import TABLE

CPU = torch.device("cpu")
NAMES = ["reference", "loop", "grouped", "padded", "fused"]
WITH_TUTEL = [*NAMES, pytest.param("tutel_dispatch", marks=pytest.mark.tutel)]
COUNTS = {
    "ragged": [3, 8, 1, 5],
    "empty first": [0, 4, 4, 1],
    "empty middle": [2, 0, 0, 7],
    "empty last": [5, 4, 2, 0],
    "one gets all": [0, 0, 17, 0],
    "no rows": [0, 0, 0, 0],
    "one row": [0, 1, 0, 0],
    "127": [60, 1, 66],
    "one expert": [129],
}
# Largest error relative to the largest fp64 value: fp32 sums 16 to 129 products. bf16 is judged in test_moe_backends_layer.py.
FP32_TOLERANCE = 2e-6
Run = Callable[[Tensor, Tensor, ExpertWeights], Tensor]


def make_inputs(
    counts: list[int], activation: Activation = "gelu", dim: int = 16, hidden: int = 24, nobody: int = 0
) -> tuple[list[Tensor], Tensor, Tensor]:
    """(rows, up, up_b, down, down_b) in fp64, offsets, output gradient. The last `nobody` rows, and their gradient, are NaN."""
    g = torch.Generator().manual_seed(sum(counts))
    e, r, up = len(counts), sum(counts), 2 * hidden if activation == "swiglu" else hidden
    shapes = [(r, dim), (e, up, dim), (e, up), (e, dim, hidden), (e, dim), (r, dim)]
    tensors = [torch.randn(s, generator=g).mul(0.5).double() for s in shapes]
    poison = torch.full((nobody, dim), torch.nan, dtype=torch.double)
    tensors[0], tensors[5] = torch.cat([tensors[0], poison]), torch.cat([tensors[5], poison])
    return tensors[:5], torch.tensor(counts).cumsum(0).to(torch.int32), tensors[5]


def run_with_gradients(
    run: Run, tensors: list[Tensor], offsets: Tensor, grad: Tensor, dtype: torch.dtype, activation: Activation = "gelu"
) -> list[Tensor]:
    """Output, then the gradients of rows, up, up_bias, down, down_bias."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = run(leaves[0], offsets, ExpertWeights(leaves[1], leaves[2], leaves[3], leaves[4], activation))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]


def oracle(rows: Tensor, offsets: Tensor, weights: ExpertWeights) -> Tensor:
    """Every row through every expert, then the row's own picked by comparison: no loop, no slices."""
    z = torch.einsum("rd,egd->erg", rows, weights.up_EGD) + weights.up_bias_EG[:, None]
    if weights.activation == "gelu":
        h = 0.5 * z * (1 + torch.erf(z / 2**0.5))
    else:
        gate, value = z.split(weights.hidden, dim=-1)
        h = gate * torch.sigmoid(gate) * value
    y = torch.einsum("erf,edf->erd", h, weights.down_EDF) + weights.down_bias_ED[:, None]
    owner = (torch.arange(rows.shape[0])[:, None] >= offsets).sum(1)
    return (y * (owner == torch.arange(len(offsets))[:, None])[..., None]).sum(0)


def worst_error(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest value (or to 1, where values are smaller)."""
    return ((got.double() - want).abs().max() / want.abs().max().clamp(min=1)).item() if want.numel() else 0.0


LABELS = ("out", "rows", "up", "up_bias", "down", "down_bias")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", WITH_TUTEL)
def test_values_and_all_gradients_follow_fp64(name: str, activation: Activation) -> None:
    run = get_backend(name, device=CPU, dtype=torch.float32, dim=16, hidden=24, activation=activation).run
    for case, counts in COUNTS.items():
        tensors, offsets, grad = make_inputs(counts, activation)
        want = run_with_gradients(oracle, tensors, offsets, grad, torch.float64, activation)
        got = run_with_gradients(run, tensors, offsets, grad, torch.float32, activation)
        assert got[0].is_contiguous()
        for label, g, w in zip(LABELS, got, want, strict=True):
            assert g.dtype == torch.float32 and g.shape == w.shape, (case, label)
            assert worst_error(g, w) <= FP32_TOLERANCE, (case, label, worst_error(g, w))


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", [n for n in NAMES if n != "grouped"])
def test_fp64_agrees_to_rounding_and_passes_gradcheck(name: str, activation: Activation) -> None:
    run = get_backend(name, device=CPU, dtype=torch.float64, dim=3, hidden=4, activation=activation).run
    tensors, offsets, grad = make_inputs([2, 0, 3], activation, dim=3, hidden=4)
    want = run_with_gradients(oracle, tensors, offsets, grad, torch.float64, activation)
    got = run_with_gradients(run, tensors, offsets, grad, torch.float64, activation)
    assert max(worst_error(g, w) for g, w in zip(got, want, strict=True)) < 1e-14
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(lambda rows, a, b, c, d: run(rows, offsets, ExpertWeights(a, b, c, d, activation)), leaves)


@pytest.mark.parametrize("counts", [[3, 0, 5], [5, 0, 2], [0, 0, 0]], ids=["most last", "most first", "none"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", WITH_TUTEL)
def test_rows_of_nobody_change_no_bit(name: str, activation: Activation, counts: list[int]) -> None:
    run, owned = BACKENDS[name].run, sum(counts)
    alone = run_with_gradients(run, *make_inputs(counts, activation), torch.float32, activation)
    tensors, offsets, grad = make_inputs(counts, activation, nobody=6)
    assert tensors[0][owned:].isnan().all() and grad[owned:].isnan().all() and offsets[-1] == owned
    torch.use_deterministic_algorithms(True)  # torch then fills memory that it does not initialise with NaN
    try:
        poisoned = run_with_gradients(run, tensors, offsets, grad, torch.float32, activation)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(poisoned[0]) == len(poisoned[1]) == owned + 6
    poisoned[:2] = [t[:owned] for t in poisoned[:2]]
    for label, a, b in zip(LABELS, alone, poisoned, strict=True):
        assert b.isfinite().all() and torch.equal(a, b), label


@pytest.mark.parametrize("name", WITH_TUTEL)
def test_experts_without_rows_get_exactly_zero_gradient(name: str) -> None:
    grads = run_with_gradients(BACKENDS[name].run, *make_inputs([0, 4, 0, 1]), torch.float32)[2:]
    for weight_grad in grads:
        assert not weight_grad[0].any() and not weight_grad[2].any()
        assert weight_grad[1].any() and weight_grad[3].any()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", WITH_TUTEL)
def test_a_second_run_and_a_second_backward_give_the_same_bits(name: str, activation: Activation) -> None:
    tensors, offsets, grad = make_inputs(COUNTS["ragged"], activation)
    first, second = (run_with_gradients(BACKENDS[name].run, tensors, offsets, grad, torch.float32, activation) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    leaves = [t.float().requires_grad_() for t in tensors]
    out = BACKENDS[name].run(leaves[0], offsets, ExpertWeights(leaves[1], leaves[2], leaves[3], leaves[4], activation))
    for _ in range(2):
        again = torch.autograd.grad(out, leaves, grad.float(), retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first[1:], again, strict=True))


@pytest.mark.parametrize("case", COUNTS)
def test_reference_grouped_and_fused_agree_bit_by_bit_in_fp32_on_the_cpu(case: str) -> None:
    # The export of a run checks the exported model's logits (plain loop or grouped_mm) against the training code's bits.
    tensors, offsets, _ = make_inputs(COUNTS[case], dim=64, hidden=256)
    rows, up, up_b, down, down_b = [t.float() for t in tensors]
    want = reference.run(rows, offsets, ExpertWeights(up, up_b, down, down_b))
    for backend in (grouped, fused):
        assert torch.equal(backend.run(rows, offsets, ExpertWeights(up, up_b, down, down_b)), want)


@pytest.mark.parametrize("name", WITH_TUTEL)
def test_strided_rows_and_expanded_gradients_are_taken(name: str) -> None:
    tensors, offsets, _ = make_inputs(COUNTS["ragged"])
    ones = torch.ones(17, 16)
    want = run_with_gradients(BACKENDS[name].run, tensors, offsets, ones, torch.float32)
    leaves = [t.float().requires_grad_() for t in tensors]
    strided = leaves[0].detach().t().contiguous().t().requires_grad_()
    out = BACKENDS[name].run(strided, offsets, ExpertWeights(*leaves[1:]))  # type: ignore[arg-type]
    grads = torch.autograd.grad(out, [strided, *leaves[1:]], torch.ones(()).expand(17, 16))  # stride 0 in every dimension
    assert max(worst_error(g, w.double()) for g, w in zip([out, *grads], want, strict=True)) <= FP32_TOLERANCE


def test_fused_sums_over_blocks_of_a_large_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, offsets, grad = make_inputs([11, 0, 23])
    want = run_with_gradients(oracle, tensors, offsets, grad, torch.float64)
    for block in (1, 4, 23):  # 11 = 4 + 4 + 3 rows, 23 = 5 * 4 + 3
        monkeypatch.setattr(fused, "BLOCK_ROWS", block)
        got = run_with_gradients(fused.run, tensors, offsets, grad, torch.float32)
        assert max(worst_error(g, w) for g, w in zip(got, want, strict=True)) <= FP32_TOLERANCE


def test_the_reference_activations_by_hand() -> None:
    # One row, one expert, identity weights: gelu(x) = x * (1 + erf(x / sqrt 2)) / 2; the tanh form is off by 1e-4 here.
    one = torch.ones(1, 1, 1, dtype=torch.double)
    zero = torch.zeros(1, 1, dtype=torch.double)
    x, end = torch.tensor([[1.5]], dtype=torch.double), torch.tensor([1], dtype=torch.int32)
    out = reference.run(x, end, ExpertWeights(one, zero, one, zero))
    torch.testing.assert_close(out, x * (1 + torch.erf(x / 2**0.5)) / 2, rtol=1e-14, atol=0)
    # swiglu with gate 2 x = 3 and value -x = -1.5: 3 / (1 + e^-3) * -1.5 = -4.2865819557...
    up = torch.tensor([[[2.0], [-1.0]]], dtype=torch.double)
    for backend in (reference, loop, padded, fused):
        out = backend.run(x, end, ExpertWeights(up, torch.zeros(1, 2, dtype=torch.double), one, zero, "swiglu"))
        torch.testing.assert_close(out.item(), -4.5 / (1 + 2.718281828459045**-3), rtol=1e-14, atol=0)


def test_an_absent_tutel_is_a_refusal_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"moe.backend=tutel_dispatch cannot run here: Tutel is not installed; Tutel is not on PyPI"):
        get_backend("tutel_dispatch", device=CPU, dtype=torch.float32, dim=18, hidden=16)


def test_tutels_kernels_are_refused_where_they_would_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        with pytest.raises(ValueError, match=f"its kernels stand here for torch.float32 only, not {dtype}"):
            get_backend("tutel_dispatch", device=CPU, dtype=dtype, dim=16, hidden=16)


def test_refusals_say_why() -> None:
    with pytest.raises(
        ValueError, match=r"moe.backend is 'fast'; allowed is one of \['auto', 'reference', 'loop', 'grouped', 'padded', 'fused'"
    ):
        get_backend("fast", device=CPU, dtype=torch.float32, dim=16, hidden=16)
    with pytest.raises(ValueError, match=r"moe.backend=grouped cannot run here: grouped_mm has no torch.float64; use moe.backend=auto or"):
        get_backend("grouped", device=CPU, dtype=torch.float64, dim=16, hidden=16)
    with pytest.raises(ValueError, match=r"multiples of 4, given embed_dim 30"):
        get_backend("grouped", device=CPU, dtype=torch.float32, dim=30, hidden=16)
    with pytest.raises(ValueError, match=r"multiples of 8, given embed_dim 16 and expert width 20"):
        get_backend("grouped", device=CPU, dtype=torch.bfloat16, dim=16, hidden=20)
    with pytest.raises(ValueError, match=r"moe.backend=fused cannot run here: .* not in torch.int8"):
        get_backend("fused", device=CPU, dtype=torch.int8, dim=16, hidden=16)
    with pytest.raises(ValueError, match=r"moe.backend=auto knows no backend for xpu and torch.float32; name one of"):
        get_backend("auto", device=torch.device("xpu"), dtype=torch.float32, dim=16, hidden=16)


def test_auto_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    get_backend.cache_clear()
    with caplog.at_level(logging.INFO, logger="m2mkd_ds"):
        for _ in range(3):
            assert get_backend("auto", device=CPU, dtype=torch.float32, dim=16, hidden=64) is fused
    (record,) = caplog.records
    assert record.message.startswith("moe.backend=auto: `fused` for cpu, torch.float32, width 16 -> 64 (measured on ")


def test_auto_goes_down_its_row_and_says_why(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    get_backend.cache_clear()
    monkeypatch.setattr("m2mkd_ds.moe.backends.auto_table.TABLE", (TABLE[0]._replace(candidates=("grouped", "loop")),))
    with caplog.at_level(logging.INFO, logger="m2mkd_ds"):
        assert get_backend("auto", device=CPU, dtype=torch.float32, dim=30, hidden=64) is loop
    assert caplog.records[0].message.endswith(
        "not `grouped`: for torch.float32 grouped_mm needs widths that are multiples of 4, given embed_dim 30 and expert width 64)"
    )
    monkeypatch.setattr("m2mkd_ds.moe.backends.auto_table.TABLE", (TABLE[0]._replace(candidates=("grouped",)),))
    with pytest.raises(ValueError, match=r"none of its candidates can run here \(`grouped`: .* embed_dim 34 .*; use moe.backend=reference"):
        get_backend("auto", device=CPU, dtype=torch.float32, dim=34, hidden=64)
    get_backend.cache_clear()


def test_every_name_in_the_table_exists() -> None:
    assert {name for row in TABLE for name in row.candidates} <= set(BACKENDS)
    for name, backend in BACKENDS.items():
        assert backend.NAME == name


def test_older_torch_uses_the_private_operator_or_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, offsets, grad = make_inputs(COUNTS["ragged"])
    want = run_with_gradients(grouped.run, tensors, offsets, grad, torch.float32)
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    got = run_with_gradients(grouped.run, tensors, offsets, grad, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    monkeypatch.delattr(torch, "_grouped_mm", raising=False)
    assert "has no grouped_mm" in grouped.why_not(device=CPU, dtype=torch.float32, dim=16, hidden=16, activation="gelu")
