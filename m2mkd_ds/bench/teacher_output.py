"""The rows of `m2mkd bench teacher` as tables for the terminal, as Markdown, JSON and a plot; files are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m2mkd_ds.bench.loader_rows import Range
from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result
from m2mkd_ds.bench.teacher_plot import draw
from m2mkd_ds.bench.teacher_rows import StepRow, TransferRow, Verdict, verdicts

SCHEMA = "m2mkd bench teacher 1"
"""Stands in every result; a change of the fields' meaning is a new number. Fields: docs/benchmarks.md."""

TRANSFERS: tuple[tuple[str, Callable[[TransferRow], str]], ...] = (
    ("way", lambda row: row.peer),
    ("GB/s", lambda row: _range(row.gb_per_s, ".2f")),
    ("client CPU-ms", lambda row: _range(row.client_cpu_ms, ".1f")),
    ("server CPU-ms", lambda row: _range(row.server_cpu_ms, ".1f")),
    ("p50 ms", lambda row: _number(row.latency_p50_ms, ".1f")),
    ("p99 ms", lambda row: _number(row.latency_p99_ms, ".1f")),
    ("of", lambda row: _number(row.num_latencies, "d")),
)
STEPS: tuple[tuple[str, Callable[[StepRow], str]], ...] = (
    ("feed", lambda row: row.feed),
    ("img/s", lambda row: _range(row.images_per_s, ".1f")),
    ("waiting %", lambda row: _range(row.wait_share, ".2f", 100)),
    ("in feed %", lambda row: _range(row.feed_share, ".2f", 100)),
    ("step without feed ms", lambda row: _range(row.step_ms, ".0f")),
    ("producer ms", lambda row: _range(row.pace_ms, ".0f")),
    ("producer / trainer", lambda row: _range(row.headroom, ".2f")),
)
Block = tuple[str, list[str], list[list[str]]]
"""Title, headings, lines of cells."""


def render(result: dict[str, Any], transfers: Sequence[TransferRow], steps: Sequence[StepRow]) -> str:
    """Tables for a terminal, notes and verdicts."""
    box = io.StringIO()
    console = Console(file=box, width=200, force_terminal=False, highlight=False)
    console.print(headline(result))
    for title, headings, lines in blocks(result, transfers, steps):
        table = Table(title=title, title_justify="left")
        for number, heading in enumerate(headings):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for text in [*notes(transfers, steps), *verdict_lines(verdicts(transfers, steps, result["options"]["headroom"]))]:
        console.print(f"  {text}", markup=False, soft_wrap=True)
    return box.getvalue().rstrip()


def write_files(result: dict[str, Any], transfers: Sequence[TransferRow], steps: Sequence[StepRow], folder: Path) -> list[Path]:
    """teacher_cpu.json, .md and .svg; their paths."""
    stem = f"teacher_{result['device']}"
    return write_result(folder, stem, result, to_markdown(result, transfers, steps, f"{stem}.svg"), draw(transfers))


def to_markdown(result: dict[str, Any], transfers: Sequence[TransferRow], steps: Sequence[StepRow], picture: str) -> str:
    """The same tables with where they come from."""
    lines = markdown_head(
        f"How teacher outputs travel: {result['environment']['cpu']}", result, headline(result),
        "How to read this: [benchmarks.md](../benchmarks.md). Median (smallest to largest) of the rounds; latencies are of all rounds.",
        ("GB a second and CPU time a batch by way", picture),
    )  # fmt: skip
    for title, headings, rows in blocks(result, transfers, steps):
        lines += [f"## {title}", "", *markdown_table(headings, rows), ""]
    lines += [f"- {text}" for text in notes(transfers, steps)]
    found = verdicts(transfers, steps, result["options"]["headroom"])
    lines += ["", "## Ratios and targets", "", *(f"- {text}" for text in verdict_lines(found)), ""]
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """What travels, and where, in one line."""
    o = result["options"]
    return (
        f"batches of {result['batch_bytes'] / 1e6:.1f} MB: hidden states {o['images']}x{o['tokens']}x{o['width']} bf16, logits, targets; "
        f"{result['environment']['cpu']}, {result['cores']} cores; {result['wall_s']:.0f} s"
    )


def blocks(result: dict[str, Any], transfers: Sequence[TransferRow], steps: Sequence[StepRow]) -> list[Block]:
    """The tables."""
    o = result["options"]
    rounds = max((row.rounds for row in transfers), default=0)
    title = f"Transfer, {o['in_flight']} requests under way ({o['batches']} batches a round), latency with one; {rounds} rounds"
    found: list[Block] = [(title, [heading for heading, _ in TRANSFERS], [transfer_cells(row) for row in transfers])]
    if steps:
        rounds = max((row.rounds for row in steps), default=0)
        title = f"Training step of {o['step_images']} images at width {o['step_width']}, fp32, one thread; {o['steps']} steps a round, "
        found.append((title + f"{rounds} rounds", [heading for heading, _ in STEPS], [step_cells(row) for row in steps]))
    return found


def transfer_cells(row: TransferRow) -> list[str]:
    """One line of the first table."""
    return [cell(row) for _, cell in TRANSFERS] if row.available else [row.peer, "not available", *[""] * (len(TRANSFERS) - 2)]


def step_cells(row: StepRow) -> list[str]:
    """One line of the second table."""
    return [cell(row) for _, cell in STEPS] if row.available else [row.feed, "not available", *[""] * (len(STEPS) - 2)]


def notes(transfers: Sequence[TransferRow], steps: Sequence[StepRow]) -> list[str]:
    """What each row is, and why one is not available."""
    named = [(row.peer, row) for row in transfers] + [(f"step with {row.feed}", row) for row in steps]
    return [f"{name}: {row.note}" if row.available else f"{name}: not available: {row.reason}" for name, row in named]


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    """Targets in words."""
    lines = []
    for one in found:
        word = "ratio" if one.target is None else {None: "not tested", True: "met", False: "MISSED"}[one.met]
        value = "" if one.value is None else f": {one.value:.3f}"
        lines.append(f"{word}: {one.what}{value}" + ("" if one.target is None else f" (target {one.target:g})"))
    return lines


def _range(value: Range | None, form: str, factor: float = 1) -> str:
    if value is None:
        return ""
    median, least, most = (format(factor * part, form) for part in (value.median, value.min, value.max))
    return f"{median} ({least}-{most})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
