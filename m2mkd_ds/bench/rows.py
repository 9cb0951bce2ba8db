"""From samples to the rows of the table: one for every peer, level and routing. All rates are those of the whole job.

Shape letters: R rows, D width, F expert hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from m2mkd_ds.bench.measure import Samples, Spread
from m2mkd_ds.bench.options import Level

FLOPS_PER_ROW = {"gelu": 12, "swiglu": 18}
"""Times D * F, forward and backward: every map costs 2 forward (multiply, add) and 4 backward (input and weight gradient); gelu's
experts have two maps, swiglu's three. Biases, activations, router and dispatch are not counted."""


@dataclass(frozen=True)
class Row:
    """One peer at one level and routing. A field is None where it has no meaning, or was not measured."""

    level: Level
    routing: str
    peer: str
    available: bool
    reason: str = ""
    """Why it is not available."""
    note: str = ""
    rounds: int = 0
    forward_ms: Spread | None = None
    backward_ms: Spread | None = None
    total_ms: Spread | None = None
    """Of the sums, round by round; of the slowest rank."""
    samples_ms: dict[str, list[float]] | None = None
    """`forward` and `backward` of every round."""
    tokens_per_s: float | None = None
    rows_per_s: float | None = None
    """Kept rows, forward and backward, a second."""
    useful_tflops: float | None = None
    """FLOPS_PER_ROW * kept rows * D * F / total time."""
    percent_of_dense: float | None = None
    """Useful TFLOP/s over those of the peer `dense`, same level, routing and run."""
    percent_of_gemm: float | None = None
    """Useful TFLOP/s over those of the peer `gemm` (the dense matmuls alone), same level, routing and run."""
    padding_ratio: float | None = None
    """Rows computed over rows kept; 1 is no padding."""
    drop_rate: float | None = None
    """Share of the routed rows that were dropped."""
    imbalance: float | None = None
    """Load of the busiest expert over the mean load."""
    load: list[int] | None = None
    """Routed rows of each expert, before any is dropped."""
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    overhead_share: float | None = None
    """(router + dispatch + combine, each timed alone) / layer; only of our layer, and not where a backend does them itself."""
    error_output: float | None = None
    error_gradient: float | None = None
    exchanged_bytes: int | None = None
    """a2a: bytes that a rank brings into one exchange, its own part included; the largest of the ranks."""
    algbw_gb_s: float | None = None
    """a2a: exchanged_bytes over the time of one exchange."""
    busbw_gb_s: float | None = None
    """a2a: the part of them that leaves the rank, over the time of one exchange."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; every field is there, also where it is None."""
        return asdict(self)


@dataclass(frozen=True)
class Local:
    """What one rank knows of one case; gathered from all ranks."""

    forward_ms: list[float]
    backward_ms: list[float]
    tokens: int
    kept_rows: int
    computed_rows: int
    load: list[int]
    peak_bytes: int
    saved_bytes: int
    error_output: float | None = None
    error_gradient: float | None = None


def merge(ranks: Sequence[Local]) -> Local:
    """The job's: times of the slowest rank round by round, sums of the work, the worst memory and error."""

    def slowest(name: str) -> list[float]:
        return [max(times) for times in zip(*(getattr(rank, name) for rank in ranks), strict=True)]

    def worst(name: str) -> float | None:
        values = [getattr(rank, name) for rank in ranks if getattr(rank, name) is not None]
        return max(values) if values else None

    return Local(
        slowest("forward_ms"),
        slowest("backward_ms"),
        sum(rank.tokens for rank in ranks),
        sum(rank.kept_rows for rank in ranks),
        sum(rank.computed_rows for rank in ranks),
        [sum(loads) for loads in zip(*(rank.load for rank in ranks), strict=True)],
        max(rank.peak_bytes for rank in ranks),
        max(rank.saved_bytes for rank in ranks),
        worst("error_output"),
        worst("error_gradient"),
    )


def useful_flops(kept_rows: int, dim: int, hidden: int, activation: str) -> int:
    """Forward and backward of the experts for the rows that count."""
    return FLOPS_PER_ROW[activation] * kept_rows * dim * hidden


def make_row(
    level: Level, routing: str, peer: str, note: str, job: Local, *, dim: int, hidden: int, activation: str, count_flops: bool = True
) -> Row:
    """The row of one case from what all ranks measured; shares of other peers are added by `with_shares`."""
    samples = Samples(job.forward_ms, job.backward_ms)
    total = Spread.of(samples.total_ms)
    seconds = total.median / 1e3
    routed, mean = sum(job.load), sum(job.load) / max(len(job.load), 1)
    flops = useful_flops(job.kept_rows, dim, hidden, activation)
    return Row(
        level,
        routing,
        peer,
        available=True,
        note=note,
        rounds=len(job.forward_ms),
        forward_ms=Spread.of(job.forward_ms),
        backward_ms=Spread.of(job.backward_ms),
        total_ms=total,
        samples_ms={"forward": job.forward_ms, "backward": job.backward_ms},
        tokens_per_s=job.tokens / seconds,
        rows_per_s=job.kept_rows / seconds if count_flops else None,
        useful_tflops=flops / seconds / 1e12 if count_flops else None,
        padding_ratio=job.computed_rows / job.kept_rows if count_flops else None,
        drop_rate=1 - job.kept_rows / routed if routed and count_flops else None,
        imbalance=max(job.load) / mean if routed else None,
        load=job.load or None,
        peak_bytes=job.peak_bytes,
        saved_bytes=job.saved_bytes,
        error_output=job.error_output,
        error_gradient=job.error_gradient,
    )


def with_shares(rows: Sequence[Row], own_parts: Sequence[str]) -> list[Row]:
    """Fill in what compares rows of one level and routing: percent of `dense` and of `gemm`, and the overhead of `own_parts` (names
    of our backends that leave router, dispatch and combine to the layer)."""
    by_peer = {row.peer: row for row in rows if row.available}
    dense, gemm = (by_peer[name].useful_tflops if name in by_peer else None for name in ("dense", "gemm"))
    parts = [row.total_ms.median for name, row in by_peer.items() if name.startswith("part:") and row.total_ms]
    filled = []
    for row in rows:
        if row.useful_tflops is not None:
            row = replace(
                row,
                percent_of_dense=100 * row.useful_tflops / dense if dense else None,
                percent_of_gemm=100 * row.useful_tflops / gemm if gemm else None,
            )
        if row.available and row.peer in own_parts and parts and row.total_ms:
            row = replace(row, overhead_share=sum(parts) / row.total_ms.median)
        filled.append(row)
    return filled
