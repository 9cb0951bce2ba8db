"""Random numbers as a function of a key: what augmentation draws depends on the use of a sample, never on worker or rank."""

from __future__ import annotations

import hashlib
import random
import struct

import numpy as np
import torch


class KeyedRandom:
    """Python's, numpy's and torch's CPU random numbers as a function of a key; the caller's streams are restored at exit.

    with KeyedRandom() as keyed:
        keyed.seed("sample", 0, 17)     # from here on, random / numpy.random / torch draw what this key says
    """

    def __enter__(self) -> KeyedRandom:
        self._python, self._numpy = random.getstate(), np.random.get_state()
        self._torch = torch.default_generator.get_state()
        return self

    def seed(self, purpose: str, *numbers: int) -> None:
        """Start the three generators from (purpose, numbers); numbers are taken modulo 2^64."""
        python_seed, torch_seed, numpy_seed = _seeds(purpose, numbers)
        random.seed(int.from_bytes(python_seed, "little"))
        np.random.seed(numpy_seed)
        # Not torch.manual_seed: before CUDA is initialised that queues one call with its traceback for every image.
        torch.default_generator.manual_seed(torch_seed)

    def seed_without_numpy(self, purpose: str, *numbers: int) -> None:
        """As `seed`, for what draws nothing from numpy: its generator is the slowest to start."""
        python_seed, torch_seed, _ = _seeds(purpose, numbers)
        random.seed(int.from_bytes(python_seed, "little"))
        torch.default_generator.manual_seed(torch_seed)

    def seed_numpy(self, purpose: str, *numbers: int) -> None:
        """As `seed`, for what draws from numpy alone."""
        np.random.seed(_seeds(purpose, numbers)[2])

    def __exit__(self, *exc: object) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.default_generator.set_state(self._torch)


def _seeds(purpose: str, numbers: tuple[int, ...]) -> tuple[bytes, int, int]:
    packed = struct.pack(f"<{len(numbers)}Q", *(number % 2**64 for number in numbers))
    digest = hashlib.blake2b(packed, digest_size=28, person=purpose.encode()).digest()
    python_seed, torch_seed, numpy_seed = struct.unpack("<16sQI", digest)
    return python_seed, torch_seed, numpy_seed
