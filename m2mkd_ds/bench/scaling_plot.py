"""The picture of `m2mkd bench scaling`: images a second by ranks beside the line of perfect scaling, and the share of collectives.

SVG ids are salted by a constant and carry no date: the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from m2mkd_ds.bench.loader_plot import STYLE
from m2mkd_ds.bench.scaling_rows import ScalingRow


def draw(rows: Sequence[ScalingRow]) -> str:
    """SVG with one line of panels a workload."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    workloads = list(dict.fromkeys(row.workload for row in rows))
    box = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3 * len(workloads)), layout="constrained")
        FigureCanvasSVG(figure)
        for (speed, share), workload in zip(figure.subplots(len(workloads), 2, squeeze=False), workloads, strict=True):
            group = [row for row in rows if row.workload == workload]
            for layout in dict.fromkeys(row.layout for row in group):
                line = [row for row in group if row.layout == layout]
                ranks = [row.ranks for row in line]
                speed.plot(ranks, [row.images_per_s for row in line], marker="o", label=layout)
                share.plot(ranks, [100 * row.communication_share for row in line], marker="o", label=layout)
            first = next((row for row in group if row.ranks == 1), None)
            if first is not None:
                most = max(row.ranks for row in group)
                speed.plot([1, most], [first.images_per_s, most * first.images_per_s], "k--", label="perfect")
            for axes in (speed, share):
                axes.set_xticks(sorted({row.ranks for row in group}))
                axes.set_xlabel("ranks")
                axes.set_ylim(bottom=0)
                axes.set_title(workload)
            speed.set_ylabel("images a second")
            share.set_ylabel("% of a step in collectives")
            speed.legend(fontsize=8)
        figure.savefig(box, format="svg", metadata={"Date": None})
    return box.getvalue().decode()
