"""Inputs and the judge that the kernels' tests share: the naive form in fp64 is the truth, the naive form in the run's dtype the measure.

Shape letters: T tokens, K choices a token, R rows, E experts (groups), D width, F hidden width, U = F (gelu) or 2F (swiglu).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m2mkd_kernels.expert_ffn.naive import expert_layer_naive
from m2mkd_kernels.expert_ffn.op import FfnWeights, expert_layer
from m2mkd_kernels.gather import Gather

# A kernel's error may be twice the loop's. The interpreter cuts bf16 off where a GPU rounds to nearest (seen in triton 3.8), which
# alone doubles the error of every number that it stores; on top of that comes what the kernels may differ.
MAX_RATIO = {torch.float32: 2.0, torch.float16: 2.0, torch.bfloat16: 2.0}
MAX_RATIO_INTERPRETED = {**MAX_RATIO, torch.bfloat16: 4.0}
# A few roundings, for tensors of a few numbers that the loop happens to get right; relative to the norm of the tensor.
FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 3e-3}

COUNTS = {
    "ragged with an empty one": [3, 0, 129, 5],
    "empty ends": [0, 127, 0],
    "no rows": [0, 0, 0],
    "one row": [0, 1],
    "one group": [129],
    "more groups than 16": [1, 0, 2] * 6,
}


def randn(*shape: int, seed: int, dtype: torch.dtype, scale: float = 0.3, device: torch.device | None = None) -> Tensor:
    """Normal numbers that `dtype` holds exactly."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(device)


def ends_of(counts: Sequence[int], device: torch.device | None = None) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32).to(device)


def error(got: Tensor, truth: Tensor) -> float:
    """Distance in the Euclidean norm, relative to the truth's norm (absolute for a truth of zeros)."""
    assert got.shape == truth.shape
    return ((got.double() - truth).norm() / (truth.norm() if truth.any() else 1.0)).item()


def judge(names: Sequence[str], got: Sequence[Tensor], loop: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Every tensor is as near to the truth as the loop is, up to the ratio above, and finite."""
    ratios = MAX_RATIO_INTERPRETED if got[0].device.type == "cpu" else MAX_RATIO
    for name, g, by_loop, t in zip(names, got, loop, truth, strict=True):
        assert g.isfinite().all(), name
        allowed = max(ratios[dtype] * error(by_loop, t), FLOOR[dtype])
        assert error(g, t) <= allowed, f"{name}: error {error(g, t):.2e}, allowed {allowed:.2e}"


def value_and_grads(run: Callable[..., Tensor], leaves: Sequence[Tensor], grad: Tensor, owned: int | None = None) -> list[Tensor]:
    """run(*leaves) and its gradients; `owned` cuts the rows beyond, of the output and of the first leaf's gradient."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    out = run(*leaves)
    value, (first, *rest) = out.detach(), torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return [value[:owned], first[:owned], *rest]


def make_gather(ids: Sequence[Sequence[int]], num_experts: int, max_rows: int | None = None) -> tuple[Gather, Tensor]:
    """(plan, end offsets) by a Python loop over experts; an id of `num_experts` means no expert. Rows of nobody name choice 0."""
    top_k = len(ids[0]) if ids else 1
    flat = [e for choices in ids for e in choices]
    order = [choice for e in range(num_experts) for choice in range(len(flat)) if flat[choice] == e]
    rows = {choice: row for row, choice in enumerate(order)}
    kept = None if max_rows is None else torch.tensor([[e < num_experts for e in choices] for choices in ids]).view(-1, top_k)
    order += [0] * ((max_rows or len(order)) - len(order))
    rows_TK = torch.tensor([rows.get(choice, 0) for choice in range(len(flat))], dtype=torch.int64).view(-1, top_k)
    return Gather(torch.tensor(order, dtype=torch.int64), rows_TK, kept), ends_of([flat.count(e) for e in range(num_experts)])


def layer_inputs(
    num_tokens: int, top_k: int, num_experts: int, dim: int, hidden: int, dtype: torch.dtype, swiglu: bool
) -> tuple[list[Tensor], Tensor]:
    """([x, routing weights (fp32), up, up bias, down, down bias], gradient of the output)."""
    up = 2 * hidden if swiglu else hidden
    shapes = [(num_tokens, dim), (num_experts, up, dim), (num_experts, up), (num_experts, dim, hidden), (num_experts, dim)]
    x, *weights = [randn(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]
    routing = torch.rand(num_tokens, top_k, generator=torch.Generator().manual_seed(9))
    return [x, routing, *weights], randn(num_tokens, dim, seed=10, dtype=dtype)


LAYER_NAMES = ("y", "x", "routing", "up", "up_bias", "down", "down_bias")


def check_layer(leaves: list[Tensor], grad: Tensor, gather: Gather, offsets: Tensor, activation: str, dtype: torch.dtype) -> None:
    """The fused layer against the loop in fp64, measured by the loop in `dtype`."""

    def fused(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        return expert_layer(x, routing, gather, offsets, FfnWeights(*weights), activation)  # type: ignore[arg-type]

    def naive(x: Tensor, routing: Tensor, *weights: Tensor) -> Tensor:
        return expert_layer_naive(x, routing, gather, offsets, *weights, activation=activation).to(x.dtype)  # type: ignore[arg-type]

    got = value_and_grads(fused, leaves, grad)
    assert [g.dtype for g in got] == [dtype, dtype, torch.float32, *[dtype] * 4]
    truth = value_and_grads(naive, [leaf.double() for leaf in leaves], grad)
    judge(LAYER_NAMES, got, value_and_grads(naive, leaves, grad), truth, dtype)
