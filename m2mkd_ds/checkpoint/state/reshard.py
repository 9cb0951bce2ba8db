"""A checkpoint written anew for a cluster of another shape: every value the same, bit for bit, each on the rank that will ask for it.

The engine loads a checkpoint of any shape by itself; this saves the ranks of a big job from reading pieces out of many files, and
is the way to look at what would come out. What is in memory at any time is one piece of a tensor, whatever the model.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError, fsync_path
from m2mkd_ds.checkpoint.saves.manifest import FileRecord, read_manifest, write_manifest
from m2mkd_ds.checkpoint.state.find import find_checkpoint
from m2mkd_ds.checkpoint.state.layout import FlatGroup, lay_out
from m2mkd_ds.checkpoint.state.rank_files import Description, RankFiles, rank_file, rank_tensors, stream_rank_file
from m2mkd_ds.checkpoint.state.safetensors_stream import PIECE_NUMEL, TensorInfo, file_order
from m2mkd_ds.logs import Progress

_MIB = 1 << 20


@dataclass(frozen=True)
class Resharded:
    """What was done."""

    source: Path
    out: Path
    step: int
    before: Description
    after: Description
    bytes: int
    """Of the new folder's files, without the manifest."""


def reshard(source: Path, out: Path, *, ep_size: int, data_size: int, zero_stage: int | None = None) -> Resharded:
    """Lay the checkpoint `source` (or the newest good one in it) out for ep_size * data_size ranks, as the new folder `out`.

    `zero_stage` None keeps the one that wrote it. The folder appears whole, with its manifest, or not at all. Raises StoreError when the
    source is damaged, `out` exists or bears another step's number, the disk is too small, or the experts cannot be spread like that.
    """
    folder, record = find_checkpoint(source)
    manifest = read_manifest(folder)
    step = int(manifest["step"])
    files = RankFiles(folder)
    beside = _files_beside(folder, manifest, files.description.size)
    after = laid_out_for(files.description, ep_size=ep_size, data_size=data_size, zero_stage=zero_stage)
    _check_out(out, step)
    once = _kept_once(files)
    planned = [rank_tensors(after, rank, once) for rank in range(after.size)]
    _check_room(out.parent, sum(info.nbytes for infos in planned for info in infos.values()))
    temp = out.with_name(out.name + ".tmp")  # a name that a save clears away, should this process be killed
    try:
        temp.mkdir()
        written = _write_ranks(temp, files, after, planned)
        for name, file in beside.items():
            (temp / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, temp / name)
            fsync_path(temp / name)
            written[name] = file
        parts = {str(rank): [rank_file(temp, rank).name] for rank in range(after.size)}
        history = _with_history(record, files.description, after)
        write_manifest(temp, step, history, attempt=uuid.uuid4().hex, files=written, parts=parts)
        fsync_path(temp)
        os.rename(temp, out)
        fsync_path(out.parent)
    except OSError as err:
        raise StoreError(f"{out}: not written ({err.strerror or err}); free space or choose another folder, then run it again") from err
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Resharded(folder, out, step, files.description, after, sum(file.bytes for file in written.values()))


def laid_out_for(description: Description, *, ep_size: int, data_size: int, zero_stage: int | None) -> Description:
    """The same training state on ep_size * data_size ranks, grouped as the engine would. Raises StoreError for what cannot be."""
    stage = description.zero_stage if zero_stage is None else zero_stage
    _check_shape(description, ep_size, data_size, stage)
    kind, size = "parted" if stage == 3 else "flat", ep_size * data_size
    groups = []
    for spread in (False, True):
        for family in sorted({p.family for p in description.parameters}):
            members = [p for p in description.parameters if p.family == family and (p.is_expert and ep_size > 1) == spread]
            if members:
                place = {"data_size": data_size, "ep_size": ep_size} if spread else {"data_size": size, "ep_size": 1}
                groups.append(lay_out(kind, {p.name: p.shape for p in members}, **place))
    return Description(size, stage, description.kinds, description.parameters, tuple(groups))


def _check_shape(description: Description, ep_size: int, data_size: int, stage: int) -> None:
    if ep_size < 1 or data_size < 1 or stage not in (1, 2, 3):
        raise StoreError(f"ep is {ep_size}, dp is {data_size}, zero is {stage}; allowed are ep >= 1, dp >= 1 and zero 1, 2 or 3")
    experts = {p.name: p.shape[0] for p in description.parameters if p.is_expert}
    if ep_size > 1 and not experts:
        raise StoreError(f"ep is {ep_size}, but the model of this checkpoint has no experts; set it to 1")
    wrong = next(((name, n) for name, n in experts.items() if n % ep_size), None)
    if wrong:
        allowed = [str(n) for n in range(1, max(experts.values()) + 1) if all(e % n == 0 for e in experts.values())]
        raise StoreError(f"ep is {ep_size} and {wrong[0]} has {wrong[1]} experts; allowed are the divisors {', '.join(allowed)}")
    if ep_size > 1 and stage == 3:
        raise StoreError(
            f"ep is {ep_size} with ZeRO-3: DeepSpeed supports expert parallelism up to stage 2; give --zero 1 or --zero 2, or --ep 1 "
            "(ZeRO-3 spreads the experts over all ranks by itself)"
        )


