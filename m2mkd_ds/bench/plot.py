"""The picture of a result: tokens a second by peer and routing, with p10 to p90, and the dense network as a line."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from m2mkd_ds.bench.rows import Row


def draw(rows: Sequence[Row]) -> bytes | None:
    """PNG with one panel a level; None when no level has anything to show."""
    shown = [row for row in rows if row.available and row.tokens_per_s and row.total_ms and not row.peer.startswith("part:")]
    levels = list(dict.fromkeys(row.level for row in shown))
    if not levels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2 * len(levels)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = _colours(list(dict.fromkeys(row.peer for row in shown)))
    for axes, level in zip(figure.subplots(len(levels), 1, squeeze=False)[:, 0], levels, strict=True):
        _panel(axes, [row for row in shown if row.level == level], colours)
        axes.set_title({"ffn": "experts alone", "layer": "MoE layer", "a2a": "exchange", "step": "step of a teaching pair"}[level])
    box = io.BytesIO()
    figure.savefig(box, format="png", dpi=110)
    return box.getvalue()


def _panel(axes: Any, rows: Sequence[Row], colours: dict[str, Any]) -> None:
    """Groups of bars by routing; `dense` is a line over its group."""
    routings = list(dict.fromkeys(row.routing for row in rows))
    peers = list(dict.fromkeys(row.peer for row in rows if row.peer != "dense"))
    width = 0.8 / max(len(peers), 4)
    labelled: set[str] = set()
    for row in rows:
        assert row.tokens_per_s and row.total_ms
        group = routings.index(row.routing)
        label = None if row.peer in labelled else row.peer
        labelled.add(row.peer)
        if row.peer == "dense":
            axes.hlines(row.tokens_per_s, group - 0.45, group + 0.45, colors=colours["dense"], linestyles="dashed", label=label)
            continue
        # Tokens a second fall as the time grows: the 90th percentile of the time is the lower end.
        scale = row.tokens_per_s * row.total_ms.median
        ends = [[row.tokens_per_s - scale / row.total_ms.p90], [scale / row.total_ms.p10 - row.tokens_per_s]]
        place = group - 0.4 + width * (peers.index(row.peer) + 0.5)
        axes.bar(place, row.tokens_per_s, width * 0.9, yerr=ends, color=colours[row.peer], label=label, capsize=2)
    axes.set_xticks(range(len(routings)), routings)
    axes.set_ylabel("tokens / s, forward and backward")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _colours(peers: Sequence[str]) -> dict[str, Any]:
    from matplotlib import colormaps

    return {**{peer: colormaps["tab10"](number % 10) for number, peer in enumerate(p for p in peers if p != "dense")}, "dense": "black"}
