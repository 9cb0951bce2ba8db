"""Bytes that a teacher server sends for one image, by kind of payload: what the tensors of its answers add up to."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

from m2mkd_ds.config import DataConfig

Payload = Literal["hidden", "image", "logits"]
KINDS: tuple[tuple[Payload, str], ...] = (
    ("hidden", "fp32"), ("hidden", "bf16"), ("hidden", "int8"), ("image", "-"), ("logits", "-"),
)  # fmt: skip
"""Payload and dtype of hidden states; fp16 is as large as bf16. `-`: no hidden states."""
WIRE_BYTES = {"fp32": 4, "bf16": 2}
INT8_BLOCK = 128
"""Numbers of a hidden state that share one fp32 scale with wire_dtype=int8."""


@dataclass(frozen=True)
class AnswerBytes:
    """Sizes of the answers of one run. Flips, boxes and coefficients of data.decode=fast (under 100 bytes an image) are left out."""

    data: DataConfig
    precision: str
    """Of the phase: logits travel in it."""
    tokens: int
    width: int

    def an_image(self, payload: Payload, wire_dtype: str, pairs: tuple[int, ...]) -> float:
        """Bytes of one image's share of an answer for `pairs`.

        hidden: a state for every pair but 0, targets in fp32, and for pair 0 what payload=image has. image: pixels and label. All of
        them: a row of logits a pair.
        """
        logits = len(pairs) * self.data.num_classes * WIRE_BYTES[self.precision]
        if payload == "logits":
            return logits
        if payload == "image":
            return self.image + logits
        states = sum(self.state(wire_dtype) for pair in pairs if pair > 0)
        return states + (self.image if 0 in pairs else 0) + 4 * self.data.num_classes + logits

    def state(self, wire_dtype: str) -> float:
        """One hidden state [L, D]."""
        if wire_dtype == "int8":
            return self.tokens * (self.width + 4 * ceil(self.width / INT8_BLOCK))
        return self.tokens * self.width * WIRE_BYTES[wire_dtype]

    @property
    def image(self) -> float:
        """Pixels and label: uint8 with data.decode=fast; else fp32 (mixing leaves no others) with the targets."""
        pixels, label = 3 * self.data.image_size**2, 8
        return label + (pixels if self.data.decode == "fast" else 4 * pixels + 4 * self.data.num_classes)
