"""Error of a peer's output and gradients against fp64 on the same (rounded) numbers."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from m2mkd_ds.bench.cases import Case, Ran, ffn_cases
from m2mkd_ds.bench.layer_cases import layer_cases
from m2mkd_ds.bench.options import Level
from m2mkd_ds.bench.workload import Workload
from m2mkd_ds.distributed.world import World


@dataclass(frozen=True)
class Oracle:
    """What fp64 says: the output, and gradients by canonical name."""

    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Error:
    """Largest difference to fp64 over the largest value, of the output and of the worst gradient."""

    output: float
    gradient: float


def make_oracle(work: Workload, level: Level, world: World) -> Oracle:
    """Backend `reference` in fp64. The layer routes anew in fp64; a near-tie that it decided otherwise would show as a large error."""
    exact = _in_fp64(work)
    cases = ffn_cases(exact, ["reference"]) if level == "ffn" else layer_cases(exact, ["reference"], world)
    case = cases[0]
    assert isinstance(case, Case) and case.gradients is not None  # `reference` runs everywhere
    ran = case.forward()
    case.backward(ran.output)
    return Oracle(ran.output.detach(), case.gradients())


def error_of(case: Case, ran: Ran, oracle: Oracle) -> Error | None:
    """None for a case that computes something else (it drops tokens, or has weights of its own)."""
    if case.gradients is None:
        return None
    found = case.gradients()
    return Error(
        relative_error(ran.output.detach(), oracle.output),
        max(relative_error(gradient, oracle.gradients[name]) for name, gradient in found.items()),
    )


def relative_error(value: Tensor, exact: Tensor) -> float:
    """max |value - exact| / max |exact|, in fp64."""
    return float((value.double() - exact).abs().max() / exact.abs().max())  # host sync


def _in_fp64(work: Workload) -> Workload:
    return Workload(
        work.routing,
        work.options,
        copy.deepcopy(work.layer).double(),
        work.x_TD.double(),
        work.grad_TD.double(),
        work.expert_ids_TK,
        work.weights_TK.double(),
        work.plan,
        work.rows_RD.double(),
        work.grad_RD.double(),
    )
