"""The backend `triton`: its contract, its whole-layer path, and what it says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from m2mkd_ds.moe.backends import ExpertWeights, get_backend, reference, triton
from m2mkd_ds.moe.dispatch import DispatchPlan, combine, make_plan, permute
from m2mkd_kernels import runtime

F32 = torch.float32
NAMES = ("out", "x", "weights", "up", "up_bias", "down", "down_bias")


@pytest.fixture
def device() -> torch.device:
    """The CPU where triton interprets (tests/conftest.py asks for it), else a GPU."""
    reason = runtime.why_not(torch.device("cpu"), F32) if runtime.interpreting() else ""
    if reason:
        pytest.skip(reason)
    return torch.device("cpu" if runtime.interpreting() or not torch.cuda.is_available() else "cuda")


def inputs(num_tokens: int, top_k: int, activation: str, device: torch.device) -> list[Tensor]:
    """x, routing weights, and the four weights of 3 experts, 12 -> 20 -> 12."""
    g = torch.Generator().manual_seed(num_tokens)
    up = 40 if activation == "swiglu" else 20
    shapes = [(num_tokens, 12), (num_tokens, top_k), (3, up, 12), (3, up), (3, 12, 20), (3, 12)]
    return [torch.randn(shape, generator=g).mul(0.4).to(device) for shape in shapes]


def layer_of_reference(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
    return combine(reference.run(permute(x_TD, plan), plan.offsets_E, weights), weights_TK, plan)


def layer_of_triton_rows(x_TD: Tensor, weights_TK: Tensor, plan: DispatchPlan, weights: ExpertWeights) -> Tensor:
    return combine(triton.run(permute(x_TD, plan), plan.offsets_E, weights), weights_TK, plan)


@pytest.mark.parametrize(
    ("ids", "max_rows", "activation"),
    [
        ([[0, 1], [2, 0], [2, 1], [0, 2], [1, 2]], None, "gelu"),
        ([[0, 3], [2, 0], [3, 3], [3, 2], [0, 2]], 8, "swiglu"),  # 3 is no expert; expert 1 has no rows; 6 of 8 rows are used
        ([[2], [2], [2]], None, "gelu"),
        ([[3, 3], [3, 3]], 2, "gelu"),
    ],
    ids=["kept", "dropped", "one gets all", "nothing kept"],
)
def test_both_paths_follow_the_reference_in_fp64(device: torch.device, ids: list[list[int]], max_rows: int | None, activation: str) -> None:
    plan = make_plan(torch.tensor(ids, device=device), 3, max_rows)
    leaves = inputs(len(ids), len(ids[0]), activation, device)
    grad = torch.randn(len(ids), 12, generator=torch.Generator().manual_seed(1)).to(device)

    def run(layer: object, dtype: torch.dtype) -> list[Tensor]:
        x, routing, *weights = own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        out = layer(x, routing, plan, ExpertWeights(*weights, activation))  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, own, grad.to(dtype))]

    want = run(layer_of_reference, torch.float64)
    for layer in (triton.run_layer, layer_of_triton_rows):
        for name, g, w in zip(NAMES, run(layer, F32), want, strict=True):
            assert g.dtype == F32, name
            torch.testing.assert_close(g.double(), w, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_ids_in_another_memory_order_give_the_same(device: torch.device) -> None:
    ids = torch.randint(0, 4, (2, 7), generator=torch.Generator().manual_seed(0)).t().to(device)  # 3 is no expert
    x, routing, *weights = inputs(7, 2, "gelu", device)
    plan = make_plan(ids, 3, 14)
    assert plan.kept_TK is not None and not plan.kept_TK.is_contiguous()
    got, want = (triton.run_layer(x, routing, plan, ExpertWeights(*weights)) for plan in (plan, make_plan(ids.contiguous(), 3, 14)))
    assert torch.equal(got, want)


def test_the_registry_knows_it_and_it_takes_any_width(device: torch.device) -> None:
    backend = get_backend("triton", device=device, dtype=F32, dim=5, hidden=3, activation="swiglu")
    assert backend.NAME == "triton" and hasattr(backend, "run_layer")


def test_fp64_is_refused_with_the_reason(device: torch.device) -> None:
    with pytest.raises(ValueError, match=r"moe.backend=triton .* float32, bfloat16 or float16, given torch.float64"):
        get_backend("triton", device=device, dtype=torch.float64, dim=8, hidden=8)


def test_where_triton_cannot_run_the_reason_says_what_to_do() -> None:
    # A process of its own, because triton decides at its first import whether it interprets.
    script = """
import os, torch
from m2mkd_ds.moe.backends import triton as backend
ask = dict(device=torch.device("cpu"), dtype=torch.float32, dim=8, hidden=8, activation="gelu")
print(backend.why_not(**ask))
import triton
os.environ["TRITON_INTERPRET"] = "1"
print(backend.why_not(**ask))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True)
    without, too_late = done.stdout.splitlines()
    assert without == "triton needs a CUDA device, given 'cpu'; set TRITON_INTERPRET=1 before the start to run its (slow) interpreter"
    assert too_late == "TRITON_INTERPRET was set after triton had been imported; set it before the process starts"


def test_importing_the_backends_imports_no_triton() -> None:
    script = "import sys, m2mkd_ds.moe.backends, m2mkd_kernels.expert_ffn.op; print('triton' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "True"]
