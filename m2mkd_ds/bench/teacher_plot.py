"""The picture of `m2mkd bench teacher`: GB a second by way, and CPU time a batch of both sides.

SVG ids are salted by a constant and carry no date: the same rows give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from m2mkd_ds.bench.loader_plot import STYLE
from m2mkd_ds.bench.teacher_options import OURS
from m2mkd_ds.bench.teacher_rows import TransferRow


def draw(rows: Sequence[TransferRow]) -> str:
    """SVG with two panels; our own ways stand out."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    shown = [row for row in rows if row.gb_per_s and row.client_cpu_ms and row.server_cpu_ms]
    names = [row.peer for row in shown]
    box = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        FigureCanvasSVG(figure)
        speed, cpu = figure.subplots(1, 2)
        rates = [row.gb_per_s for row in shown if row.gb_per_s]
        ends = [[rate.median - rate.min for rate in rates], [rate.max - rate.median for rate in rates]]
        colours = ["tab:blue" if name in OURS else "tab:gray" for name in names]
        speed.barh(names, [rate.median for rate in rates], xerr=ends, color=colours, capsize=2)
        speed.set_xlabel("GB/s (blue: ours)")
        client = [row.client_cpu_ms.median for row in shown if row.client_cpu_ms]
        server = [row.server_cpu_ms.median for row in shown if row.server_cpu_ms]
        cpu.barh(names, client, color="tab:orange", label="client")
        cpu.barh(names, server, left=client, color="tab:green", label="server")
        cpu.set_xlabel("CPU-ms a batch")
        cpu.legend(fontsize=8)
        for axes in (speed, cpu):
            axes.invert_yaxis()
        figure.savefig(box, format="svg", metadata={"Date": None})
    return box.getvalue().decode()
