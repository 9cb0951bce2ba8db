"""Other programs' lists of shards: timm's `_info.json` (read and written) and wids' JSON (written).

    FOLDER/_info.json   {"splits": {NAME: {"name", "num_samples", "filenames", "shard_lengths"}}, ...}, read by timm's ReaderWds
    FOLDER/wids.json    {"__kind__": "wids-shard-index-v1", "shardlist": [{"url", "nsamples", "filesize"}]}

Shard names in both are relative to the folder that the file lies in.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import INDEX_NAME, ShardIndex
from m2mkd_ds.data.remote.addresses import is_remote

logger = logging.getLogger("m2mkd_ds")

INFO_NAME = "_info.json"
INFO_NAMES = (INFO_NAME, "info.json")
"""As timm looks for them."""
WIDS_NAME = "wids.json"
_MADE_BY = "m2mkd_ds"


@dataclass(frozen=True)
class SplitInfo:
    """One split of an `_info.json`."""

    num_samples_by_name: Mapping[str, int]
    alt_label: str
    """Field of KEY.json that holds the label; empty: KEY.cls."""


@dataclass(frozen=True)
class ShardsInfo:
    """An `_info.json`."""

    where: str
    splits: Mapping[str, SplitInfo]
    class_names: tuple[str, ...] = ()


def parse_info(where: str, text: bytes) -> ShardsInfo:
    """Read the text of an `_info.json`; `where` names it in messages. Raises ShardError when it is not one."""
    try:
        tree = json.loads(text)
        splits = {
            str(name): SplitInfo(
                dict(zip(map(str, split["filenames"]), map(int, split["shard_lengths"]), strict=True)), str(split.get("alt_label") or "")
            )
            for name, split in tree.get("splits", {}).items()
        }
        sums = {name: (int(tree["splits"][name]["num_samples"]), sum(split.num_samples_by_name.values())) for name, split in splits.items()}
        class_names = class_list(tree.get("class_names") or [], where)
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        if isinstance(err, ShardError):
            raise
        raise ShardError(f"{where}: not timm's list of shards ({type(err).__name__}: {err}); correct or remove it") from None
    for name, (stated, summed) in sums.items():
        if stated != summed:
            raise ShardError(f"{where}: split {name} has num_samples {stated}, but its shard_lengths sum to {summed}; correct or remove it")
    return ShardsInfo(where, splits, class_names)


def class_list(tree: object, where: str) -> tuple[str, ...]:
    """Class names from a list, or from an object {"0": name, "1": name, ...}. Raises ShardError for anything else."""
    if isinstance(tree, dict):
        numbers = {str(number) for number in range(len(tree))}
        if set(tree) != numbers:
            wrong = sorted(map(str, set(tree) ^ numbers))[:3]
            raise ShardError(f"{where}: class numbers must be 0 to {len(tree) - 1}; see {', '.join(wrong)}")
        tree = [tree[str(number)] for number in range(len(tree))]
    if not isinstance(tree, list) or not all(isinstance(name, str) for name in tree):
        raise ShardError(f"{where}: class names must be a list of strings, or an object of class number and string")
    return tuple(tree)


def write_interop(folder: str | Path) -> list[Path]:
    """Write `_info.json` and `wids.json` beside an index, or into a root of which subfolders (train, validation) hold one.

    A root gets one `_info.json` with a split a subfolder, and each subfolder its own files. Files that somebody else made
    are left as they are, with a line in the log. Returns what was written. Raises ShardError where there is no index.
    """
    root = Path(folder)
    if (root / INDEX_NAME).is_file():
        index = ShardIndex.load_unchecked(root)
        name = root.resolve().name
        written = [_write(root / INFO_NAME, _info_tree({name: (index, "")})), _write(root / WIDS_NAME, _wids_tree(index, name))]
        return [path for path in written if path is not None]
    parts = sorted(path.parent for path in root.glob(f"*/{INDEX_NAME}"))
    if not parts:
        raise ShardError(f"{root}: neither it nor its subfolders hold {INDEX_NAME}; write or index the shards first")
    within = [path for part in parts for path in write_interop(part)]
    splits = {part.name: (ShardIndex.load_unchecked(part), f"{part.name}/") for part in parts}
    top = _write(root / INFO_NAME, _info_tree(splits))
    return [*within, *([top] if top is not None else [])]


def _info_tree(splits: Mapping[str, tuple[ShardIndex, str]]) -> dict[str, Any]:
    trees = {}
    for name, (index, prefix) in splits.items():
        trees[name] = {
            "name": name,
            "num_samples": index.num_samples,
            "filenames": [_relative(index, shard.name, prefix) for shard in index.shards],
            "shard_lengths": [shard.num_samples for shard in index.shards],
            "alt_label": index.request.get("label_field", ""),
            "fingerprint": index.fingerprint,
        }
        odd = sorted({extension.decode() for extension in set(index.table["extension"].tolist())} - {"jpg", "png", "webp"})
        if odd:
            logger.warning("%s: images named .%s: timm's reader needs input_key='jpg;png;webp;%s'", index.folder, odd[0], ";".join(odd))
    names = {index.class_names for index, _ in splits.values()}
    return {"made_by": _MADE_BY, "splits": trees, **({"class_names": list(names.pop())} if len(names) == 1 else {})}


def _wids_tree(index: ShardIndex, name: str) -> dict[str, Any]:
    shards = [
        {"url": _relative(index, shard.name, ""), "nsamples": shard.num_samples, "filesize": shard.bytes, "sha256": shard.sha256}
        for shard in index.shards
        if shard.num_samples  # wids counts samples itself and cannot open an empty one
    ]
    return {"__kind__": "wids-shard-index-v1", "wids_version": 1, "made_by": _MADE_BY, "name": name, "shardlist": shards}


def _relative(index: ShardIndex, name: str, prefix: str) -> str:
    """A shard's name seen from the folder that the list lies in. Remote shards keep their bare names: the list belongs beside them."""
    if is_remote(index.base) or index.shard_folder.resolve() == index.folder.resolve():
        return prefix + name
    from_folder = index.folder.parent if prefix else index.folder
    return os.path.relpath(index.shard_folder / name, from_folder)


def _write(path: Path, tree: Mapping[str, Any]) -> Path | None:
    if path.exists() and not _is_ours(path):
        logger.info("%s: kept, somebody else made it", path)
        return None
    with AtomicFile(path) as file:
        file.write(json.dumps(tree, indent=1).encode())
    return path


def _is_ours(path: Path) -> bool:
    try:
        tree = json.loads(path.read_bytes())
    except ValueError:
        return False
    return isinstance(tree, dict) and tree.get("made_by") == _MADE_BY


def expected_counts(info: ShardsInfo | None, names: Sequence[str]) -> dict[str, int]:
    """Samples by shard name, as far as `info` knows the shards. Raises ShardError when two of its splits disagree about one."""
    counts: dict[str, int] = {}
    for split in info.splits.values() if info is not None else ():
        for name in set(names) & set(split.num_samples_by_name):
            number = split.num_samples_by_name[name]
            if counts.setdefault(name, number) != number and info is not None:
                raise ShardError(f"{info.where}: its splits give {name} {counts[name]} and {number} samples; correct or remove it")
    return counts
