"""LiveBytes: how many bytes of tensors are alive while code runs on the meta device, where shapes exist and numbers do not.

    with LiveBytes() as live:  loss = model(images).sum(); ...; loss.backward()      live.peak, live.now

Every storage that an operation makes is counted once, from its first appearance to its release, so views cost nothing and what autograd
saves counts as long as autograd keeps it. Two things are answered by the mode itself, because the meta device cannot:

- attention keeps its inputs, its output and one number a row (flash and memory-efficient kernels), never the [L, L] scores;
- what a kernel uses inside and gives back before it returns is not seen.

Shape letters: B images, H heads, L tokens, d width of a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes:
    """Counts while it is entered. What is there before (weights) is named in `given` and not counted, nor is any view of it."""

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()
        self._modes = (_CountedStorages(self), _Attention())
        for tensor in given:
            self._remember(tensor.untyped_storage(), 0)

    def __enter__(self) -> LiveBytes:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def take_peak(self) -> int:
        """The peak since the last call; the next one starts from what is alive now."""
        peak, self.peak = self.peak, self.now
        return peak

    def add(self, tensor: Tensor) -> None:
        """Count a tensor from now until it is released."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._known and tensor.device.type == "meta":
            self._remember(storage, storage.nbytes())

    def _remember(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        key = id(storage)
        self._known.add(key)
        # A storage's Python object lives exactly as long as the storage.
        weakref.finalize(storage, self._remove, key, num_bytes)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class _CountedStorages(TorchDispatchMode):
    def __init__(self, count: LiveBytes) -> None:
        super().__init__()
        self._count = count

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count.add(leaf)
        return result


class _Attention(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _FlashShapes.apply(*args[:3])
        return func(*args, **(kwargs or {}))


class _FlashShapes(torch.autograd.Function):
    """What a fused attention kernel allocates and keeps; its results lie as [B, L, H, d] in memory, as those kernels leave them."""

    @staticmethod
    def forward(ctx: Any, q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor) -> Tensor:
        out_BHLd = _like(q_BHLd)
        row_sums_BHL = torch.empty(q_BHLd.shape[:3], dtype=torch.float32, device=q_BHLd.device)
        ctx.save_for_backward(q_BHLd, k_BHLd, v_BHLd, out_BHLd, row_sums_BHL)
        return out_BHLd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q_BHLd, k_BHLd, v_BHLd, _, _ = ctx.saved_tensors
        return _like(q_BHLd), _like(k_BHLd), _like(v_BHLd)


def _like(x_BHLd: Tensor) -> Tensor:
    b, h, length, d = x_BHLd.shape
    return torch.empty(b, length, h, d, dtype=x_BHLd.dtype, device=x_BHLd.device).transpose(1, 2)
