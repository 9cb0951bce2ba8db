"""Expert compute backends by name: pure functions on rows grouped by expert, one file each.

A backend is `run(rows_RD, offsets_E, up_EFD, up_bias_EF, down_EDF, down_bias_ED) -> rows_RD`, differentiable in all but the
offsets. Contract: rows of expert e are offsets[e-1]..offsets[e]-1, offsets are int32 and end at R (dropless; no padding
rows), all tensors have one dtype. An unusable backend is an error that says why; nothing is swapped silently.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from m2mkd_ds.moe.backends import grouped, reference

logger = logging.getLogger("m2mkd_ds")

Backend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
_BACKENDS = {"reference": reference, "grouped": grouped}


@cache
def get_backend(name: str, *, device: torch.device, dtype: torch.dtype, dim: int, hidden: int) -> Backend:
    """The backend `name`, or for `auto` the fastest that supports device, dtype, width `dim` and expert width `hidden`.

    Cached, so the choice of `auto` is logged once per combination. Raises ValueError with the reason if it cannot run.
    """
    if name != "auto" and name not in _BACKENDS:
        raise ValueError(f"moe.backend is {name!r}; allowed is one of {['auto', *_BACKENDS]}")
    module = grouped if name == "auto" else _BACKENDS[name]
    reason = module.why_not(device=device, dtype=dtype, dim=dim, hidden=hidden)
    if reason:
        raise ValueError(f"moe.backend={name} (the `{module.NAME}` backend) cannot run here: {reason}; use moe.backend=reference")
    if name == "auto":
        logger.info("moe.backend=auto: `%s` for %s, %s, width %d -> %d", module.NAME, device, dtype, dim, hidden)
    return module.run
