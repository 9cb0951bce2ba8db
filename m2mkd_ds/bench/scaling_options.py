"""What `m2mkd bench scaling` can be asked. Standard library only: the command line reads this file for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from m2mkd_ds.bench import spelled

Workload = Literal["m2mkd", "end_to_end"]
Layout = Literal["zero1", "zero2", "zero2_ep"]
"""zero2_ep: ZeRO-2 with the experts spread over all ranks."""


@dataclass(frozen=True, kw_only=True)
class ScalingBench:
    """Ranks, layouts, sizes and how long to measure."""

    ranks: tuple[int, ...] = (1, 2, 4)
    """Numbers of CPU ranks, launched one after the other on this host."""
    threads_per_rank: int = 1
    """OMP_NUM_THREADS of a rank. Ranks times threads above the cores of the host share them, and the result says so."""
    workloads: tuple[Workload, ...] = ("m2mkd", "end_to_end")
    """m2mkd: all pairs in one job, teacher and meta model in the trainer. end_to_end: the whole student."""
    layouts: tuple[Layout, ...] = ("zero1", "zero2", "zero2_ep")
    """zero1, zero2: files of ds_configs/. zero2_ep: zero2 with ep_size = ranks."""
    micro_batch: int = 8
    """Images of a rank and step: fixed, so the batch of the job grows with the ranks (weak scaling)."""
    dim: int = 192
    """Width of the student; teacher and meta model have half of it."""
    experts: int = 8
    """Experts a block."""
    blocks: int = 1
    """Blocks of each of the two modules of student and teacher."""
    steps: int = 8
    """Timed steps of every workload and layout."""
    warm_up: int = 2
    """Steps before them."""
    quick: bool = False
    """1 and 2 ranks, few steps, no zero1: a look, in less than a minute."""
    out: Path | None = None
    """Folder for scaling_cpu.json, .md and .svg; without it, only the table is printed."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no measurement."""
        for name in ("threads_per_rank", "micro_batch", "dim", "experts", "blocks", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.warm_up < 0:
            raise ValueError(f"--warm-up is {self.warm_up}; give 0 or more steps")
        if not self.ranks or min(self.ranks) < 1 or len(set(self.ranks)) != len(self.ranks):
            raise ValueError(f"--ranks is {list(self.ranks)}; give different numbers of at least 1, for example 1 2 4")
        if not self.workloads or not self.layouts:
            raise ValueError("--workloads and --layouts need at least one name each")
        if self.dim % 64:
            raise ValueError(f"--dim is {self.dim}; it must be a multiple of 64: heads have 32 numbers, and the teacher half of the width")

    def resolved(self) -> ScalingBench:
        """With what --quick stands for."""
        if not self.quick:
            return self
        return replace(self, ranks=tuple(n for n in self.ranks if n <= 2) or self.ranks[:1], steps=min(self.steps, 4), warm_up=1,
                       layouts=tuple(x for x in self.layouts if x != "zero1") or self.layouts)  # fmt: skip

    def command(self) -> str:
        """The command line that asks for this; defaults are left out."""
        return spelled.command("scaling", self)
