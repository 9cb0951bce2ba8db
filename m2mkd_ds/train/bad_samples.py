"""Damaged training samples of a job: told by every rank, listed by rank 0, capped on all ranks at the same step.

    loader --(TeacherBatch.bad)--> loop --(the step's one sum: has any rank some?)--> BadSampleList.add --> FOLDER/bad_samples.jsonl

The loader puts another sample in the place of a damaged one, so steps and ranks stay in step; here is where it is seen. Every *use*
is a line; the cap counts different samples. On the good path nothing happens here: no collective, no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.distributed.world import World, barrier, broadcast_object, gather_object
from m2mkd_ds.logs import MetricsWriter, logger, read_metrics

FILE_NAME = "bad_samples.jsonl"


class BadDataError(ValueError):
    """More damaged samples than allowed; the message names cap, counts, the list and what to do. The same on every rank."""


def resolve_cap(max_bad_samples: int, num_images: int) -> int:
    """Different damaged samples that a phase may meet. -1: a thousandth of the images, at least 1 and at most 100."""
    return max_bad_samples if max_bad_samples >= 0 else min(100, max(1, num_images // 1000))


def lists_of_phase(folder: Path) -> list[Path]:
    """The lists of all jobs of a phase: its folder's, and those of single pairs. `folder`: of the phase, or of one pair of it."""
    phase = folder.parent if folder.name.startswith("pair_") else folder
    return sorted([*phase.glob(FILE_NAME), *phase.glob(f"pair_*/{FILE_NAME}")])


class BadSampleList:
    """The damaged samples of one job so far; equal on every rank. Making one is a collective call.

    A job that goes on from `start_step` finds what it has met before in the list, cut back to that step as the metrics are. `others`:
    lists of jobs that trained other pairs of the phase, on the same stream; what they met up to that step counts too.
    """

    def __init__(self, file: Path, *, cap: int, world: World, what: str, start_step: int, others: Sequence[Path] = ()) -> None:
        self.file, self.cap = file, cap
        self._world, self._what, self._start_step = world, what, start_step
        self._writer: MetricsWriter | None = None
        if world.is_main and file.exists():
            self._open()
        records = read_metrics(file) if world.is_main and file.exists() else []
        for other in others if world.is_main else ():
            records += [record for record in read_metrics(other) if other != file and record["step"] <= start_step]
        self._first: dict[int, dict[str, Any]] = broadcast_object({record["sample"]: record for record in reversed(records)})
        """The first record of each different sample, by sample number."""

    @property
    def total(self) -> int:
        """Different damaged samples."""
        return len(self._first)

    def add(self, step: int, found: Sequence[BadSample], lost: str = "") -> None:
        """Record what the ranks met in optimizer step `step` (counted from 1, as in metrics.jsonl). Collective: call it on every rank
        when any rank has something. Raises BadDataError on every rank, after the list is on disk, when the cap is passed, or when any
        rank could read no image at all (`lost` says why)."""
        mine = [{"step": step, "rank": self._world.rank, **asdict(bad)} for bad in found]
        gathered = gather_object((mine, lost))
        records = [record for theirs, _ in gathered for record in theirs]
        for record in records:
            new = record["sample"] not in self._first
            self._first.setdefault(record["sample"], record)
            if self._world.is_main:
                self._open().write(record)
                if new and record["substitute"] >= 0:
                    logger.warning("%s: damaged sample %d of at most %d: %s; sample %d takes its place", self._what, self.total, self.cap,
                                   record["message"], record["substitute"])  # fmt: skip
        if self._writer is not None:
            self._writer.sync()  # damaged samples are few, and a checkpoint of this step may be there before the list is closed
        reasons = [reason for _, reason in gathered if reason]
        if reasons or self.total > self.cap:
            self.close()
            barrier()  # a rank that ends makes the launcher end the others: rank 0 must have written by then
            if reasons:
                listed = f" {self.total} damaged samples ({self.summary()}) are listed in {self.file}." if self.total else ""
                raise BadDataError(
                    f"{self._what}: a batch could not be had at step {step}: {reasons[0]}.{listed} Check that the shards can be reached, "
                    "and them with `m2mkd shards verify`; no weight was changed in this step"
                )
            raise BadDataError(
                f"{self._what}: {self.total} training samples are damaged at step {step}, and data.max_bad_samples allows {self.cap} "
                f"({self.summary()}); they are listed in {self.file}: check the shards with `m2mkd shards verify`, or raise "
                "data.max_bad_samples"
            )

    def summary(self) -> str:
        """`undecodable 2, checksum 1; shard-000003.tar 3`: different samples by kind and by shard, most first."""
        counts = [Counter(record[key] for record in self._first.values()) for key in ("kind", "shard")]
        parts = [sorted(count.items(), key=lambda item: (-item[1], item[0])) for count in counts]
        kinds, shards = ([f"{name} {number}" for name, number in part] for part in parts)
        more = [f"{len(shards) - 10} more shards"] if len(shards) > 10 else []
        return f"{', '.join(kinds)}; {', '.join([*shards[:10], *more])}"

    def close(self) -> None:
        """Force the list to disk."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _open(self) -> MetricsWriter:
        if self._writer is None:
            self._writer = MetricsWriter(self.file, resume_step=self._start_step)
            # Whoever opens it again within this job must not cut off what it has written.
            self._start_step = 1 << 62
        return self._writer
