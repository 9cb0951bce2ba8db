"""Names of peers: which there are at a level, and which are measured when nobody chooses."""

from __future__ import annotations

from m2mkd_ds.bench.options import ExpertBench, Level, Routing
from m2mkd_ds.moe.backends import BACKENDS

SLOW = "reference"
"""Measured only when named: it defines correctness, in fp64, for the errors of the others."""


def names_at(level: Level) -> list[str]:
    """All peers of a level."""
    ours = list(BACKENDS)
    if level == "ffn":
        return ["gemm", "dense", *ours, "deepspeed_triton"]
    if level == "layer":
        foreign = ["deepspeed", "deepspeed_capacity", "tutel", "scattermoe"]
        return ["gemm", "dense", *ours, *foreign, "expert_parallel", "deepspeed_expert_parallel"]
    if level == "step":
        return ["dense", *ours]
    return ["all_to_all"]


def chosen(options: ExpertBench, level: Level, routing: Routing) -> list[str]:
    """The peers to measure at a level. Not named, `deepspeed_capacity` stands beside uneven loads only: else it drops nothing."""
    if options.peers:
        return [name for name in names_at(level) if name in options.peers or level == "a2a"]
    skipped = {SLOW} if routing in ("zipf", "run") else {SLOW, "deepspeed_capacity"}
    return [name for name in names_at(level) if name not in skipped]


def check(options: ExpertBench) -> None:
    """Raises ValueError for a peer that no level knows."""
    known = list(dict.fromkeys(name for level in ("layer", "ffn", "step", "a2a") for name in names_at(level)))
    unknown = [name for name in options.peers if name not in known]
    if unknown:
        raise ValueError(f"--peers {' '.join(unknown)}: allowed are {', '.join(known)}")
