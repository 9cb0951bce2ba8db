"""The picture of `m2mkd plan`: memory of a rank by phase, in parts, with the line of what a rank has.

SVG ids are salted by a constant and carry no date: the same plan gives the same bytes.
"""

from __future__ import annotations

import io
from typing import Any

from m2mkd_ds.planner.ledger import PARTS
from m2mkd_ds.planner.run_plan import RunPlan

STYLE: dict[Any, Any] = {"svg.fonttype": "path", "svg.hashsalt": "m2mkd_ds", "font.size": 9}


def draw_run_plan(plan: RunPlan) -> str:
    """SVG text; phases that are refused have no bar."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [(phase.name, phase.memory) for phase in plan.phases if phase.memory is not None]
    names = [name for name, _ in shown]
    box = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.4 + 0.5 * len(names)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots()
        left = [0.0] * len(names)
        for part in PARTS:
            widths = [memory.parts[part] / 1e9 for _, memory in shown]
            axes.barh(names, widths, left=left, label=part)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axes.axvline(plan.cluster.usable_bytes / 1e9, color="black", linestyle="dashed", label="a rank has")
        axes.invert_yaxis()
        axes.set_xlabel(f"GB of a rank at its fullest moment, {plan.name} on {plan.cluster.ranks} ranks")
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.savefig(box, format="svg", metadata={"Date": None})
    return box.getvalue().decode()
