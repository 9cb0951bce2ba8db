"""The report's figures, as SVG text: accuracies with intervals, curves a phase, student against baseline, expert load.

Drawn with matplotlib's object interface (no pyplot, no window, no display), so a report can be built inside any program.
SVG ids are salted by a constant and carry no date: the same run gives the same bytes. Shape letters: E experts.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from m2mkd_ds.report.collect import Curve, is_number
from m2mkd_ds.report.table import label, ordered_models, split_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart by readers with any colour vision, and in print.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A7B00")
INK, FAINT = "#1f2933", "#c9d1d9"
ACCENT = {"student": "#D55E00", "baseline": "#6b7785", "teacher": "#0072B2", "meta": "#56B4E9"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "m2mkd_ds",
    "text.parse_math": False,  # a model name with a $ in it is no formula
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6eaee",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}
MAX_POINTS = 400
"""Points a drawn line has at most; longer records are averaged in equal groups, so a file stays small after weeks of training."""


def _canvas(width: float, height: float, columns: int = 1, rows: int = 1, **options: Any) -> tuple[Figure, Sequence[Axes]]:
    """An empty figure and its axes, row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def thin(x: Sequence[float], y: Sequence[float], limit: int = MAX_POINTS) -> tuple[list[float], list[float]]:
    """Average neighbours so that at most `limit` points remain; the last point keeps its step."""
    group = -(-len(x) // limit)
    if group <= 1:
        return list(x), list(y)
    parts = [slice(i, i + group) for i in range(0, len(x), group)]
    return [x[part][-1] for part in parts], [sum(y[part]) / len(y[part]) for part in parts]


def accuracy_figure(results: Mapping[str, Any]) -> str | None:
    """Top-1 of every model as a bar with its 95 % interval; None when nothing was evaluated."""
    from matplotlib import rc_context

    names = [name for name in ordered_models(results) if is_number(results["models"][name].get("top1"))]
    if not names:
        return None
    with rc_context(STYLE):
        figure, (axes,) = _canvas(8.6, 0.7 + 0.3 * len(names))
        for row, name in enumerate(names):
            scores = results["models"][name]
            kind, index = split_name(name)
            top1 = 100 * scores["top1"]
            colour = ACCENT.get(kind, ACCENT["student"] if kind.startswith("student") else ACCENT["teacher"])
            axes.barh(row, top1, height=0.62, color=colour, alpha=1.0 if kind in ("student", "baseline", "teacher") else 0.5)
            ci = scores.get("top1_ci")
            edge = top1
            if isinstance(ci, (list, tuple)) and len(ci) == 2 and all(is_number(end) for end in ci):
                edge = 100 * ci[1]
                axes.errorbar(top1, row, xerr=[[max(0.0, top1 - 100 * ci[0])], [max(0.0, edge - top1)]], color=INK, lw=1, capsize=2.5)
            axes.annotate(f"{top1:.1f}", (edge, row), (5, 0), textcoords="offset points", va="center", fontsize=8.5)
        axes.set_yticks(range(len(names)), [label(name) for name in names])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 106)
        axes.set_xticks(range(0, 101, 20))
        axes.set_xlabel("top-1 accuracy, % (line: 95 % confidence interval)")
        return _svg(figure)


def phase_figure(curves: Sequence[Curve]) -> str | None:
    """Training loss (left) and validation accuracy (right) of one phase, a line a pair; None without any loss."""
    from matplotlib import rc_context

    if not any(curve.series("loss")[0] for curve in curves):
        return None
    with rc_context(STYLE):
        figure, (left, right) = _canvas(8.6, 2.7, 2)
        for colour, curve in zip(_colours(len(curves)), curves, strict=True):
            left.plot(*thin(*curve.series("loss")), color=colour, label=curve.name)
            steps, top1 = curve.series("eval/top1")
            right.plot(steps, [100 * value for value in top1], color=colour, marker="o", ms=3.5)
        left.set(title="training loss", xlabel="step")
        right.set(title="validation top-1, %", xlabel="step")
        if not any(curve.series("eval/top1")[0] for curve in curves):
            right.text(0.5, 0.5, "not evaluated during this phase", ha="center", va="center", transform=right.transAxes, color="#6b7785")
        if len(curves) > 1:
            left.legend(ncols=2)
        return _svg(figure)


