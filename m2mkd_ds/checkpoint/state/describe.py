"""What lies at a path: a checkpoint, a weights file, a run folder with all of its checkpoints, or an exported folder; as plain JSON data.

Every byte that a manifest lists is read and compared. Headers are read, tensors are not; nothing is run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.finished import check_finished
from m2mkd_ds.checkpoint.hf.manifest import verify_manifest
from m2mkd_ds.checkpoint.saves.manifest import FileRecord, check_file, read_manifest
from m2mkd_ds.checkpoint.state.find import is_checkpoint
from m2mkd_ds.checkpoint.state.layout import layout_kind
from m2mkd_ds.checkpoint.state.rank_files import RankFiles
from m2mkd_ds.checkpoint.state.safetensors_stream import TensorFile
from m2mkd_ds.checkpoint.store import read_metadata

Tree = dict[str, Any]

_EXPORTED = "config.json"
"""By this a folder that `m2mkd export` or `export-timm` wrote is known."""


def describe(path: Path) -> Tree:
    """`{what: checkpoint | weights | folder, path, damage: [sentences], ...}`; `damage` is empty for what verifies.

    Raises StoreError for a path that is none of the three.
    """
    if path.is_file() and path.suffix == ".safetensors":
        return describe_weights(path)
    if path.is_dir() and (path / _EXPORTED).is_file():
        return describe_folder(path)  # its manifest.json is not that of a checkpoint
    if is_checkpoint(path):
        return describe_checkpoint(path)
    if path.is_dir():
        return describe_folder(path)
    raise StoreError(f"{path}: neither a checkpoint folder, nor a .safetensors file, nor a folder with checkpoints")


def describe_checkpoint(folder: Path) -> Tree:
    """One checkpoint: what it says of itself, and every file of it that is damaged."""
    tree: Tree = {"what": "checkpoint", "path": str(folder), "damage": []}
    try:
        manifest = read_manifest(folder)
        listed = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        tree |= {"step": manifest["step"], "attempt": manifest["attempt"], "record": manifest["record"]}
        tree |= {"files": len(listed), "bytes": sum(entry.bytes for entry in listed.values())}
        tree["damage"] += [message for name, entry in listed.items() if (message := _damage(folder / name, entry))]
    except StoreError as err:
        tree["damage"].append(str(err))
    try:
        tree |= _content(RankFiles(folder))
    except StoreError as err:
        # The same sentence twice would be one too many: a missing file is no file of this format, either.
        tree["damage"] += [str(err)] if not tree["damage"] else []
    return tree


def describe_weights(path: Path) -> Tree:
    """One safetensors file. Its header vouches for its length, the done.json of a finished node beside it for its bytes."""
    try:
        file = TensorFile(path)
        is_vouched = check_finished(path)
    except StoreError as err:
        return {"what": "weights", "path": str(path), "damage": [str(err)]}
    return {
        "what": "weights", "path": str(path), "damage": [], "is_vouched": is_vouched, "bytes": path.stat().st_size,
        "tensors": len(file.tensors), "elements": sum(info.shape.numel() for info in file.tensors.values()),
        "dtypes": dict(Counter(str(info.dtype).removeprefix("torch.") for info in file.tensors.values())),
        "modules": _by_module((name, info.shape.numel()) for name, info in file.tensors.items()),
        "metadata": read_metadata(path),
    }  # fmt: skip


def describe_folder(folder: Path) -> Tree:
    """A run, a phase, or a folder of checkpoints: each checkpoint below it, each weights file, and the files of each exported folder."""
    steps = (path for path in sorted(folder.rglob("step-*")) if not path.name.endswith(".tmp"))
    checkpoints = [path for path in steps if is_checkpoint(path)]
    rank_files = {path for step in checkpoints for path in step.glob("engine_rank_*")}
    weights = [path for path in sorted(folder.rglob("*.safetensors")) if path not in rank_files]
    if not checkpoints and not weights:
        raise StoreError(f"{folder}: no checkpoint and no .safetensors file is in this folder")
    found = [describe_checkpoint(path) for path in checkpoints]
    files = [describe_weights(path) for path in weights]
    damage = [message for tree in (*found, *files) for message in tree["damage"]]
    damage += [message for file in sorted(folder.rglob(_EXPORTED)) if (message := _export_damage(file.parent))]
    return {"what": "folder", "path": str(folder), "damage": damage, "checkpoints": found, "weights": files}


def _damage(path: Path, expected: FileRecord) -> str:
    try:
        check_file(path, expected)
    except StoreError as err:
        return str(err)
    return ""


def _export_damage(folder: Path) -> str:
    try:
        verify_manifest(folder)
    except StoreError as err:
        return str(err)
    return ""


def _content(files: RankFiles) -> Tree:
    description = files.description
    numel = {p.name: _numel(p.shape) for p in description.parameters}
    return {
        "layout": {
            "ranks": description.size, "ep_size": description.ep_size, "data_size": description.size // description.ep_size,
            "zero_stage": description.zero_stage,
        },
        "kinds": list(description.kinds),
        "scalars": {name: value.item() for name, value in files.scalars.items() if value.numel() == 1},
        "tensors": len(numel), "elements": sum(numel.values()),
        "expert_elements": sum(numel[p.name] for p in description.parameters if p.is_expert),
        "groups": [
            {
                "kind": layout_kind(g), "tensors": len(g.names), "elements": sum(numel[name] for name in g.names),
                "ep_size": g.ep_size, "elements_a_rank": g.part_numel,
            }
            for g in description.groups
        ],
        "modules": _by_module(numel.items()),
        "shared": {name: list(info.shape) for name, info in sorted(files.shared.items())},
    }  # fmt: skip


def _by_module(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """Elements by what they belong to: a block by its number, everything else by its first word."""
    found: Counter[str] = Counter()
    for name, numel in sizes:
        words = name.split(".")
        found[".".join(words[:2]) if len(words) > 2 and words[1].isdigit() else words[0]] += numel
    return dict(found)


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product


def as_text(tree: Mapping[str, Any]) -> str:
    """`describe`'s answer for people."""
    if tree["what"] == "folder":
        lines = [f"{tree['path']}: {len(tree['checkpoints'])} checkpoints, {len(tree['weights'])} weights files"]
        found = [(Path(one["path"]).relative_to(tree["path"]).as_posix(), one) for one in (*tree["checkpoints"], *tree["weights"])]
        width = max(len(name) for name, _ in found)
        lines += [_line(name, one, width) for name, one in found]
    else:
        lines = [f"{tree['path']}: {_state(tree)}", *_fields(tree)]
    return "\n".join([*lines, *(f"damaged: {message}" for message in tree["damage"])])


