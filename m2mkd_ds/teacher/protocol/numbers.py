"""Hidden states as numbers on the wire: whole, cast to 16 bits, or as 8-bit integers with a scale; and back.

    fp32, bf16, fp16   a cast; values beyond the range of the type are refused before anything is sent (`largest`, `peaks`)
    int8               blocks of 128 neighbours of one token share a scale: x = q * scale, |q| <= 127; the error is at most half a scale,
                       largest |x| of the block / 254

Everything runs where the tensor lies. Shape letters: B images, L tokens, D width, K blocks a token (the last one may be shorter).
"""

from __future__ import annotations

import torch
from torch import Tensor

from m2mkd_ds.teacher.protocol.wire import TORCH_DTYPES, WireDtype

BLOCK = 128
"""Numbers that share a scale: one outlier spoils its block, not its token."""
_STEPS = 127


def to_wire(hidden_BLD: Tensor, wire_dtype: WireDtype) -> dict[str, Tensor]:
    """The hidden state as it travels, by suffix of its name: `` and, for int8, `.scale` (fp32 [B, L, K])."""
    if wire_dtype == "int8":
        quantised_BLD, scale_BLK = quantise(hidden_BLD)
        return {"": quantised_BLD, ".scale": scale_BLK}
    return {"": hidden_BLD.to(TORCH_DTYPES[wire_dtype])}


def from_wire(tensor: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """A hidden state [B, L, D] in `dtype`, from what `to_wire` made of it. `scale`: None unless it came as int8.

    Raises ValueError when scale and tensor do not belong together.
    """
    if scale is None:
        if tensor.dtype == torch.int8:
            raise ValueError("an int8 hidden state came without its scale")
        return tensor.to(dtype)
    expected = (*tensor.shape[:-1], num_blocks(tensor.shape[-1]))
    if tensor.dtype != torch.int8 or tuple(scale.shape) != expected:
        raise ValueError(
            f"a scale {list(scale.shape)} for a hidden state {list(tensor.shape)} of {tensor.dtype}; int8 has {list(expected)}, others none"
        )
    return (tensor.float() * _spread(scale, tensor.shape[-1])).to(dtype)


def num_blocks(width: int) -> int:
    """Scales of a token."""
    return -(-width // BLOCK)


def quantise(hidden_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [B, L, D] and its scales, fp32 [B, L, K], rounded to the nearest; a block of zeros has scale 0."""
    x_BLD = hidden_BLD.float()
    width = x_BLD.shape[-1]
    padded = torch.nn.functional.pad(x_BLD, (0, num_blocks(width) * BLOCK - width))
    scale_BLK = padded.unflatten(-1, (-1, BLOCK)).abs().amax(-1) / _STEPS
    divisor_BLD = _spread(torch.where(scale_BLK > 0, scale_BLK, 1.0), width)
    # The clamp is for blocks of numbers so small that their scale has lost bits.
    return (x_BLD / divisor_BLD).round_().clamp_(-_STEPS, _STEPS).to(torch.int8), scale_BLK


def peaks(tensor: Tensor) -> tuple[float, ...]:
    """Largest absolute value of every image, [B, ...] -> B numbers; nan or inf where one is not finite. Waits for the device."""
    least_B, most_B = torch.aminmax(tensor.detach().flatten(1), dim=1)
    return tuple(torch.maximum(-least_B, most_B).float().tolist())


def largest(wire_dtype: WireDtype) -> float:
    """Largest number that the wire type holds."""
    return torch.finfo(torch.float32 if wire_dtype == "int8" else TORCH_DTYPES[wire_dtype]).max


def bytes_of_hidden(num_tokens: int, width: int, wire_dtype: WireDtype) -> int:
    """Bytes of one image's hidden state on the wire."""
    scales = 4 * num_tokens * num_blocks(width) if wire_dtype == "int8" else 0
    return num_tokens * width * TORCH_DTYPES[wire_dtype].itemsize + scales


def _spread(scale_BLK: Tensor, width: int) -> Tensor:
    """A token's scales, each as often as it has numbers: [B, L, D]."""
    return scale_BLK.repeat_interleave(BLOCK, dim=-1)[..., :width]