def distillation_figure(curves: Sequence[Curve]) -> str | None:
    """Task loss, distillation loss and the ratio of their gradient norms at the student's logits; None without a KD term."""
    from matplotlib import rc_context

    curves = [curve for curve in curves if curve.series("kd")[0]]
    if not curves:
        return None
    with rc_context(STYLE):
        figure, (task, kd, ratio) = _canvas(8.6, 2.6, 3)
        for colour, curve in zip(_colours(len(curves)), curves, strict=True):
            task.plot(*thin(*curve.series("task")), color=colour, label=curve.name)
            kd.plot(*thin(*curve.series("kd")), color=colour)
            ratio.plot(*thin(*_ratio(curve)), color=colour)
        task.set(title="task loss", xlabel="step")
        kd.set(title="distillation loss", xlabel="step")
        ratio.set(title="|grad KD| / |grad task|", xlabel="step")
        if len(curves) > 1:
            task.legend()
        return _svg(figure)


def _ratio(curve: Curve) -> tuple[list[float], list[float]]:
    pairs = [
        (float(record["step"]), record["kd_grad_norm"] / record["task_grad_norm"])
        for record in curve.records
        if is_number(record.get("step")) and is_number(record.get("kd_grad_norm")) and is_number(record.get("task_grad_norm"))
        and record["task_grad_norm"] > 0
    ]  # fmt: skip
    return [step for step, _ in pairs], [value for _, value in pairs]


def race_figure(curves: Mapping[str, Sequence[Curve]]) -> str | None:
    """Student and baseline over the same axis, student training steps: the student has m2mKD's steps behind it at its start.

    None unless both were evaluated while they trained.
    """
    from matplotlib import rc_context

    lines = {name: curves[phase][0].series("eval/top1") for name, phase in (("student", "end_to_end"), ("baseline", "baseline"))
             if curves.get(phase)}  # fmt: skip
    if len(lines) < 2 or not all(steps for steps, _ in lines.values()):
        return None
    module_steps = max(
        (curve.records[-1]["step"] for curve in curves.get("m2mkd", ()) if is_number(curve.records[-1].get("step"))), default=0
    )
    with rc_context(STYLE):
        figure, (axes,) = _canvas(8.6, 2.9)
        for name, text in (("baseline", "V-MoE from scratch"), ("student", "m2mKD, then end to end")):
            steps, top1 = lines[name]
            offset = module_steps if name == "student" else 0
            x, y = [step + offset for step in steps], [100 * value for value in top1]
            axes.plot(x, y, color=ACCENT[name], marker="o", ms=3.5, label=text)
        if module_steps:
            axes.axvspan(0, module_steps, color="#f2f4f6", zorder=0)
            axes.text(
                module_steps / 2, 0.04, "m2mKD: modules learn apart", transform=axes.get_xaxis_transform(), ha="center", color="#6b7785"
            )
        axes.set(xlabel="training steps of the student", title="validation top-1, %", xlim=(0, None))
        axes.legend(loc="lower right")
        return _svg(figure)


