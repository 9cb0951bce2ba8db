"""From the jobs of `m2mkd bench scaling` to rows (images a second, efficiency against one rank, share of collectives) and files."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from m2mkd_ds.bench.measure import Spread
from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result
from m2mkd_ds.bench.scaling import Measured

SCHEMA = "m2mkd bench scaling 1"
"""Stands in every result; a change of the fields' meaning is a new number."""


@dataclass(frozen=True, kw_only=True)
class ScalingRow:
    """One workload and layout on a number of ranks."""

    workload: str
    layout: str
    ranks: int
    ep_size: int
    cores_per_rank: float
    """Cores of the host over ranks; below the threads of a rank, ranks share cores."""
    step_s: Spread
    """Of the slowest rank."""
    images_per_s: float
    """Of the job, at the median step."""
    efficiency: float | None
    """images_per_s over ranks times those of one rank with the same stage of ZeRO; None: one rank was not measured."""
    core_efficiency: float | None
    """The same over what the cores of the host allow: ranks count only as long as each has the cores for its threads."""
    communication_share: float
    """Time inside collectives over the step, mean of the ranks: transport and waiting for others."""
    least_share: float
    """Of the rank that waited least: the better bound for transport alone."""
    collective_calls: int
    collective_mb: float
    """Handed to collectives by a rank in a step, 10^6 bytes."""
    parameters: int
    samples_s: list[float]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def make_rows(jobs: Sequence[Measured], micro_batch: int) -> list[ScalingRow]:
    """Rows by workload and layout, ranks ascending. Raises RuntimeError where collectives ran that were not measured."""
    rates: dict[tuple[str, str, int], float] = {(job.workload, job.layout, job.ranks): _rate(job, micro_batch) for job in jobs}
    rows = []
    for job in sorted(jobs, key=lambda job: (job.workload != "m2mkd", job.layout, job.ranks)):
        if job.unmeasured:
            raise RuntimeError(f"{job.workload}, {job.layout}: {job.unmeasured} asynchronous collectives a step, whose time is not known")
        one = rates.get((job.workload, job.layout.removesuffix("_ep"), 1))
        rate = rates[job.workload, job.layout, job.ranks]
        shares = [sum(inside) / sum(job.step_s) for inside in job.collective_s]
        usable = min(job.ranks, max(job.cores / job.threads, 1.0))
        rows.append(
            ScalingRow(
                workload=job.workload, layout=job.layout, ranks=job.ranks, ep_size=job.ep_size, cores_per_rank=job.cores / job.ranks,
                step_s=Spread.of(job.step_s), images_per_s=rate, efficiency=rate / (job.ranks * one) if one else None,
                core_efficiency=rate / (usable * one) if one else None, communication_share=sum(shares) / len(shares),
                least_share=min(shares), collective_calls=job.collective_calls, collective_mb=job.collective_bytes / 1e6,
                parameters=job.parameters, samples_s=job.step_s,
            )
        )  # fmt: skip
    return rows


def _rate(job: Measured, micro_batch: int) -> float:
    return micro_batch * job.ranks / median(job.step_s)


COLUMNS: tuple[tuple[str, Callable[[ScalingRow], str]], ...] = (
    ("workload", lambda row: row.workload),
    ("layout", lambda row: row.layout),
    ("ranks", lambda row: str(row.ranks)),
    ("cores/rank", lambda row: f"{row.cores_per_rank:g}"),
    ("step s", lambda row: f"{row.step_s.median:.3f} ({row.step_s.p10:.3f}-{row.step_s.p90:.3f})"),
    ("images/s", lambda row: f"{row.images_per_s:.1f}"),
    ("efficiency %", lambda row: _percent(row.efficiency)),
    ("of cores %", lambda row: _percent(row.core_efficiency)),
    ("in collectives %", lambda row: _percent(row.communication_share)),
    ("least rank %", lambda row: _percent(row.least_share)),
    ("calls", lambda row: str(row.collective_calls)),
    ("MB", lambda row: f"{row.collective_mb:.1f}"),
)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def render(result: dict[str, Any], rows: Sequence[ScalingRow]) -> str:
    """A table for a terminal."""
    out = io.StringIO()
    console = Console(file=out, width=180, force_terminal=False, highlight=False)
    console.print(headline(result), soft_wrap=True)
    table = Table()
    for number, (heading, _) in enumerate(COLUMNS):
        table.add_column(heading, justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for _, cell in COLUMNS))
    console.print(table)
    for line in notes(rows):
        console.print(line, soft_wrap=True)
    return out.getvalue().rstrip()


def headline(result: dict[str, Any]) -> str:
    """Sizes and place in one line."""
    o = result["options"]
    return (
        f"{o['micro_batch']} images a rank and step, student of width {o['dim']} with {o['experts']} experts a block, fp32, "
        f"{o['threads_per_rank']} thread(s) a rank; {result['environment']['cpu']}, {result['cores']} cores; {result['wall_s']:.0f} s"
    )


def notes(rows: Sequence[ScalingRow]) -> list[str]:
    """What has to be known to read the numbers."""
    shared = sorted({row.ranks for row in rows if row.core_efficiency != row.efficiency})
    lines = ["Time in collectives holds the waiting for slower ranks; the rank that waits least bounds transport from above."]
    if shared:
        ranks = ", ".join(map(str, shared))
        lines.append(f"With {ranks} ranks the host has fewer cores than threads: efficiency there says nothing about the network.")
    return lines


def write_files(result: dict[str, Any], rows: Sequence[ScalingRow], folder: Path) -> list[Path]:
    """scaling_cpu.json, .md and .svg; their paths."""
    from m2mkd_ds.bench.scaling_plot import draw

    return write_result(folder, "scaling_cpu", result, to_markdown(result, rows, "scaling_cpu.svg"), draw(rows))


def to_markdown(result: dict[str, Any], rows: Sequence[ScalingRow], picture: str) -> str:
    """The same table with where it comes from."""
    lines = markdown_head(
        f"Weak scaling: {result['environment']['cpu']}", result, headline(result),
        "How to read this: [benchmarks.md](../benchmarks.md). Steps are seconds, median (p10 to p90), of the slowest rank.",
        ("images a second and time in collectives by ranks", picture),
    )  # fmt: skip
    lines += markdown_table([name for name, _ in COLUMNS], ([cell(row) for _, cell in COLUMNS] for row in rows))
    lines += ["", *(f"- {line}" for line in notes(rows)), ""]
    return "\n".join(lines)
