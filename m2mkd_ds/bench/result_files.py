"""The files of a benchmark's result, of one form for all: JSON for programs, Markdown with where the numbers come from, a picture."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import replacing, write_json_atomic


def write_result(folder: Path, stem: str, result: dict[str, Any], markdown: str, picture: str | bytes | None = None) -> list[Path]:
    """STEM.json, STEM.md and, of a picture, STEM.svg (text) or STEM.png (bytes) in `folder`; their paths. Each is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / f"{stem}.json", folder / f"{stem}.md"]
    write_json_atomic(written[0], result)
    with replacing(written[1]) as temp:
        temp.write_text(markdown, encoding="utf-8")
    if picture is not None:
        written.append(folder / f"{stem}.{'svg' if isinstance(picture, str) else 'png'}")
        with replacing(written[-1]) as temp:
            temp.write_bytes(picture.encode() if isinstance(picture, str) else picture)
    return written


def markdown_head(
    title: str, result: dict[str, Any], headline: str, how_to_read: str = "", picture: tuple[str, str] | None = None
) -> list[str]:
    """Markdown lines that every result begins with. `picture`: its text and its file."""
    lines = [f"# {title}", "", f"`{result['command']}` ({headline})", ""]
    lines += [", ".join(f"{name} {value}" for name, value in result["environment"].items() if value is not None), ""]
    lines += [how_to_read, ""] if how_to_read else []
    return lines + ([f"![{picture[0]}]({picture[1]})", ""] if picture else [])


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Markdown lines; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|---:" * (len(headings) - 1) + "|"]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