def load_figure(expert_load: Mapping[str, Any]) -> str | None:
    """Share of the routed rows that each expert got, block by expert, one panel a model; None without any load.

    Shown as a multiple of the even share 1/E: 1 is balance, 0 a dead expert, E a layer that uses one expert alone.
    """
    from matplotlib import rc_context

    names = ordered_models({"models": {name: {} for name in expert_load}})
    panels = {name: loads for name in names if (loads := load_matrix(expert_load[name]))}
    if not panels:
        return None
    with rc_context({**STYLE, "axes.grid": False}):
        tallest = max(len(loads) for loads in panels.values())
        figure, axes_list = _canvas(8.6, 1.3 + 0.34 * tallest, len(panels))
        for axes, (name, loads) in zip(axes_list, panels.items(), strict=True):
            _draw_load(axes, label(name), loads, cells_labelled=len(panels) * max(map(len, loads.values())) <= 26)
        figure.colorbar(axes_list[-1].images[0], ax=axes_list, label="load / even share", shrink=0.9, pad=0.01, extend="max")
        return _svg(figure)


def _draw_load(axes: Axes, title: str, loads: Mapping[str, Sequence[float]], *, cells_labelled: bool) -> None:
    """One heat map. Rows of layers with fewer experts are filled up with NaN, which is drawn as paper."""
    width = max(len(row) for row in loads.values())
    grid = [[*row, *[float("nan")] * (width - len(row))] for row in loads.values()]
    axes.imshow(grid, cmap="RdBu_r", vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(loads)), [f"block {block}" for block in loads])
    axes.set_xticks(range(0, width, max(1, width // 8)))
    axes.tick_params(length=0)
    axes.set(title=title, xlabel="expert")
    for row, values in enumerate(grid if cells_labelled else ()):
        for column, value in enumerate(values):
            ink = "white" if abs(value - 1) > 0.55 else INK
            axes.text(column, row, "" if value != value else f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)


def load_matrix(loads: Any) -> dict[str, list[float]]:
    """{block: [count, ...]} -> {block: load as a multiple of the even share}, blocks by number; unusable rows are left out."""
    if not isinstance(loads, dict):
        return {}
    usable = {
        str(block): row
        for block, row in loads.items()
        if str(block).isdigit() and isinstance(row, list) and row and all(is_number(value) and value >= 0 for value in row)
    }
    return {
        block: [value * len(row) / sum(row) if sum(row) else 0.0 for value in row]
        for block, row in sorted(usable.items(), key=lambda item: int(item[0]))
    }


ROUTER_PANELS = {
    "entropy": "routing entropy, nats",
    "max_over_mean": "busiest expert / even share",
    "dead": "dead experts",
    "drop_rate": "dropped choices, share",
}
"""Metric of a MoE block -> title of its panel."""


def router_figure(curves: Mapping[str, Sequence[Curve]]) -> str | None:
    """Routing over training, a panel a metric and a line a MoE block, of the assembled student; None without any."""
    from matplotlib import rc_context

    phase = next((name for name in ("end_to_end", "m2mkd") if curves.get(name)), None)
    if phase is None:
        return None
    found: dict[int, Curve] = {}
    for curve in curves[phase]:
        for record in curve.records:
            for key in record:
                parts = key.split("/")
                if len(parts) == 3 and parts[0] == "moe" and parts[2] == "entropy" and parts[1].isdigit():
                    found.setdefault(int(parts[1]), curve)
    if not found:
        return None
    with rc_context(STYLE):
        figure, panels = _canvas(8.6, 4.6, 2, rows=2)
        for panel, (metric, title) in zip(panels, ROUTER_PANELS.items(), strict=True):
            for position, block in enumerate(sorted(found)):
                line = thin(*found[block].series(f"moe/{block}/{metric}"))
                panel.plot(*line, color=_shade(position, len(found)), label=f"block {block}")
            panel.set(title=title, xlabel=f"step of {phase}")
        panels[0].legend(ncols=2 if len(found) > 4 else 1, fontsize=7.5)
        for panel in panels[2:]:
            panel.set_ylim(bottom=0.0)
        return _svg(figure)


def _shade(position: int, total: int) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.05 + 0.85 * position / max(total - 1, 1))


def _colours(total: int) -> list[Any]:
    return list(PALETTE[:total]) if total <= len(PALETTE) else [_shade(i, total) for i in range(total)]
