"""Icon sets of the npm package @iconify/json: where the package comes from, which icons may be used, and what they show.

A set is a JSON file: `info` (name, author, licence), `icons` (name -> SVG body and box), `aliases` (other names and turned copies).
An icon's class is its name without the words of style at its end (`bell-outline-24` -> `bell`).
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.sources.archives import archive_files, fetch, fetch_text

PACKAGE = "@iconify/json"
VERSION = "2.2.535"
"""Pinned: icon sets change weekly, and with them what a class is."""
INTEGRITY = "sha512-nAV60ACUSHwnsb6fsp+letHlNkrwO4vzBtcC6B4EDHErQQfezk7E3nJdnwJjve6OCfMNO0uVT5Vrgna9/NCmXw=="
REGISTRY = "https://registry.npmjs.org/"

LICENCES = frozenset({"MIT", "Apache-2.0", "BSD-3-Clause", "CC-BY-4.0", "CC-BY-3.0", "CC0-1.0", "ISC", "OFL-1.1", "Unlicense"})
"""SPDX names of licences that allow copies and changes for any purpose; some of them ask for attribution."""

STYLE_WORDS = frozenset(
    "outline outlined outlines filled fill line linear lined bold bolder light thin regular duotone twotone two tone solid sharp round "
    "rounded stroke broken alt alternate color colored colour flat mini micro medium small large big black white dark original plain "
    "wordmark rtl ltr straight linejoin sm md lg xl xs o f s r v1 v2".split()
)
"""Words at the end of a name that say how it is drawn, not what."""
_STYLE_NUMBER = re.compile(r"\d{1,3}(px|x\d{1,3})?")
_PLAIN_WORD = re.compile(r"[a-z]")
# Moving pictures, pictures inside pictures, text (its look depends on the fonts of the machine), and scripts.
_NOT_A_STILL_DRAWING = re.compile(r"<(animate|set|image|text|foreignObject|script|style)\b|@keyframes", re.IGNORECASE)


@dataclass(frozen=True)
class IconSet:
    """One set and the icons of it that may be used."""

    prefix: str
    name: str
    author: str
    licence: str
    """SPDX name."""
    licence_url: str
    icons: Mapping[str, str]
    """Name -> SVG document."""


@dataclass(frozen=True)
class Icon:
    """One icon of a class."""

    prefix: str
    name: str
    label: int
    svg: str


def find_package(path: Path | None, cache: Path) -> Path:
    """The package at `path` (an unpacked folder or a .tgz), or fetched into `cache` from the npm registry."""
    if path is None:
        return fetch_package(cache, os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY") or REGISTRY)
    if path.is_file():
        return path
    folder = next((folder for folder in (path / "package" / "json", path / "json", path) if any(folder.glob("*.json"))), None)
    if folder is None:
        raise ShardError(f"{path}: no such package; icons needs {PACKAGE} unpacked (with package/json/*.json) or its .tgz")
    return folder


def fetch_package(cache: Path, registry: str, version: str = VERSION, integrity: str = INTEGRITY) -> Path:
    """`npm pack` without npm: the archive, checked against the registry's checksum, which has to be the one that is pinned here."""
    registry = registry.rstrip("/") + "/"
    archive = cache / f"iconify-json-{version}.tgz"
    digest = base64.b64decode(integrity.removeprefix("sha512-")).hex()
    if archive.exists():
        return fetch("", archive, "sha512", digest)
    url = f"{registry}{PACKAGE.replace('/', '%2f')}/{version}"
    try:
        dist = json.loads(fetch_text(url))["dist"]
        tarball, published = str(dist["tarball"]), str(dist["integrity"])
    except (ValueError, KeyError, TypeError) as err:
        if isinstance(err, ShardError):
            raise
        raise ShardError(f"{url}: not what an npm registry answers; check npm_config_registry") from err
    if published != integrity:
        raise ShardError(f"{url}: the registry says {published}, but {PACKAGE} {version} is {integrity}; do not use this registry")
    # As npm does: a mirror's answer still names the registry that it mirrors.
    return fetch(tarball.replace(REGISTRY, registry, 1), archive, "sha512", digest)


def read_sets(package: Path) -> Iterator[IconSet]:
    """The sets under a permissive licence, by prefix, with their icons that are still drawings."""
    for name, data in _files(package):
        try:
            tree = json.loads(data)
            info, icons = tree.get("info"), tree.get("icons")
        except (ValueError, AttributeError) as err:
            raise ShardError(f"{package}: {name} is not the JSON of an icon set ({err}); fetch the package again") from err
        if not isinstance(info, dict) or not isinstance(icons, dict):
            continue  # package.json and collections.json lie beside the sets in some layouts
        licence = info.get("license", {})
        if licence.get("spdx") not in LICENCES:
            continue
        kept = {name: _svg(icon, tree) for name, icon in icons.items() if _is_usable(icon)}
        author = info.get("author", {}).get("name", "")
        yield IconSet(tree["prefix"], info.get("name", tree["prefix"]), author, licence["spdx"], licence.get("url", ""), kept)


def _files(package: Path) -> Iterator[tuple[str, bytes]]:
    if package.is_dir():
        for path in sorted(package.glob("*.json")):
            yield path.name, path.read_bytes()
        return
    yield from archive_files(package, lambda name: re.fullmatch(r"package/json/[^/]+\.json", name) is not None)


def _is_usable(icon: Mapping[str, Any]) -> bool:
    """Hidden icons were withdrawn by their authors. `aliases` are not looked at: they are the same drawings, some of them turned."""
    return not icon.get("hidden") and not _NOT_A_STILL_DRAWING.search(icon["body"])


def _svg(icon: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """The drawing in the middle of a square."""
    left, top, width, height = (
        float(icon.get(key, tree.get(key, default))) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    side = max(width, height)
    box = f"{left - (side - width) / 2:g} {top - (side - height) / 2:g} {side:g} {side:g}"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head} viewBox="{box}" width="{side:g}" height="{side:g}">{icon["body"]}</svg>'


def class_of(name: str) -> str:
    """An icon's name without words of style at its end; empty when no letter is left."""
    words = name.lower().split("-")
    while len(words) > 1 and (words[-1] in STYLE_WORDS or _STYLE_NUMBER.fullmatch(words[-1])):
        words.pop()
    return "-".join(words) if _PLAIN_WORD.search("".join(words)) else ""


def choose(sets: Sequence[IconSet], num_classes: int) -> tuple[tuple[str, ...], list[Icon]]:
    """(class names, icons) of the `num_classes` names that most sets have; names in equally many go by the alphabet.

    Raises ShardError when there are not as many names in at least two sets.
    """
    sets_of: dict[str, set[str]] = defaultdict(set)
    for icon_set in sets:
        for name in icon_set.icons:
            sets_of[class_of(name)].add(icon_set.prefix)
    sets_of.pop("", None)
    ranked = sorted(sets_of, key=lambda name: (-len(sets_of[name]), name))
    shared = sum(len(sets_of[name]) > 1 for name in ranked)
    if not 0 < num_classes <= shared:
        raise ShardError(f"num_classes is {num_classes}; {shared} icon names are drawn in more than one set")
    class_names = tuple(sorted(ranked[:num_classes]))
    label_of = {name: label for label, name in enumerate(class_names)}
    icons = [
        Icon(icon_set.prefix, name, label_of[class_of(name)], svg)
        for icon_set in sorted(sets, key=lambda icon_set: icon_set.prefix)
        for name, svg in sorted(icon_set.icons.items())
        if class_of(name) in label_of
    ]
    return class_names, icons
