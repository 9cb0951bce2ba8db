"""Rows as a table for the terminal, as Markdown and as JSON; the files are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m2mkd_ds.bench.measure import Spread
from m2mkd_ds.bench.plot import draw
from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result
from m2mkd_ds.bench.rows import Row

SCHEMA = "m2mkd bench experts 1"
"""Stands in every result; a change of the fields' meaning is a new number. Fields: docs/benchmarks.md."""


def render(result: dict[str, Any], rows: Sequence[Row]) -> str:
    """Tables for a terminal, one for every level and routing."""
    box = io.StringIO()
    console = Console(file=box, width=240, force_terminal=False)  # tables take what they need
    console.print(headline(result))
    for level, routing, group in grouped(rows):
        columns = _columns(group)
        table = Table(title=_title(level, routing, group), title_justify="left")
        for number, (heading, _) in enumerate(columns):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for row in group:
            if row.available:
                table.add_row(*(cell(row) for _, cell in columns))
            else:
                table.add_row(row.peer, "not available")
        console.print(table)
        for row in group:
            if not row.available:
                console.print(f"  {row.peer}: not available: {row.reason}", highlight=False)
            elif row.note:
                console.print(f"  {row.peer}: {row.note}", highlight=False)
    return box.getvalue().rstrip()


def write_files(result: dict[str, Any], rows: Sequence[Row], folder: Path) -> list[Path]:
    """JSON, Markdown and (where something was measured) the plot; their paths."""
    ranks = f"_{result['ranks']}ranks" if result["ranks"] > 1 else ""
    stem = f"experts_{result['device']}_{result['dtype']}{ranks}"
    return write_result(folder, stem, result, to_markdown(result, rows, f"{stem}.png"), draw(rows))


def to_markdown(result: dict[str, Any], rows: Sequence[Row], picture: str) -> str:
    """The same tables with where they come from."""
    lines = markdown_head(
        f"Expert throughput: {result['environment']['device']}, {result['dtype']}", result, headline(result),
        "How to read this: [benchmarks.md](../benchmarks.md). Times are milliseconds, median (p10 to p90).",
        ("tokens per second by peer and routing", picture) if draw_able(rows) else None,
    )  # fmt: skip
    for level, routing, group in grouped(rows):
        columns = _columns(group)
        lines += [f"## {_title(level, routing, group)}", ""]
        absent = ["not available", *[""] * (len(columns) - 2)]
        cells = ([cell(row) for _, cell in columns] if row.available else [row.peer, *absent] for row in group)
        lines += markdown_table([name for name, _ in columns], cells)
        notes = [
            f"- {row.peer}: {row.note if row.available else 'not available: ' + row.reason}" for row in group if row.note or row.reason
        ]
        lines += ["", *notes, ""] if notes else [""]
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """Sizes and place in one line."""
    o = result["options"]
    sizes = f"T={o['tokens']} tokens a rank, k={o['top_k']}, E={o['experts']}, D={o['dim']}, F={o['hidden']}, {o['activation']}"
    where = f"{result['environment']['device']}, {result['dtype']}, {result['environment']['threads']} threads, {result['ranks']} rank(s)"
    return f"{sizes}; {where}; {result['wall_s']:.0f} s"


def draw_able(rows: Sequence[Row]) -> bool:
    """Whether there is anything to plot."""
    return any(row.available and row.tokens_per_s and not row.peer.startswith("part:") for row in rows)


def grouped(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """Rows by level and routing, in order."""
    keys = dict.fromkeys((row.level, row.routing) for row in rows)
    return [(level, routing, [row for row in rows if (row.level, row.routing) == (level, routing)]) for level, routing in keys]


def _title(level: str, routing: str, group: Sequence[Row]) -> str:
    rounds = max((row.rounds for row in group), default=0)
    imbalance = next((f", busiest expert {row.imbalance:.2f} times the mean" for row in group if row.imbalance), "")
    return f"{level}, {routing} routing{imbalance}, {rounds} rounds"


Column = tuple[str, Callable[[Row], str]]


def _columns(group: Sequence[Row]) -> list[Column]:
    """The columns that any row of the group has something in."""
    columns: list[Column] = [
        ("peer", lambda row: row.peer),
        ("fwd ms", lambda row: _spread(row.forward_ms)),
        ("bwd ms", lambda row: _spread(row.backward_ms)),
        ("both ms", lambda row: _spread(row.total_ms)),
        ("tokens/s", lambda row: _number(row.tokens_per_s, ".0f")),
        ("rows/s", lambda row: _number(row.rows_per_s, ".0f")),
        ("TFLOP/s", lambda row: _number(row.useful_tflops, ".3g")),
        ("% dense", lambda row: _number(row.percent_of_dense, ".0f")),
        ("% gemm", lambda row: _number(row.percent_of_gemm, ".0f")),
        ("padding", lambda row: _number(row.padding_ratio, ".2f")),
        ("dropped", lambda row: _number(row.drop_rate, ".1%")),
        ("peak MiB", lambda row: _mebibytes(row.peak_bytes)),
        ("saved MiB", lambda row: _mebibytes(row.saved_bytes)),
        ("overhead", lambda row: _number(row.overhead_share, ".1%")),
        ("err out", lambda row: _number(row.error_output, ".1e")),
        ("err grad", lambda row: _number(row.error_gradient, ".1e")),
        ("MiB/exchange", lambda row: _mebibytes(row.exchanged_bytes)),
        ("algbw GB/s", lambda row: _number(row.algbw_gb_s, ".3g")),
        ("busbw GB/s", lambda row: _number(row.busbw_gb_s, ".3g")),
    ]
    return [column for number, column in enumerate(columns) if number < 2 or any(column[1](row) for row in group)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / (1 << 20):.1f}"


def _spread(value: Spread | None) -> str:
    """Whole milliseconds from 100 on, else three digits."""
    if value is None:
        return ""
    median, low, high = (f"{part:.0f}" if part >= 100 else f"{part:.3g}" for part in (value.median, value.p10, value.p90))
    return f"{median} ({low}-{high})"
