"""The rows of `m2mkd bench memory`: predicted and measured memory of the fullest rank, as a table, as Markdown and as JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result

SCHEMA = "m2mkd bench memory 2"
"""Stands in every result; a change of the fields' meaning is a new number."""
TOLERANCE = 0.10
"""How far a prediction may be from what was measured."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one rank held in one phase; bytes."""

    steps_peak: int
    """The most in a training step, from the second one on."""
    between_steps: int
    """The least at the start of a step, from the second one on, or behind the last."""
    start_peak: int
    """The most before the first step: building the engines."""
    end_peak: int
    """The most behind the last step: evaluation and checkpoint."""
    resident_peak: int | None
    """VmHWM of the process in the same steps: Python, libraries and gloo's threads too. None: the system does not tell."""
    resident_before: int | None
    """Resident when the phase began."""


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One phase of a case; measured numbers are those of the rank that held the most."""

    case: str
    phase: str
    ranks: int
    stage: int
    ep_size: int
    precision: str
    micro_batch: int
    accumulation: int
    imbalance: float
    """Of the run: rows of the busiest expert over the mean, the mean of the blocks. The prediction is told."""
    predicted: int
    measured: Measured
    when: str
    """The moment that is predicted to be the fullest."""
    parts: dict[str, int]
    """Of the prediction."""

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured.steps_peak

    @property
    def met(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "ratio": self.ratio, "met": self.met}


def from_windows(windows: Sequence[Sequence[Any]], resident_peak: int | None, resident_before: int | None) -> Measured:
    """From the windows of `live_memory.watch`, marked `step N` and `evaluate`. Raises ValueError for a run of less than three steps."""
    peaks = {name: (int(at), int(peak)) for name, at, peak in windows}
    if "step 2" not in peaks or "evaluate" not in peaks:
        raise ValueError(f"the run had the windows {', '.join(peaks)}; three steps and an evaluation are needed")
    # A thread of gloo may let go of a step's last tensor a moment after the step: the lowest of three is what stays.
    at = [peaks[name][0] for name in ("step 1", "step 2", "evaluate")]
    return Measured(
        steps_peak=max(peaks[name][1] for name in ("step 1", "step 2")), between_steps=min(at),
        start_peak=peaks["start"][1], end_peak=peaks["evaluate"][1],
        resident_peak=resident_peak, resident_before=resident_before,
    )  # fmt: skip


COLUMNS: tuple[tuple[str, Callable[[MemoryRow], str]], ...] = (
    ("case", lambda row: row.case),
    ("phase", lambda row: row.phase),
    ("ranks", lambda row: str(row.ranks)),
    ("ZeRO", lambda row: str(row.stage)),
    ("ep", lambda row: str(row.ep_size)),
    ("precision", lambda row: row.precision),
    ("batch", lambda row: f"{row.micro_batch} x {row.accumulation}"),
    ("busiest", lambda row: f"{row.imbalance:.2f}"),
    ("predicted MB", lambda row: f"{row.predicted / 1e6:.1f}"),
    ("measured MB", lambda row: f"{row.measured.steps_peak / 1e6:.1f}"),
    ("ratio", lambda row: f"{row.ratio:.3f}"),
    ("resident MB", lambda row: "" if row.measured.resident_peak is None else f"{row.measured.resident_peak / 1e6:.0f}"),
    ("start MB", lambda row: f"{row.measured.start_peak / 1e6:.0f}"),
    ("end MB", lambda row: f"{row.measured.end_peak / 1e6:.0f}"),
    ("fullest", lambda row: row.when),
)


def render(rows: Sequence[MemoryRow]) -> str:
    """A table for a terminal, and the verdict."""
    out = io.StringIO()
    console = Console(file=out, width=200, force_terminal=False, highlight=False)
    table = Table()
    for number, (heading, _) in enumerate(COLUMNS):
        table.add_column(heading, justify="left" if number < 2 or heading == "fullest" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in COLUMNS))
    console.print(table)
    console.print(verdict(rows), soft_wrap=True)
    return out.getvalue().rstrip()


def verdict(rows: Sequence[MemoryRow]) -> str:
    """How far off the predictions were."""
    worst = max(rows, key=lambda row: abs(row.ratio - 1))
    missed = [f"{row.case}, {row.phase}" for row in rows if not row.met]
    kept = f"within {100 * TOLERANCE:.0f} % in all {len(rows)}" if not missed else f"MISSED in {'; '.join(missed)}"
    return f"predicted and measured peak: {kept}; the worst ratio is {worst.ratio:.3f} ({worst.case}, {worst.phase})"


def write_files(result: dict[str, Any], rows: Sequence[MemoryRow], folder: Path) -> list[Path]:
    """plan_memory_cpu.json and .md; their paths."""
    return write_result(folder, "plan_memory_cpu", result, to_markdown(result, rows))


def to_markdown(result: dict[str, Any], rows: Sequence[MemoryRow]) -> str:
    """The same table with where it comes from."""
    lines = markdown_head(
        f"Memory, predicted and measured: {result['environment']['cpu']}", result, f"{result['wall_s']:.0f} s",
        "Peak bytes of the fullest rank in a training step. Measured is the running total of torch's allocator, above what was before "
        "the phase; resident is VmHWM of the whole process. Start (building engines) and end (evaluation, checkpoint) are not predicted.",
    )  # fmt: skip
    lines += markdown_table([name for name, _ in COLUMNS], ([cell(row) for _, cell in COLUMNS] for row in rows))
    lines += ["", verdict(rows), ""]
    return "\n".join(lines)
