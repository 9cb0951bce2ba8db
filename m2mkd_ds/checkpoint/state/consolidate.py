"""One checkpoint as one canonical safetensors file, or as shards with an index: what any other program can read.

weights    <name>                    the fp32 weights, frozen parameters and buffers; the names of `weights.safetensors`
ema        <name>                    the same with the moving average in place of the weights
all        <name>, <kind>/<name>, scalar/<kind>    weights, and beside them moments, average and step
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError, check_new_file, fsync_path, write_json_atomic
from m2mkd_ds.checkpoint.saves.manifest import read_manifest
from m2mkd_ds.checkpoint.state.canonical import SHARED, CanonicalCheckpoint
from m2mkd_ds.checkpoint.state.find import find_checkpoint
from m2mkd_ds.checkpoint.state.safetensors_stream import TensorInfo, file_order, write_stream
from m2mkd_ds.logs import Progress

What = Literal["weights", "ema", "all"]
_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SCALAR = "scalar"
Entries = dict[str, tuple[str, str]]
"""Name in the file -> (kind, canonical name)."""


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    source: Path
    step: int
    files: tuple[Path, ...]
    """Weights files, then the index if there is one."""
    tensors: int
    bytes: int
    """Of all tensors."""


def consolidate(source: Path, out: Path, *, what: What = "weights", max_shard_bytes: int | None = None) -> Consolidated:
    """Write the checkpoint `source` (or the newest good one in it) to `out`, a new file `NAME.safetensors`.

    Where that would exceed `max_shard_bytes`: to NAME-00001-of-00003.safetensors, ... and NAME.safetensors.index.json. In memory
    are a few pieces of 4 MiB. Raises StoreError when the source is damaged or has no average, a file of that name exists, or its
    folder does not.
    """
    check_new_file(out, ".safetensors")
    folder, record = find_checkpoint(source)
    step = int(read_manifest(folder)["step"])
    checkpoint = CanonicalCheckpoint(folder)
    entries = _entries(checkpoint, what)
    infos = {name: _info(checkpoint, kind, key) for name, (kind, key) in entries.items()}
    shards = _cut(infos, max_shard_bytes)
    names = [out.name] if len(shards) == 1 else [f"{out.stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    index = f"{out.name}.index.json"
    for name in {*names, index}:
        if (out.parent / name).exists():
            raise StoreError(f"{out.parent / name}: exists already; nothing is written over: name another file")
    metadata = json.dumps({"what": what, "step": str(step), "record": json.dumps(record, sort_keys=True)}, sort_keys=True)
    total = sum(info.nbytes for info in infos.values())
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temp.mkdir()
        with Progress(len(infos), "consolidate") as bar:
            for name, shard in zip(names, shards, strict=True):
                write_stream(temp / name, shard, _pieces(checkpoint, entries, shard, bar), metadata)
        if len(shards) > 1:
            where = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            write_json_atomic(temp / index, {"metadata": {"total_size": total}, "weight_map": where})
            names.append(index)
        for name in names:  # the index last: what it lists is there
            os.rename(temp / name, out.parent / name)
        fsync_path(out.parent)
    except OSError as err:
        raise StoreError(f"{out}: not written ({err.strerror or err}); free space or choose another folder, then run it again") from err
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Consolidated(folder, step, tuple(out.parent / name for name in names), len(infos), total)


def parse_bytes(text: str) -> int:
    """`2GB` (10^9), `500MB`, `2GiB` (2^30) or a plain number -> bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or not float(match[1]) * unit >= 1:
        raise ValueError(f"max-shard-size is {text}; allowed is a number with a unit, such as 2GB, 500MB or 2GiB")
    return int(float(match[1]) * unit)


def _entries(checkpoint: CanonicalCheckpoint, what: What) -> Entries:
    if what == "ema" and "ema" not in checkpoint.kinds:
        raise StoreError(f"{checkpoint.folder}: keeps no moving average (it was trained with ema_decay 0); take --what weights")
    entries: Entries = {name: ("ema" if what == "ema" else "master", name) for name in checkpoint.tensors}
    entries |= {name: (SHARED, name) for name in checkpoint.shared}
    if what == "all":
        entries |= {f"{kind}/{name}": (kind, name) for kind in checkpoint.kinds if kind != "master" for name in checkpoint.tensors}
        entries |= {f"{_SCALAR}/{kind}": (_SCALAR, kind) for kind in checkpoint.scalars}
    return entries


def _info(checkpoint: CanonicalCheckpoint, kind: str, key: str) -> TensorInfo:
    if kind == _SCALAR:
        return TensorInfo(checkpoint.scalars[key].dtype, checkpoint.scalars[key].shape)
    return TensorInfo(checkpoint.dtype(kind, key), checkpoint.shape(kind, key))


def _cut(infos: Mapping[str, TensorInfo], limit: int | None) -> list[dict[str, TensorInfo]]:
    """Fill one shard after the other in the module's order; a tensor above the limit gets a shard of its own."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in infos.items():
        if limit is not None and shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def _pieces(checkpoint: CanonicalCheckpoint, entries: Entries, infos: Mapping[str, TensorInfo], bar: Progress) -> Iterator[Tensor]:
    for name in file_order(infos):
        kind, key = entries[name]
        if kind == _SCALAR:
            yield checkpoint.scalars[key]
        elif infos[name].shape.numel():
            yield from checkpoint.runs(kind, key)
        bar.advance()
