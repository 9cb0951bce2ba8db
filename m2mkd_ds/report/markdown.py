"""The same report as Markdown, for a pull request or a model card; figures are the SVG files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from m2mkd_ds.report import few_shot, summary, table
from m2mkd_ds.report.collect import RunFacts


def render_markdown(facts: RunFacts, figures: Mapping[str, str]) -> str:
    """The whole document; `figures` names the SVG files that lie beside it."""
    blocks = [f"# {plain(facts.name)}", plain(table.difference_line(facts.results))]
    if facts.missing:
        blocks += ["## What this report lacks", "\n".join(f"- {plain(line)}" for line in facts.missing)]
    cells = table.rows(facts.results)
    if cells:
        blocks += ["## Accuracy", _table(table.COLUMNS, cells), table.LEGEND, *_image(figures, "accuracy", "top-1 accuracy of every model")]
    for name, result in facts.few_shot.items():
        blocks += [f"## Few-shot learning: {plain(name)}", plain(" ".join(few_shot.sentences(result)))]
        blocks.append(_table(few_shot.COLUMNS, few_shot.rows(result)))
    blocks += _titled("Student against baseline", _image(figures, "race", "accuracy over steps"))
    if facts.curves:
        blocks.append("## Training")
        for phase in facts.curves:
            blocks += [f"### {phase}: {summary.PHASE_TITLES[phase]}"]
            blocks += _image(figures, f"phase_{phase}", f"loss and accuracy of {phase}")
            blocks += _image(figures, f"distillation_{phase}", f"loss terms of {phase}")
    load = _image(figures, "load", "expert load by block")
    blocks += _titled("Expert load", [summary.caption_of_load(), *load] if load else [])
    routing = _image(figures, "router", summary.ROUTER_TEXT)
    blocks += _titled("Routing during training", [summary.caption_of_routing(), *routing] if routing else [])
    bad = summary.bad_sample_rows(facts)
    blocks += _titled("Damaged training images", [summary.caption_of_bad_samples(), _table(summary.BAD_COLUMNS, bad)] if bad else [])
    if facts.nodes:
        blocks += ["## Time", _table(summary.TIME_COLUMNS, summary.time_rows(facts.nodes))]
    lines = [*summary.config_rows(facts), *facts.versions.items()]
    if lines:
        blocks += ["## Configuration", _table(("what", "value"), lines)]
    return "\n\n".join(blocks) + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is: on one line, no markup, no HTML."""
    text = " ".join(text.split())
    for character in "\\`*_[]<>|#":
        text = text.replace(character, f"\\{character}")
    return text


def _titled(title: str, blocks: Sequence[str]) -> list[str]:
    return [f"## {title}", *blocks] if blocks else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    lines = [list(columns), rule, *([plain(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _image(figures: Mapping[str, str], name: str, alternative: str) -> list[str]:
    return [f"![{alternative}]({name}.svg)"] if name in figures else []
