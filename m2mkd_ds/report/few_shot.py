"""Few-shot results (`m2mkd few-shot`) as a table and sentences; `result.json` in, texts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2mkd_ds.report.collect import is_number
from m2mkd_ds.report.table import DASH, aligned, interval, label, percent

COLUMNS = ("model", "accuracy %", "95 % CI", "lowest", "highest")
PROTOCOLS = {"linear": "a new linear head on frozen features", "finetune": "the whole model fine-tuned, a copy for every episode"}


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Cells of every model, in the order of COLUMNS."""
    models = _object(result, "models")
    return [
        (label(name), percent(m.get("accuracy")), interval(m.get("ci")), percent(m.get("lowest"), 1), percent(m.get("highest"), 1))
        for name, m in models.items()
        if isinstance(m, dict)
    ]


def sentences(result: Mapping[str, Any]) -> list[str]:
    """What was played, and each paired difference."""
    ways, shots, queries = (result.get(key, DASH) for key in ("ways", "shots", "queries"))
    protocol = PROTOCOLS.get(str(_object(result, "fit").get("protocol")), DASH)
    lines = [
        f"{result.get('episodes', DASH)} episodes of {ways}-way {shots}-shot with {queries} other images of each class to name; "
        f"{protocol}; chance is {percent(result.get('chance'), 1)} %. The interval is over episodes (Student's t)."
    ]
    for name, difference in _object(result, "differences").items():
        if isinstance(difference, dict) and is_number(difference.get("accuracy")):
            first, _, other = name.partition("_minus_")
            span = interval(difference.get("ci"), sign=True)
            points = f"{100 * difference['accuracy']:+.2f} points"
            lines.append(f"{label(first)} minus {label(other)}, episode by episode: {points} (95 % CI {span}).")
    return lines


def format_few_shot(result: Mapping[str, Any]) -> str:
    """The terminal's closing table."""
    lines = aligned([COLUMNS, *rows(result)])
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:], rule, *sentences(result)])


def _object(result: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = result.get(key)
    return value if isinstance(value, dict) else {}
