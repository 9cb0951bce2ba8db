"""The table of accuracies: one list of rows, printed on the terminal, in Markdown and in HTML.

Rows come from evaluate/results.json (models by name). Accuracies are fractions there and percent here; a cell that the
evaluation did not fill is a dash, never a zero.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from m2mkd_ds.report.collect import is_number

COLUMNS = ("model", "top-1 %", "95 % CI", "top-5 %", "loss", "agreement %", "parameters", "active")
LEGEND = (
    "Agreement: images on which the model and the teacher name the same class. Active: parameters that one token meets. "
    "In meta: the module stands in the meta model, in place of one of its stages."
)
DASH = "-"

_ORDER = ("meta", "teacher", "teacher_hybrid", "student_hybrid", "student_cold", "student", "baseline")
_LABELS = {
    "meta": "meta model",
    "teacher": "teacher",
    "teacher_hybrid": "teacher module {} in meta",
    "student_hybrid": "student module {} in meta",
    "student_cold": "student, just assembled",
    "student": "student, final",
    "baseline": "V-MoE from scratch",
}


def split_name(name: str) -> tuple[str, int | None]:
    """`student_hybrid_2` -> (`student_hybrid`, 2); other names -> (name, None)."""
    match = re.fullmatch(r"(teacher_hybrid|student_hybrid)_(\d+)", name)
    return (match[1], int(match[2])) if match else (name, None)


def label(name: str) -> str:
    """What a reader calls the model; a name that is not of the contract stays as it is."""
    kind, index = split_name(name)
    return _LABELS[kind].format(index) if kind in _LABELS else name


def ordered_models(results: Mapping[str, Any]) -> list[str]:
    """Names in the order of the story: meta, teacher, hybrids, cold student, student, baseline, then anything else."""
    models = results.get("models")
    if not isinstance(models, dict):
        return []

    def key(name: str) -> tuple[int, int, str]:
        kind, index = split_name(name)
        return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), index or 0, name)

    return sorted((name for name in models if isinstance(models[name], dict)), key=key)


def percent(value: Any, digits: int = 2) -> str:
    """0.8123 -> `81.23`; a dash when there is no number."""
    return f"{100 * value:.{digits}f}" if is_number(value) else DASH


def interval(value: Any, *, sign: bool = False) -> str:
    """[0.80, 0.82] -> `80.00 to 82.00`."""
    if not (isinstance(value, (list, tuple)) and len(value) == 2 and all(is_number(edge) for edge in value)):
        return DASH
    low, high = (f"{100 * edge:{'+' if sign else ''}.2f}" for edge in value)
    return f"{low} to {high}"


def count(value: Any) -> str:
    """1234567 -> `1.23 M`, 12345 -> `12.3 k`."""
    if not is_number(value):
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of every model, in the order of COLUMNS; empty when nothing was evaluated."""
    cells: list[tuple[str, ...]] = []
    for name in ordered_models(results):
        scores = results["models"][name]
        loss = f"{scores['loss']:.3f}" if is_number(scores.get("loss")) else DASH
        agreement = percent(scores.get("agreement_with_teacher"), 1)
        sizes = count(scores.get("parameters")), count(scores.get("active_parameters"))
        cells.append((label(name), percent(scores.get("top1")), interval(scores.get("top1_ci")), percent(scores.get("top5")), loss,
                      agreement, *sizes))  # fmt: skip
    return cells


def difference_line(results: Mapping[str, Any]) -> str:
    """The finding in one sentence, or why there is none."""
    difference = results.get("student_minus_baseline")
    if not isinstance(difference, dict) or not is_number(difference.get("top1")):
        return "The final student was not compared with a baseline trained from scratch."
    points = 100 * difference["top1"]
    text = f"The final student is {abs(points):.2f} points {'above' if points >= 0 else 'below'} the baseline trained from scratch"
    ci = difference.get("ci")
    span = interval(ci, sign=True)
    if span == DASH or not isinstance(ci, (list, tuple)):
        return f"{text}."
    verdict = (
        "a difference that chance over these images does not explain" if ci[0] > 0 or ci[1] < 0 else "which chance alone could explain"
    )
    return f"{text} (95 % CI of the difference {span}), {verdict}."


def format_table(results: Mapping[str, Any]) -> str:
    """The terminal's closing table: aligned columns of plain text, and the finding under it.

    `results` is the content of evaluate/results.json; parts that are missing show as dashes or as a sentence.
    """
    cells = rows(results)
    if not cells:
        return "No model was evaluated: evaluate/results.json holds no models."
    lines = aligned([COLUMNS, *cells])
    rule = "-" * len(lines[0])
    images = results.get("num_images")
    caption = (
        f"{images:,} validation images, each counted once." if is_number(images) else "The number of validation images is not recorded."
    )
    return "\n".join([lines[0], rule, *lines[1:], rule, f"{caption} {LEGEND}", difference_line(results)])


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """First column left, the rest right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return [
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in table
    ]
