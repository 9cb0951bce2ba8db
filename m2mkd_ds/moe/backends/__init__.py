"""Expert compute backends by name, one file each; their contract is in `contract.py`. An unusable backend is an error that says
why; nothing is swapped silently. `auto` picks from `auto_table.py` and logs what it picked and why."""

from __future__ import annotations

import logging
from functools import cache
from typing import cast

import torch

from m2mkd_ds.moe.backends import fused, grouped, loop, padded, reference, triton, tutel_dispatch
from m2mkd_ds.moe.backends.auto_table import find_row
from m2mkd_ds.moe.backends.contract import Activation, Backend, ExpertWeights

__all__ = ["BACKENDS", "Activation", "Backend", "ExpertWeights", "get_backend"]

logger = logging.getLogger("m2mkd_ds")

BACKENDS: dict[str, Backend] = {
    "reference": cast(Backend, reference),
    "loop": cast(Backend, loop),
    "grouped": cast(Backend, grouped),
    "padded": cast(Backend, padded),
    "fused": cast(Backend, fused),
    "triton": cast(Backend, triton),
    "tutel_dispatch": cast(Backend, tutel_dispatch),
}


@cache
def get_backend(name: str, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation = "gelu") -> Backend:
    """The backend `name`, or for `auto` the table's choice for device, dtype, width `dim` and expert width `hidden`.

    Cached, so the choice of `auto` is logged once per combination. Raises ValueError with the reason if it cannot run.
    """
    if name == "auto":
        return _choose(device, dtype, dim, hidden, activation)
    if name not in BACKENDS:
        raise ValueError(f"moe.backend is {name!r}; allowed is one of {['auto', *BACKENDS]}")
    reason = BACKENDS[name].why_not(device=device, dtype=dtype, dim=dim, hidden=hidden, activation=activation)
    if reason:
        raise ValueError(f"moe.backend={name} cannot run here: {reason}; use moe.backend=auto or reference")
    return BACKENDS[name]


def _choose(device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation) -> Backend:
    """The first candidate of the table's row that can run. Raises ValueError if there is none."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    row = find_row(device.type, capability, dtype)
    if row is None:
        raise ValueError(f"moe.backend=auto knows no backend for {device.type} and {dtype}; name one of {list(BACKENDS)}")
    reasons: list[str] = []
    for name in row.candidates:
        reason = BACKENDS[name].why_not(device=device, dtype=dtype, dim=dim, hidden=hidden, activation=activation)
        if not reason:
            passed = "".join(f"; not {r}" for r in reasons)
            logger.info("moe.backend=auto: `%s` for %s, %s, width %d -> %d (%s%s)", name, device, dtype, dim, hidden, row.basis, passed)
            return BACKENDS[name]
        reasons.append(f"`{name}`: {reason}")
    raise ValueError(f"moe.backend=auto: none of its candidates can run here ({'; '.join(reasons)}); use moe.backend=reference")
