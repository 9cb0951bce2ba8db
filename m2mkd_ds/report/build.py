"""Run folder -> RUN/report/{report.html, report.md, report.json, *.svg}. The last node of a run, and the verb `m2mkd report`.

Pure in the folder's content: no clock and no random number goes in, so building twice gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from m2mkd_ds import config as config_tree
from m2mkd_ds.checkpoint.atomic import replacing, write_json_atomic
from m2mkd_ds.report import plots
from m2mkd_ds.report.collect import RunFacts, collect
from m2mkd_ds.report.html import render_html
from m2mkd_ds.report.markdown import render_markdown
from m2mkd_ds.report.summary import bad_sample_counts
from m2mkd_ds.report.table import difference_line

logger = logging.getLogger("m2mkd_ds")


def build_report(run_dir: Path | str) -> Path:
    """Write the report of a run, finished or not, and return the path of report.html.

    Parts of the run that are missing or damaged are named in the report. Raises ValueError when `run_dir` is no run folder.
    """
    facts = collect(Path(run_dir))
    for line in facts.missing:
        logger.warning("report: %s", line)
    figures = draw(facts)
    folder = facts.run_dir / "report"
    folder.mkdir(exist_ok=True)
    for name, svg in figures.items():
        _write(folder / f"{name}.svg", svg)
    for stale in folder.glob("*.svg"):
        if stale.stem not in figures:
            stale.unlink()
    write_json_atomic(folder / "report.json", as_json(facts))
    _write(folder / "report.md", render_markdown(facts, figures))
    _write(folder / "report.html", render_html(facts, figures))
    return folder / "report.html"


def draw(facts: RunFacts) -> dict[str, str]:
    """SVG texts by figure name; a figure for which there is no data is absent."""
    loads = facts.results.get("expert_load")
    drawn = {
        "accuracy": plots.accuracy_figure(facts.results),
        "race": plots.race_figure(facts.curves),
        **{f"phase_{phase}": plots.phase_figure(curves) for phase, curves in facts.curves.items()},
        "distillation_m2mkd": plots.distillation_figure(facts.curves.get("m2mkd", [])),
        "load": plots.load_figure(loads if isinstance(loads, dict) else {}),
        "router": plots.router_figure(facts.curves),
    }
    return {name: svg for name, svg in drawn.items() if svg is not None}


def as_json(facts: RunFacts) -> dict[str, Any]:
    """The report as plain data: results as evaluated, the finding, times, the last value of every metric, what is missing."""
    last = {
        phase: {
            curve.name: {
                key: curve.last(key) for key in sorted({k for record in curve.records for k in record}) if curve.last(key) is not None
            }
            for curve in curves
        }
        for phase, curves in facts.curves.items()
    }
    content = {
        "name": facts.name,
        "finding": difference_line(facts.results),
        "results": facts.results,
        "few_shot": facts.few_shot,
        "nodes": [dataclasses.asdict(node) for node in facts.nodes],
        "last_metrics": last,
        "bad_samples": bad_sample_counts(facts),
        "versions": facts.versions,
        "config": None if facts.config is None else config_tree.to_dict(facts.config),
        "missing": facts.missing,
    }
    return {key: _finite(value) for key, value in content.items()}


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON has no word for, by null."""
    if isinstance(value, dict):
        return {str(key): _finite(sub) for key, sub in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(sub) for sub in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(path: Path, text: str) -> None:
    """Replace the file in one step: a full disk leaves the former report, never half a new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