def _check_out(out: Path, step: int) -> None:
    if out.exists():
        raise StoreError(f"{out}: exists already; nothing is written over: name a new folder")
    number = out.name.removeprefix("step-")
    if out.name.startswith("step-") and (not number.isdigit() or int(number) != step):
        raise StoreError(f"{out}: the checkpoint is of step {step}, so a folder to go on from is called step-{step:08d}")
    if not out.parent.is_dir():
        raise StoreError(f"{out.parent}: no such folder; make it first")
    if out.with_name(out.name + ".tmp").exists():
        raise StoreError(f"{out}.tmp: left by a command that was killed, or one that still runs; delete it and run this again")


def _check_room(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StoreError(f"{place}: {needed / _MIB:.0f} MiB are to be written, and {free / _MIB:.0f} MiB are free on that disk")


def _files_beside(folder: Path, manifest: Mapping[str, Any], size: int) -> dict[str, FileRecord]:
    """What the checkpoint holds besides the engine's files, to be copied. Raises StoreError for a file of one rank: it has no new place."""
    engine = {rank_file(folder, rank).name for rank in range(size)}
    beside = {name: FileRecord(entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items() if name not in engine}
    of_a_rank = [name for name in beside if re.search(r"rank_?\d+", name)]
    if of_a_rank:
        raise StoreError(f"{folder}: holds {of_a_rank[0]}, a rank's own file that this version cannot move to another number of ranks")
    return beside


def _kept_once(files: RankFiles) -> dict[str, TensorInfo]:
    scalars = {f"scalar.{name}": TensorInfo(value.dtype, value.shape) for name, value in files.scalars.items()}
    return scalars | {f"shared.{name}": info for name, info in files.shared.items()}


def _write_ranks(folder: Path, files: RankFiles, after: Description, planned: list[dict[str, TensorInfo]]) -> dict[str, FileRecord]:
    total = sum(info.nbytes for infos in planned for info in infos.values())
    written: dict[str, FileRecord] = {}
    with Progress(max(1, total // _MIB), "reshard (MiB)") as bar:
        for rank, infos in enumerate(planned):
            layouts = [group.at(rank) for group in after.groups]
            pieces = _counted(_pieces(files, layouts, infos), bar)
            written |= stream_rank_file(folder, after, rank, infos, pieces)
    return written


def _counted(pieces: Iterator[Tensor], bar: Progress) -> Iterator[Tensor]:
    """The pieces, with whole MiB told to the progress bar."""
    pending = 0
    for piece in pieces:
        yield piece
        pending += piece.nbytes
        bar.advance(pending // _MIB)
        pending %= _MIB


def _pieces(files: RankFiles, layouts: list[FlatGroup], infos: Mapping[str, TensorInfo]) -> Iterator[Tensor]:
    """A rank's file, piece by piece in its order."""
    for name in file_order(infos):
        head, _, tail = name.partition(".")
        if head == "scalar":
            yield files.scalars[tail]
        elif head == "shared":
            yield from files.runs_shared(tail)
        else:
            yield from _part(files, tail, layouts[int(head.removeprefix("group"))])


def _part(files: RankFiles, kind: str, layout: FlatGroup) -> Iterator[Tensor]:
    """A rank's part of a group, piece by piece, with zeros for padding."""
    at = 0
    for offset, run in files.runs_held(kind, layout):
        yield from _zeros(offset - at)
        yield run
        at = offset + run.numel()
    yield from _zeros(layout.part_numel - at)


def _zeros(numel: int) -> Iterator[Tensor]:
    for at in range(0, numel, PIECE_NUMEL):
        yield torch.zeros(min(PIECE_NUMEL, numel - at))


def _with_history(record: Mapping[str, Any], before: Description, after: Description) -> dict[str, Any]:
    """The record of the source, and one more line of where its values have been."""
    move = {"from": _shape(before), "to": _shape(after)}
    return {**record, "resharded": [*record.get("resharded", []), move]}


def _shape(description: Description) -> dict[str, int]:
    return {"ranks": description.size, "ep_size": description.ep_size, "zero_stage": description.zero_stage}
