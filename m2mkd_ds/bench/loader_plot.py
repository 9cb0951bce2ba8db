"""The picture of `m2mkd bench loader`: images per CPU second by reader and number of workers, with the range of the rounds.

SVG ids are salted by a constant and carry no date: the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from m2mkd_ds.bench.loader_rows import LoaderRow

STYLE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "m2mkd_ds", "font.size": 9}
NOT_SHOWN = ("raw_read",)
"""Fifty times as fast as what decodes: it would press everything else to the axis."""


def draw(rows: Sequence[LoaderRow]) -> str:
    """SVG with one panel a recipe; the decode limit is a line."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    recipes = list(dict.fromkeys(row.recipe for row in rows))
    limit = next((row for row in rows if row.reader == "decode_limit"), None)
    box = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 3.4 * len(recipes)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, recipe in zip(figure.subplots(len(recipes), 1, squeeze=False)[:, 0], recipes, strict=True):
            _panel(axes, [row for row in rows if row.recipe == recipe and row.reader not in NOT_SHOWN], limit)
            axes.set_title({"crop": "random resized crop, flip", "randaugment": "with RandAugment"}[recipe])
        figure.savefig(box, format="svg", metadata={"Date": None})
    return box.getvalue().decode()


def _panel(axes: Any, rows: Sequence[LoaderRow], limit: LoaderRow | None) -> None:
    """Groups of bars by number of workers."""
    workers = sorted({row.workers for row in rows})
    readers = [reader for reader in dict.fromkeys(row.reader for row in rows) if reader != "decode_limit"]
    width = 0.8 / max(len(readers), 1)
    for number, reader in enumerate(readers):
        shown = [(row.workers, row.cpu_images_per_s) for row in rows if row.reader == reader and row.cpu_images_per_s]
        places = [workers.index(at) - 0.4 + width * (number + 0.5) for at, _ in shown]
        heights = [rate.median for _, rate in shown]
        ends = [[rate.median - rate.min for _, rate in shown], [rate.max - rate.median for _, rate in shown]]
        axes.bar(places, heights, width * 0.9, yerr=ends, capsize=2, label=reader)
    if limit is not None and limit.cpu_images_per_s is not None:
        axes.axhline(limit.cpu_images_per_s.median, color="black", linestyle="dashed", label="decode_limit")
    axes.set_xticks(range(len(workers)), [f"{number} workers" for number in workers])
    axes.set_ylabel("images per CPU second")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
