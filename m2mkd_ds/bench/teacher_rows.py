"""From passes to the rows of `m2mkd bench teacher`, and from rows to what the targets say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

from m2mkd_ds.bench.loader_rows import Range
from m2mkd_ds.bench.teacher_measure import Moved
from m2mkd_ds.bench.teacher_options import Feed, Peer
from m2mkd_ds.bench.teacher_step import Trained

RATIOS: tuple[tuple[Peer, Peer, float | None, str], ...] = (
    ("shm", "ring", 0.8, ""),
    ("remote", "tcp", 0.6, "goal 0.8"),
    ("remote", "flight", 1.0, ""),
    ("remote", "flight_joined", 1.0, ""),
    ("remote_mtls", "flight_mtls", None, ""),
)
"""Ours, the floor, the target of the ratio of their GB/s (None: for information), a word on it."""
WAIT_SHARE = 0.02
"""Of a step, with a producer that is `headroom` times as fast as the trainer."""
HEADROOM_SLACK = 0.05
"""A round counts for that target if its producer turned out at least `headroom` less this much times as fast: the machine may change its
speed between setting the pace and training."""


@dataclass(frozen=True)
class TransferRow:
    """One way for a batch to travel. A field is None where nothing was measured."""

    peer: Peer
    available: bool
    reason: str = ""
    """Why it is not available."""
    note: str = ""
    rounds: int = 0
    batches: int | None = None
    """A round."""
    batch_bytes: int | None = None
    checked: int = 0
    """Batches that were compared byte by byte with what was sent, before anything was timed."""
    gb_per_s: Range | None = None
    """10^9 bytes a second by the clock, with `in_flight` requests under way."""
    client_cpu_ms: Range | None = None
    """Milliseconds of CPU a batch in the process that receives, all threads."""
    server_cpu_ms: Range | None = None
    """The same in the process that sends."""
    latency_p50_ms: float | None = None
    """From asking to having all bytes, with one request under way; of all rounds together."""
    latency_p99_ms: float | None = None
    num_latencies: int | None = None
    samples: dict[str, list[float]] | None = None
    """`wall_s`, `client_cpu_s`, `server_cpu_s` of every round, and all `latency_s`."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; every field is there, also where it is None."""
        return asdict(self)


@dataclass(frozen=True)
class StepRow:
    """Training with one feed."""

    feed: Feed
    available: bool
    reason: str = ""
    note: str = ""
    rounds: int = 0
    steps: int | None = None
    """A round."""
    images_per_s: Range | None = None
    feed_share: Range | None = None
    """Of the time, what passes within the feed's `batch`: for colocated, the teacher's own work."""
    wait_share: Range | None = None
    """Of the time, what the feed reports as waiting for its server."""
    step_ms: Range | None = None
    """Median of a round's steps without their feed."""
    pace_ms: Range | None = None
    """What the producer takes for a batch, as set for each round."""
    headroom: Range | None = None
    """step_ms over pace_ms as they turned out: how much faster than the trainer's own work the producer was."""
    samples: dict[str, list[float]] | None = None
    """`wall_s`, `feed_s`, `wait_s`, `step_s` and, where there is one, `pace_s` of every round."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; every field is there, also where it is None."""
        return asdict(self)


def transfer_row(peer: Peer, note: str, checked: int, passes: Sequence[Moved]) -> TransferRow:
    """The row of one way."""
    latencies = [latency for one in passes for latency in one.latencies_s]
    return TransferRow(
        peer,
        available=True,
        note=note,
        rounds=len(passes),
        batches=passes[0].batches,
        batch_bytes=passes[0].num_bytes,
        checked=checked,
        gb_per_s=Range.of([one.batches * one.num_bytes / one.wall_s / 1e9 for one in passes]),
        client_cpu_ms=Range.of([1e3 * one.client_cpu_s / one.batches for one in passes]),
        server_cpu_ms=Range.of([1e3 * one.server_cpu_s / one.batches for one in passes]),
        latency_p50_ms=1e3 * percentile(latencies, 50),
        latency_p99_ms=1e3 * percentile(latencies, 99),
        num_latencies=len(latencies),
        samples={
            **{name: [getattr(one, name) for one in passes] for name in ("wall_s", "client_cpu_s", "server_cpu_s")},
            "latency_s": latencies,
        },
    )


def step_row(feed: Feed, note: str, passes: Sequence[Trained]) -> StepRow:
    """The row of one feed."""
    paces = [one.pace_s for one in passes if one.pace_s is not None]
    samples = {name: [getattr(one, name) for one in passes] for name in ("wall_s", "feed_s", "wait_s", "step_s")}
    return StepRow(
        feed,
        available=True,
        note=note,
        rounds=len(passes),
        steps=passes[0].steps,
        images_per_s=Range.of([one.steps * one.images / one.wall_s for one in passes]),
        feed_share=Range.of([one.feed_s / one.wall_s for one in passes]),
        wait_share=Range.of([one.wait_s / one.wall_s for one in passes]),
        step_ms=Range.of([1e3 * one.step_s for one in passes]),
        pace_ms=Range.of([1e3 * pace_s for pace_s in paces]) if paces else None,
        headroom=Range.of([one.step_s / one.pace_s for one in passes if one.pace_s]) if paces else None,
        samples={**samples, "pace_s": paces} if paces else samples,
    )


def percentile(values: Sequence[float], percent: int) -> float:
    """Between the two nearest samples; with fewer than a hundred, the 99th lies close to the largest."""
    return values[0] if len(values) == 1 else quantiles(values, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured."""

    what: str
    value: float | None
    """None: nothing that counts was measured."""
    target: float | None
    """None: for information."""
    met: bool | None


def verdicts(transfers: Sequence[TransferRow], steps: Sequence[StepRow], headroom: float) -> list[Verdict]:
    """Every ratio and target whose rows are there; medians of the same rounds stand on both sides. `headroom`: as asked for."""
    found: list[Verdict] = []
    rows = {row.peer: row for row in transfers if row.available}
    for ours, floor, target, word in RATIOS:
        if ours in rows and floor in rows:
            one, other = rows[ours], rows[floor]
            assert one.gb_per_s and other.gb_per_s
            value = one.gb_per_s.median / other.gb_per_s.median
            what = f"{ours} / {floor}, GB/s" + (f" ({word})" if word else "")
            what += f"; CPU-ms a batch, both sides: {_cpu_ms(one):.1f} against {_cpu_ms(other):.1f}"
            found.append(Verdict(what, value, target, None if target is None else value >= target))
    return found + [_waiting(row, headroom - HEADROOM_SLACK) for row in steps if row.available and row.feed != "colocated"]


def _waiting(row: StepRow, least: float) -> Verdict:
    """Of the rounds in which the producer was fast enough; without any, nothing is said."""
    assert row.samples is not None
    columns = [row.samples[name] for name in ("wait_s", "wall_s", "step_s", "pace_s")]
    shares = [wait_s / wall_s for wait_s, wall_s, step_s, pace_s in zip(*columns, strict=True) if step_s / pace_s >= least]
    what = f"{row.feed}: share of a training step spent waiting (at most)"
    what += f", {len(shares)} of {row.rounds} rounds with a producer {least:.2f} times as fast as the trainer or faster"
    if not shares:
        return Verdict(what, None, WAIT_SHARE, None)
    value = median(shares)
    return Verdict(what, value, WAIT_SHARE, value < WAIT_SHARE)


def _cpu_ms(row: TransferRow) -> float:
    assert row.client_cpu_ms and row.server_cpu_ms
    return row.client_cpu_ms.median + row.server_cpu_ms.median
