"""The randomness of a micro-batch's forward pass: a function of what is trained on what, so that no generator's state need be kept."""

from __future__ import annotations

import hashlib

import torch

SEED_RULE = "torch.manual_seed(first 8 bytes of blake2b('seed/phase/pair/first slot'), big-endian, halved) before each micro-batch"
"""What `seed_micro_batch` does. Stands in checkpoints: whoever changes the one changes the other, and old ones are then refused."""


def seed_micro_batch(seed: int, phase: str, pair: int, first_slot: int) -> None:
    """Make drop-path (and router noise) a function of (seed, phase, pair, slots), never of rank, resume or company."""
    digest = hashlib.blake2b(f"{seed}/{phase}/{pair}/{first_slot}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)
