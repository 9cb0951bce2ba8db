"""The files of an exported folder: written whole or not at all, large models in several shards."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError, fsync_path, write_json_atomic
from m2mkd_ds.checkpoint.hf.manifest import MANIFEST


@contextmanager
def new_folder(out: Path, is_ours: Callable[[Path], bool] | None = None, kind: str = "not an export") -> Iterator[Path]:
    """An empty folder beside `out` that takes its place at the end; after an error neither a half folder nor a lost old one.

    `is_ours` says whether a folder that is there may be replaced (by default, when it has a manifest), `kind` what the refusal calls it.
    Raises ValueError, and StoreError.
    """
    may_go = is_ours or (lambda folder: (folder / MANIFEST).is_file())
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or may_go(out))):
        raise ValueError(f"{out}: exists and is {kind}; choose another folder or delete it")
    temp, old = (out.with_name(f".{out.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    try:
        temp.mkdir(parents=True)
        yield temp
        for file in temp.iterdir():
            fsync_path(file)
        fsync_path(temp)
        if out.exists():
            os.replace(out, old)
        os.replace(temp, out)
        fsync_path(out.parent)
    except (OSError, SafetensorError) as err:
        reason = getattr(err, "strerror", None) or err
        raise StoreError(f"{out}: not exported ({reason}); free space or choose another folder, then run it again") from err
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)


def write_shards(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> None:
    """Names in order, a new file when the next tensor would pass the limit; transformers' file names and index."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name in sorted(weights):
        keep = torch.float32 if ".moe.router." in name else dtype
        tensor = weights[name].detach().to("cpu", keep).clone(memory_format=torch.contiguous_format)
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    single = len(shards) == 1
    names = ["model.safetensors"] if single else [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for file_name, shard in zip(names, shards, strict=True):
        # One metadata key only: safetensors writes several in random order. transformers asks for this one.
        save_file(shard, folder / file_name, metadata={"format": "pt"})
        os.chmod(folder / file_name, 0o644)  # save_file makes it private to the user
    if not single:
        metadata = {"total_parameters": sum(w.numel() for w in weights.values()), "total_size": total}
        weight_map = {name: file_name for file_name, shard in zip(names, shards, strict=True) for name in shard}
        write_json_atomic(folder / "model.safetensors.index.json", {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def parse_size(text: str, what: str = "export.max_shard_size") -> int:
    """`500KB`, `2GB`, `123` -> bytes (powers of 1000, as in transformers). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB|TB)", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError(f"{what} is {text!r}; expected a positive number of bytes such as 500MB or 2GB")
    return int(match[1]) * 1000 ** ["", "KB", "MB", "GB", "TB"].index(match[2].upper())
