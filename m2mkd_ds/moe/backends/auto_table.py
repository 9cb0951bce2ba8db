"""Which backend `auto` takes: the first row of TABLE that fits device and dtype, and in it the first candidate that can run.

Every row says what was measured to order it; the numbers and the hardware are in docs/moe_backends.md. A row without a
measurement says so. Change a row only together with its measurement.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_HALF = (torch.bfloat16, torch.float16)


class Row(NamedTuple):
    """Candidates, best first, for a device type and dtypes."""

    device_type: str
    min_capability: tuple[int, int]
    """Least CUDA compute capability; (0, 0) for CPUs and for any."""
    dtypes: tuple[torch.dtype, ...]
    candidates: tuple[str, ...]
    basis: str
    """What the order rests on."""

    def fits(self, device_type: str, capability: tuple[int, int], dtype: torch.dtype) -> bool:
        return self.device_type == device_type and self.min_capability <= capability and dtype in self.dtypes


TABLE = (
    Row("cpu", (0, 0), (torch.float32,), ("fused", "loop"), "measured on an AMD EPYC, torch 2.14: as fast as `loop`, less memory"),
    Row("cpu", (0, 0), (torch.float64, *_HALF), ("fused", "loop"), "not measured; as for float32"),
    # pytorch issue 172439 (open): on a B200, grouped_mm gives weights of groups without rows a gradient that is not zero.
    Row("cuda", (10, 0), _HALF, ("loop", "reference"), "not measured; torch's grouped_mm is said to be wrong for idle experts here"),
    Row("cuda", (9, 0), _HALF, ("grouped", "loop"), "not measured; torch has a grouped kernel without host sync from 9.0 on"),
    Row("cuda", (0, 0), (torch.float32, *_HALF), ("loop", "reference"), "not measured; torch's grouped_mm is a loop with a host sync here"),
    Row("cuda", (0, 0), (torch.float64,), ("loop", "reference"), "not measured"),
)


def find_row(device_type: str, capability: tuple[int, int], dtype: torch.dtype) -> Row | None:
    """The first row that fits, or None."""
    return next((row for row in TABLE if row.fits(device_type, capability, dtype)), None)
