"""Writes 12 shards slowly: `write_job.py OUT WORKERS`. Run by the tests that stop it in the middle.

With a third word, every process that comes to sample 100 kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import numpy as np

from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.samples import Sample

SHARDS, PER_SHARD = 12, 20
TOTAL = SHARDS * PER_SHARD


class SlowSamples:
    """Random bytes, each a hundredth of a second in the making."""

    def __init__(self, numbers: np.ndarray, pause_s: float, dies: bool) -> None:
        self.numbers, self.pause_s, self.dies = numbers, pause_s, dies

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, number: int) -> Sample:
        time.sleep(self.pause_s)
        if self.dies and self.numbers[number] == 100:
            os.kill(os.getpid(), signal.SIGKILL)
        random = np.random.default_rng(self.numbers[number])
        return Sample(random.bytes(1000), "png", int(random.integers(0, 3)), f"s{self.numbers[number]:04d}")

    def name_of(self, number: int) -> str:
        return f"slow {self.numbers[number]}"

    def subset(self, numbers: np.ndarray) -> SlowSamples:
        return SlowSamples(self.numbers[numbers], self.pause_s, self.dies)


def write(out: str, workers: int, pause_s: float = 0.01, dies: bool = False) -> None:
    """All of it."""
    samples = SlowSamples(np.arange(TOTAL), pause_s, dies)
    write_shards(
        samples,
        out,
        total=TOTAL,
        class_names=("a", "b", "c"),
        source="slow",
        license="MIT",
        samples_per_shard=PER_SHARD,
        content="v1",
        workers=workers,
    )


if __name__ == "__main__":
    write(sys.argv[1], int(sys.argv[2]), dies=len(sys.argv) > 3)
