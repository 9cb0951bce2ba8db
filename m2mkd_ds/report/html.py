"""The HTML page: one file, no script, no request to anywhere. Every text that comes from the run is escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from m2mkd_ds.report import few_shot, summary, table
from m2mkd_ds.report.collect import RunFacts
from m2mkd_ds.report.summary import ROUTER_TEXT


def render_html(facts: RunFacts, figures: Mapping[str, str]) -> str:
    """The whole page. `figures` are SVG texts by name (see build.draw); they go in as data URIs."""
    parts = [
        _header(facts),
        f'<p class="finding">{escape(table.difference_line(facts.results))}</p>',
        _cards(facts),
        _missing(facts),
        _accuracy(facts, figures),
        _few_shot(facts),
        _section("Student against baseline", "Both have seen as many training steps.", _image(figures, "race", "accuracy over steps")),
        _phases(facts, figures),
        _section("Expert load", summary.caption_of_load(), _image(figures, "load", "expert load by block")),
        _section("Routing during training", summary.caption_of_routing(), _image(figures, "router", ROUTER_TEXT)),
        _bad_samples(facts),
        _times(facts),
        _config(facts),
    ]
    style = (resources.files("m2mkd_ds.report") / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>m2mKD run: {escape(facts.name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _header(facts: RunFacts) -> str:
    images = facts.results.get("num_images")
    line = f"module-to-module knowledge distillation into a sparse Vision-MoE &middot; run folder <code>{escape(facts.run_dir.name)}</code>"
    if isinstance(images, int):
        line += f" &middot; {images:,} validation images"
    return f"<header><h1>{escape(facts.name)}</h1><p>{line}</p></header>"


def _cards(facts: RunFacts) -> str:
    cells = "".join(
        f'<div class="card"><div class="value">{escape(value)}</div><div class="name">{escape(name)}</div></div>'
        for value, name in summary.cards(facts)
    )
    return f'<div class="cards">{cells}</div>' if cells else ""


def _missing(facts: RunFacts) -> str:
    if not facts.missing:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in facts.missing)
    return f'<section class="missing"><h2>What this report lacks</h2><ul>{items}</ul></section>'


def _accuracy(facts: RunFacts, figures: Mapping[str, str]) -> str:
    names = table.ordered_models(facts.results)
    if not names:
        return ""
    classes = {table.label(name): name for name in ("student", "teacher") if name in names}
    body = _table(table.COLUMNS, table.rows(facts.results), classes)
    return _section(
        "Accuracy",
        f"Every validation image counted once. {table.LEGEND}",
        body + _image(figures, "accuracy", "top-1 accuracy of every model"),
    )


def _few_shot(facts: RunFacts) -> str:
    body = "".join(
        f"<h3>{escape(name)}</h3>"
        + "".join(f"<p>{escape(line)}</p>" for line in few_shot.sentences(result))
        + _table(few_shot.COLUMNS, few_shot.rows(result), {})
        for name, result in facts.few_shot.items()
    )
    return _section("Few-shot learning", "", body)


def _phases(facts: RunFacts, figures: Mapping[str, str]) -> str:
    body = "".join(
        f"<h3>{escape(phase)}</h3><p>{escape(summary.PHASE_TITLES[phase])}</p>"
        + _image(figures, f"phase_{phase}", f"loss and accuracy of {phase}")
        + _image(figures, f"distillation_{phase}", f"loss terms of {phase}")
        for phase in facts.curves
    )
    return _section("Training", "A line is the whole model, or one teaching pair.", body)


def _bad_samples(facts: RunFacts) -> str:
    rows = summary.bad_sample_rows(facts)
    note = summary.caption_of_bad_samples().replace("`", "")
    return _section("Damaged training images", note, _table(summary.BAD_COLUMNS, rows, {}) if rows else "")


def _times(facts: RunFacts) -> str:
    if not facts.nodes:
        return ""
    note = "Images a second: the median over the logged intervals, without start-up, evaluation and checkpoints."
    return _section("Time", note, _table(summary.TIME_COLUMNS, summary.time_rows(facts.nodes), {}))


def _config(facts: RunFacts) -> str:
    lines = [*summary.config_rows(facts), *((name, version) for name, version in facts.versions.items())]
    if facts.export:
        lines.append(("exported model", f"{facts.export}/ in the run folder"))
    body = "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in lines) + "</dl>" if lines else ""
    if facts.config_text:
        body += f"<details><summary>config.yaml, as every rank read it</summary><pre>{escape(facts.config_text)}</pre></details>"
    return _section("Configuration", "", body)


def _section(title: str, note: str, body: str) -> str:
    """A titled box, or nothing at all when there is nothing to put into it."""
    if not body:
        return ""
    return f"<section><h2>{escape(title)}</h2>{f'<p>{escape(note)}</p>' if note else ''}{body}</section>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], row_classes: Mapping[str, str]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for row in rows:
        mark = row_classes.get(row[0])
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        body += f'<tr class="{mark}">{cells}</tr>' if mark else f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _image(figures: Mapping[str, str], name: str, alternative: str) -> str:
    if name not in figures:
        return ""
    data = base64.b64encode(figures[name].encode("utf-8")).decode("ascii")
    return f'<img src="data:image/svg+xml;base64,{data}" alt="{escape(alternative)}">'
