"""From passes to the rows of `m2mkd bench loader`, and from rows to what the targets say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from m2mkd_ds.bench.loader_measure import Pass

FAST_OVER_PEERS, FAST_OF_LIMIT, FAST_OF_LIMIT_GOAL, PIL_OVER_PEERS, RESUME_S = 2.2, 0.8, 0.9, 1.4, 2.0
"""The targets. Rates are images per CPU second."""
PEERS = ("webdataset", "timm", "timm_prefetcher")


@dataclass(frozen=True)
class Range:
    """Median, smallest and largest of the rounds."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Range:
        """Of at least one value."""
        return Range(median(values), min(values), max(values))


@dataclass(frozen=True)
class LoaderRow:
    """One reader with one recipe and one number of workers. A field is None where nothing was measured."""

    recipe: str
    reader: str
    workers: int
    available: bool
    reason: str = ""
    """Why it is not available."""
    note: str = ""
    rounds: int = 0
    images: int | None = None
    """Images a pass."""
    wall_images_per_s: Range | None = None
    """A whole pass by the clock, filling the queues included, starting the workers not."""
    cpu_images_per_s: Range | None = None
    """Images per CPU second of the main process and all workers: what a core gives."""
    percent_of_limit: float | None = None
    """cpu_images_per_s over that of decode_limit."""
    first_batch_s: Range | None = None
    """From opening the folder to the first batch, start of the workers included."""
    resume_s: Range | None = None
    """Not from these shards: from opening the synthetic index to the first batch in the middle of an epoch. Peers cannot do it."""
    peak_rss_bytes: int | None = None
    """Main process and workers, added up; the largest of the rounds."""
    samples: dict[str, list[float]] | None = None
    """`wall_s`, `cpu_s`, `first_batch_s` and, where measured, `resume_s` of every round."""

    def to_json(self) -> dict[str, Any]:
        """Plain data; every field is there, also where it is None."""
        return asdict(self)


def make_row(
    recipe: str, reader: str, workers: int, note: str, passes: Sequence[Pass], resumes: Sequence[float], limit: float | None
) -> LoaderRow:
    """The row of one reader; `limit` is the median of decode_limit in images per CPU second."""
    rates = Range.of([one.images / one.cpu_s for one in passes])
    samples = {name: [getattr(one, name) for one in passes] for name in ("wall_s", "cpu_s", "first_batch_s")}
    return LoaderRow(
        recipe,
        reader,
        workers,
        available=True,
        note=note,
        rounds=len(passes),
        images=passes[0].images,
        wall_images_per_s=Range.of([one.images / one.wall_s for one in passes]),
        cpu_images_per_s=rates,
        percent_of_limit=100 * rates.median / limit if limit else None,
        first_batch_s=Range.of(samples["first_batch_s"]),
        resume_s=Range.of(resumes) if resumes else None,
        peak_rss_bytes=max(one.peak_rss_bytes for one in passes),
        samples={**samples, "resume_s": list(resumes)} if resumes else samples,
    )


@dataclass(frozen=True)
class Verdict:
    """One target and what was measured."""

    what: str
    value: float
    target: float
    met: bool


def verdicts(rows: Sequence[LoaderRow]) -> list[Verdict]:
    """Every target of the recipe `crop` whose rows are there, at each number of workers; the same rounds stand on both sides."""
    found: list[Verdict] = []
    rates = {(row.reader, row.workers): row.cpu_images_per_s.median for row in rows if row.recipe == "crop" and row.cpu_images_per_s}
    limit = rates.get(("decode_limit", 0))
    for ours, target in (("fast", FAST_OVER_PEERS), ("fast_device", FAST_OVER_PEERS), ("pil", PIL_OVER_PEERS)):
        for workers in sorted({number for reader, number in rates if reader == ours}):
            for peer in PEERS:
                if (peer, workers) in rates:
                    value = rates[ours, workers] / rates[peer, workers]
                    found.append(Verdict(f"{ours} / {peer}, {workers} workers, images per CPU second", value, target, value >= target))
            if limit and ours == "fast":
                value = rates[ours, workers] / limit
                what = f"{ours} / decode_limit, {workers} workers, images per CPU second (goal {FAST_OF_LIMIT_GOAL})"
                found.append(Verdict(what, value, FAST_OF_LIMIT, value >= FAST_OF_LIMIT))
    for row in rows:
        # A worker's start (an interpreter that imports torch) is a run's, not resuming's.
        if row.recipe == "crop" and row.resume_s and row.workers == 0:
            value = row.resume_s.median
            found.append(Verdict(f"{row.reader}: seconds to resume in the synthetic index", value, RESUME_S, value <= RESUME_S))
    return found
