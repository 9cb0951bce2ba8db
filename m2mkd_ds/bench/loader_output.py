"""The rows of `m2mkd bench loader` as a table for the terminal, as Markdown, JSON and a plot; files are written whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from m2mkd_ds.bench.loader_plot import draw
from m2mkd_ds.bench.loader_rows import PEERS, LoaderRow, Range, Verdict, verdicts
from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result

SCHEMA = "m2mkd bench loader 1"
"""Stands in every result; a change of the fields' meaning is a new number. Fields: docs/benchmarks.md."""

COLUMNS: tuple[tuple[str, Callable[[LoaderRow], str]], ...] = (
    ("reader", lambda row: row.reader),
    ("workers", lambda row: str(row.workers)),
    ("img/s, clock", lambda row: _range(row.wall_images_per_s, ".0f")),
    ("img/CPU-s", lambda row: _range(row.cpu_images_per_s, ".0f")),
    ("% of limit", lambda row: "" if row.percent_of_limit is None else f"{row.percent_of_limit:.0f}"),
    ("first batch s", lambda row: _range(row.first_batch_s, ".2f")),
    ("resume s", lambda row: _range(row.resume_s, ".2f") or ("n/a" if row.reader in PEERS else "")),
    ("peak RSS MiB", lambda row: "" if row.peak_rss_bytes is None else f"{row.peak_rss_bytes / (1 << 20):.0f}"),
)


def render(result: dict[str, Any], rows: Sequence[LoaderRow]) -> str:
    """Tables for a terminal, one a recipe, notes and verdicts."""
    box = io.StringIO()
    console = Console(file=box, width=200, force_terminal=False, highlight=False)
    console.print(headline(result))
    for recipe, group in by_recipe(rows):
        table = Table(title=title(recipe, group), title_justify="left")
        for number, (heading, _) in enumerate(COLUMNS):
            table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
        for row in group:
            table.add_row(*cells(row))
        console.print(table)
    for line in [*notes(rows), *verdict_lines(verdicts(rows))]:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    return box.getvalue().rstrip()


def write_files(result: dict[str, Any], rows: Sequence[LoaderRow], folder: Path) -> list[Path]:
    """loader_cpu.json, .md and .svg; their paths."""
    stem = f"loader_{result['device']}"
    return write_result(folder, stem, result, to_markdown(result, rows, f"{stem}.svg"), draw(rows))


def to_markdown(result: dict[str, Any], rows: Sequence[LoaderRow], picture: str) -> str:
    """The same tables with where they come from."""
    lines = markdown_head(
        f"Input pipeline: {result['environment']['cpu']}", result, headline(result),
        "How to read this: [benchmarks.md](../benchmarks.md). Median (smallest to largest) of the rounds.",
        ("images per CPU second by reader and number of workers", picture),
    )  # fmt: skip
    for recipe, group in by_recipe(rows):
        lines += [f"## {title(recipe, group)}", "", *markdown_table([name for name, _ in COLUMNS], map(cells, group)), ""]
    lines += [*(f"- {line}" for line in notes(rows)), "", "## Targets", "", *(f"- {line}" for line in verdict_lines(verdicts(rows))), ""]
    return "\n".join(lines)


def headline(result: dict[str, Any]) -> str:
    """Shards and place in one line."""
    o, shards = result["options"], result["shards"]
    size = shards["image_bytes"]
    images = f"{shards['num_images']} images of {size['min'] // 1000} to {size['max'] // 1000} kB in {shards['num_shards']} shards"
    return (
        f"{images}, batches of {o['batch']}x3x{o['image_size']}x{o['image_size']}; {result['environment']['cpu']}; {result['wall_s']:.0f} s"
    )


def by_recipe(rows: Sequence[LoaderRow]) -> list[tuple[str, list[LoaderRow]]]:
    """Rows by recipe, in order."""
    return [(recipe, [row for row in rows if row.recipe == recipe]) for recipe in dict.fromkeys(row.recipe for row in rows)]


def title(recipe: str, group: Sequence[LoaderRow]) -> str:
    """Of a table."""
    what = {"crop": "random resized crop and flip", "randaugment": "random resized crop, flip and RandAugment"}[recipe]
    return f"{what}, {max(row.rounds for row in group)} rounds"


def cells(row: LoaderRow) -> list[str]:
    """One line of the table."""
    if not row.available:
        return [row.reader, str(row.workers), "not available", *[""] * (len(COLUMNS) - 3)]
    return [cell(row) for _, cell in COLUMNS]


def notes(rows: Sequence[LoaderRow]) -> list[str]:
    """What each reader is, and why a row is not available; each said once."""
    lines = [f"{row.reader}: {row.note}" for row in rows if row.note]
    lines += [f"{row.reader}, {row.workers} workers: not available: {row.reason}" for row in rows if not row.available]
    return list(dict.fromkeys(lines))


def verdict_lines(found: Sequence[Verdict]) -> list[str]:
    """Targets in words."""
    return [f"{'met' if one.met else 'MISSED'}: {one.what}: {one.value:.2f} (target {one.target:g})" for one in found]


def _range(value: Range | None, form: str) -> str:
    return "" if value is None else f"{value.median:{form}} ({value.min:{form}}-{value.max:{form}})"