def _state(tree: Mapping[str, Any]) -> str:
    if tree["damage"]:
        return "DAMAGED"
    return "header good" if tree["what"] == "weights" and not tree["is_vouched"] else "verified"


def _line(name: str, tree: Mapping[str, Any], width: int) -> str:
    words = [f"  {name:<{width}}", f"{_state(tree):<11}", f"{_mib(tree.get('bytes', 0)):>9}"]
    if "layout" in tree:
        layout = tree["layout"]
        words.append(f"{layout['ranks']} ranks, ep {layout['ep_size']}, ZeRO-{layout['zero_stage']}")
    if "elements" in tree:
        words.append(f"{tree['elements']:,} elements")
    return "  ".join(words)


def _fields(tree: Mapping[str, Any]) -> list[str]:
    lines = []
    if "step" in tree:
        lines.append(f"  step         {tree['step']}")
    if "bytes" in tree:
        lines.append(f"  size         {_mib(tree['bytes'])}" + (f" in {tree['files']} files" if "files" in tree else ""))
    if "layout" in tree:
        lines.append(f"  laid out for {_layout(tree['layout'])}")
        lines.append(f"  holds        {', '.join(tree['kinds'])}" + "".join(f"; {k} {v:g}" for k, v in tree["scalars"].items()))
        lines.append(f"  parameters   {tree['tensors']} tensors, {tree['elements']:,} elements, {tree['expert_elements']:,} of experts")
        lines += [
            f"    group {i}    {g['tensors']:>5} tensors {g['elements']:>15,} elements, {g['kind']}, {g['elements_a_rank']:,} a rank"
            + (f", spread over {g['ep_size']}" if g["ep_size"] > 1 else "")
            for i, g in enumerate(tree["groups"])
        ]
    elif "elements" in tree:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in tree["dtypes"].items())
        lines.append(f"  parameters   {tree['tensors']} tensors ({kinds}), {tree['elements']:,} elements")
    lines += [f"    {name:<24} {count:>15,}" for name, count in tree.get("modules", {}).items()]
    lines += [f"  shared       {name} {shape}" for name, shape in tree.get("shared", {}).items()]
    for title in ("record", "metadata"):
        lines += [f"  {title:<12} {key}: {value}" for key, value in _dotted(tree.get(title, {}))]
    return lines


def _layout(layout: Mapping[str, int]) -> str:
    return f"{layout['ranks']} ranks (ep {layout['ep_size']} x dp {layout['data_size']}), ZeRO-{layout['zero_stage']}"


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{a: {b: 1}}` -> a.b 1: a line for each value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", _short(value)


def _short(value: Any) -> str:
    """The metadata of a rank's file list every parameter of the model; `--json` has all of it."""
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.2f} MiB"
