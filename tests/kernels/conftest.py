"""Where the kernels run: in triton's interpreter on the CPU, or compiled on a GPU."""

from __future__ import annotations

import pytest
import torch

from m2mkd_kernels import runtime


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The CPU under the interpreter (tests/conftest.py asks for it), else a CUDA device."""
    if runtime.interpreting():
        reason = runtime.why_not(torch.device("cpu"), torch.float32)
        if reason:
            pytest.skip(reason)
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device, and TRITON_INTERPRET=1 was not set at the start")
    return torch.device("cuda")
