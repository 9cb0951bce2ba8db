"""Where the Triton kernels can run, and what every launch needs: device guard, precision of fp32 products, checks of tensors.

Importing this file imports no triton: TRITON_INTERPRET has to stand in the environment before triton is first imported.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)
HALF_SHARED_BYTES = 144 * 1024  # what the largest 16-bit tiles of the table take on GPUs of compute capability 8.0
MAX_MATRIX = 2**31 - 1  # elements of one group's matrix: offsets inside it are int32, offsets of rows and groups are int64


def interpreting() -> bool:
    """Whether triton runs (or, not yet imported, would run) kernels in its interpreter."""
    if "triton" in sys.modules:
        import triton

        return bool(triton.knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def why_not(device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels cannot run with this device and dtype, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype not in DTYPES:
        return f"the kernels compute in float32, bfloat16 or float16, given {dtype}"
    if interpreting():
        import numpy
        import triton
        import triton.language as tl
        from triton.runtime.jit import JITFunction

        if isinstance(tl.sum, JITFunction):
            return "TRITON_INTERPRET was set after triton had been imported; set it before the process starts"
        return interpreter_fault(triton.__version__, numpy.__version__)
    if device.type != "cuda":
        return f"triton needs a CUDA device, given {device.type!r}; set TRITON_INTERPRET=1 before the start to run its (slow) interpreter"
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        return f"the kernels need compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, {name} is older"
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = shared_bytes(index)
    if dtype != torch.float32 and shared < HALF_SHARED_BYTES:
        return (
            f"16-bit tiles need {HALF_SHARED_BYTES // 1024} KiB of shared memory a program; {torch.cuda.get_device_name(device)} allows "
            f"{shared // 1024} KiB: take float32 or another backend"
        )
    return ""


@lru_cache
def shared_bytes(index: int) -> int:
    """Shared memory that one program may have on CUDA device number `index`."""
    import triton

    return int(triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"])


def interpreter_fault(triton_version: str, numpy_version: str) -> str:
    """Why triton's interpreter cannot run with this numpy, or an empty string."""
    triton_release, numpy_release = (tuple(int(n) for n in version.split(".")[:2]) for version in (triton_version, numpy_version))
    if triton_release < (3, 7) and numpy_release >= (2, 4):
        return (
            f"the interpreter of triton {triton_version} fails with numpy {numpy_version} (it takes arrays of one element as numbers, "
            "which numpy 2.4 ended); take triton 3.7 or later, or numpy before 2.4"
        )
    return ""


@contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    if tensor.is_cuda:
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield


def dot_options(dtype: torch.dtype) -> dict[str, Any]:
    """Compile-time constants of every kernel with a dot product.

    PRECISION: fp32 products are exact IEEE ones unless torch's own matmul may use tf32.
    UPCAST: the interpreter keeps bf16 as 16-bit integers and would multiply those, so there the operands become fp32 first.
    """
    precision = "tf32" if dtype == torch.float32 and not interpreting() and torch_allows_tf32() else "ieee"
    return {"PRECISION": precision, "UPCAST": interpreting() and dtype == torch.bfloat16}


def torch_allows_tf32() -> bool:
    """Whether torch's fp32 matrix products may use tf32."""
    setting = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    if setting is None:
        return bool(torch.backends.cuda.matmul.allow_tf32)
    return bool(setting == "tf32")


def require(condition: bool, message: str) -> None:
    """ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_usable(tensor: Tensor) -> None:
    """ValueError with the reason if the kernels cannot run on the tensor; a meta tensor is let through, to prepare a launch.

    `Launch.run` refuses the meta tensor.
    """
    reason = "" if tensor.is_meta else why_not(tensor.device, tensor.dtype)
    require(not reason, reason)


def check_rows(name: str, rows: Tensor, device: torch.device, dtype: torch.dtype) -> None:
    """A matrix of the given device and dtype whose rows are contiguous (they may be apart, as in a slice)."""
    require(rows.dim() == 2, f"{name} has {rows.dim()} dimensions; it must be a matrix")
    require(rows.dtype == dtype, f"{name} is {rows.dtype}; it must be {dtype} like the other tensors")
    require(rows.device == device, f"{name} is on {rows.device}; it must be on {device} like the other tensors")
    require(rows.shape[1] <= 1 or rows.stride(1) == 1, f"{name} has stride {rows.stride(1)} inside a row; make it contiguous")


def check_offsets(offsets_G: Tensor, num_groups: int, device: torch.device) -> None:
    """int32 end offsets, one a group. Values are not looked at: that would wait for the GPU."""
    require(offsets_G.dtype == torch.int32, f"offsets are {offsets_G.dtype}; they must be int32")
    require(offsets_G.shape == (num_groups,), f"offsets have shape {tuple(offsets_G.shape)}; one end a group is needed, ({num_groups},)")
    require(offsets_G.is_contiguous(), "offsets must be contiguous")
    require(offsets_G.device == device, f"offsets are on {offsets_G.device}; they must be on {device} like the other tensors")


def check_row_index(index_R: Tensor, scale_N: Tensor | None, device: torch.device) -> None:
    """int64 numbers of rows, and fp32 scales that are looked up by them. Raises ValueError."""
    require(index_R.dtype == torch.int64, f"index is {index_R.dtype}; it must be int64")
    require(index_R.dim() == 1 and index_R.is_contiguous(), "index must be one contiguous vector")
    require(index_R.device == device, f"index is on {index_R.device}; it must be on {device} like the other tensors")
    if scale_N is not None:
        require(scale_N.dtype == torch.float32 and scale_N.is_contiguous(), f"scale is {scale_N.dtype}; it must be contiguous float32")
        require(scale_N.device == device, f"scale is on {scale_N.device}; it must be on {device} like the other tensors")


def row_major(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous in memory and do not overlap, else a contiguous copy."""
    usable = tensor.shape[1] <= 1 or tensor.stride(1) == 1
    spread = tensor.shape[0] <= 1 or tensor.stride(0) >= tensor.shape[1]
    return tensor if usable and spread else tensor.contiguous()


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator of a backward that cannot be differentiated itself: an error under create_graph=True.

    torch's `once_differentiable` lets it pass, with second-order terms silently missing, when the incoming gradient is a constant.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("the Triton kernels have no second-order gradients: call backward without create_graph=True")
        return backward(ctx, *grads)

    return guarded


def eager_only(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorator of an operator that torch.compile must not look into: it breaks the graph there and runs as without it.

    Not torch.compiler.disable at once: that imports the compiler, and the compiler triton, where this file is imported.
    """
    disabled: list[Callable[P, Tensor]] = []

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> Tensor:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **options)
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **options)

    return call


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is not below `value` (at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def cdiv(value: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-value // divisor)


@dataclass(frozen=True)
class Launch:
    """One kernel call, made ready and not yet run, so that a test can compile it for a GPU that is not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Tensor | int]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of triton's compiler; the interpreter has no use for them."""

    def compile_options(self) -> dict[str, Any]:
        """All options that the compiler gets."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **self.options}

    def run(self) -> None:
        """Enqueue it on the current stream of the tensors' device; an empty grid is no work. Raises ValueError for meta tensors."""
        if 0 in self.grid:
            return
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        require(not first.is_meta, "the kernels cannot run on meta tensors, which hold no values; they serve to prepare a launch")
        with on_device_of(first):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.compile_options())
