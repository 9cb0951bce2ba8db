"""Expert compute backends by name, one file each; their contract is in `contract.py`. An unusable backend is an error that says
why; nothing is swapped silently."""

from __future__ import annotations

import logging
from functools import cache
from typing import cast

import torch

from m2mkd_ds.moe.backends import grouped, reference, triton
from m2mkd_ds.moe.backends.contract import Activation, Backend, ExpertWeights

__all__ = ["BACKENDS", "Activation", "Backend", "ExpertWeights", "get_backend"]

logger = logging.getLogger("m2mkd_ds")

BACKENDS: dict[str, Backend] = {
    "reference": cast(Backend, reference),
    "grouped": cast(Backend, grouped),
    "triton": cast(Backend, triton),
}


@cache
def get_backend(name: str, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int, activation: Activation = "gelu") -> Backend:
    """The backend `name`, or for `auto` the fastest that supports device, dtype, width `dim` and expert width `hidden`.

    Cached, so the choice of `auto` is logged once per combination. Raises ValueError with the reason if it cannot run.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"moe.backend is {name!r}; allowed is one of {['auto', *BACKENDS]}")
    backend = BACKENDS["grouped" if name == "auto" else name]
    reason = backend.why_not(device=device, dtype=dtype, dim=dim, hidden=hidden, activation=activation)
    if reason:
        raise ValueError(f"moe.backend={name} (the `{backend.NAME}` backend) cannot run here: {reason}; use moe.backend=reference")
    if name == "auto":
        logger.info("moe.backend=auto: `%s` for %s, %s, width %d -> %d", backend.NAME, device, dtype, dim, hidden)
    return backend
