"""Old checkpoints (Deep Incubation's and the m2mKD authors' .pth files) -> canonical tensors, complete or not at all.

    .pth --legacy_files--> keys as in the file --legacy_layout: two passes of rules--> canonical names --check--> LegacyCheckpoint

First pass: the copies of each weight become one, under the block's number in the whole model. Second pass: the vocabulary.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from m2mkd_ds.checkpoint.legacy.files import LegacyPart, load_parts
from m2mkd_ds.checkpoint.legacy.layout import LegacyError, canonical_rules, expected_shapes, stage_rules
from m2mkd_ds.checkpoint.mapping import MappingError, MappingReport, check_target, transform
from m2mkd_ds.checkpoint.store import file_sha256, save_weights
from m2mkd_ds.models.spans import StageSpan, stage_spans

__all__ = ["LegacyCheckpoint", "LegacyError", "convert_legacy", "read_legacy"]

_log = logging.getLogger("m2mkd_ds")


@dataclass(frozen=True)
class LegacyCheckpoint:
    """Canonical tensors of an old checkpoint, and what it is."""

    tensors: dict[str, Tensor]
    kind: Literal["model", "stage"]
    """model: all stages. stage: one of them."""
    layout: str
    """What the file is, for example `model+model_stages` or `teacher module`."""
    depths: tuple[int, ...]
    """Blocks per stage of the whole model."""
    stage: int | None
    """Which stage it is; None for a whole model."""
    model_name: str = ""
    """The authors' name of the architecture, where the file has it."""

    @property
    def experts(self) -> dict[int, int]:
        """Block -> number of experts, for the sparse blocks."""
        found = {re.fullmatch(r"blocks\.(\d+)\.moe\.router\.weight", name): tensor.shape[0] for name, tensor in self.tensors.items()}
        return dict(sorted((int(match[1]), count) for match, count in found.items() if match))

    @property
    def stitches(self) -> tuple[str, ...]:
        """Stitch layers it holds, for example ("1.post", "1.pre")."""
        found = (re.match(r"stitches\.(\d+\.(?:pre|post))\.", name) for name in self.tensors)
        return tuple(sorted({match[1] for match in found if match}))

    def __str__(self) -> str:
        what = "whole model" if self.stage is None else f"stage {self.stage}"
        name = f"{self.model_name}, " if self.model_name else ""
        sparse = f", {len(self.experts)} sparse blocks" if self.experts else ""
        stitches = f", stitches {', '.join(self.stitches)}" if self.stitches else ""
        return f"{what} of depths {list(self.depths)}, {len(self.tensors)} tensors{sparse}{stitches} ({name}{self.layout})"

    def metadata(self) -> dict[str, str]:
        """The description as safetensors metadata."""
        plain = {"depths": self.depths, "stage": self.stage, "experts": self.experts, "stitches": self.stitches}
        return {"kind": self.kind, "layout": self.layout, "model_name": self.model_name, **{k: json.dumps(v) for k, v in plain.items()}}


def read_legacy(
    path: str | Path | Sequence[str | Path], *, depths: Sequence[int] | None = None, stage: int | None = None
) -> LegacyCheckpoint:
    """Read a .pth file, or one file a stage: teacher modules in any order (they say which they are), else stage i in the i-th file.

    `depths` are the blocks per stage of the whole model; needed where the files do not tell. `stage` picks one stage out of
    several, or says which one a single-stage file is. All copies of a weight must agree bit for bit, and no weight of the
    stages may lack. Tensors keep their dtype and may be mapped from the file: do not write over it while using them.
    Raises LegacyError; MappingError, which lists keys.
    """
    wanted = tuple(depths) if depths is not None else None
    parts = [part for item in _as_paths(path) for part in load_parts(item)]
    if len(parts) == 1:
        result = _read_one(parts[0], wanted, stage)
    else:
        result = _read_several(parts, wanted, stage)
    _log.info("%s: %s", parts[0].where, result)
    return result


def convert_legacy(
    path: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    depths: Sequence[int] | None = None,
    stage: int | None = None,
    metadata: Mapping[str, str] | None = None,
) -> LegacyCheckpoint:
    """`read_legacy`, then write safetensors to `out` with the description and the sources' SHA-256 as metadata. Raises StoreError, too."""
    checkpoint = read_legacy(path, depths=depths, stage=stage)
    sources = {Path(item).name: file_sha256(item) for item in _as_paths(path)}
    save_weights(out, checkpoint.tensors, {**checkpoint.metadata(), "sources": json.dumps(sources), **(metadata or {})})
    return checkpoint


def _as_paths(path: str | Path | Sequence[str | Path]) -> list[str | Path]:
    paths = [path] if isinstance(path, (str, Path)) else list(path)
    if not paths:
        raise LegacyError("no checkpoint file given")
    return paths


def _read_one(part: LegacyPart, depths: tuple[int, ...] | None, stage: int | None) -> LegacyCheckpoint:
    """One part: a whole model, one stage out of it, or a file that is one stage."""
    target = _target_depths(part, depths, stage)
    if part.block_index is not None:
        if stage not in (None, part.block_index):
            raise LegacyError(
                f"{part.where}: this teacher module is stage {part.block_index} (its block_index), but stage {stage} is asked for"
            )
        stage = part.block_index
    if stage is not None and not 0 <= stage < len(target):
        raise LegacyError(f"{part.where}: stage {stage} is asked for; depths {list(target)} have stages 0 to {len(target) - 1}")
    file_depths = part.depths
    if not part.knows_stages and sum(target) == sum(file_depths):
        file_depths = target
    # A whole model may be cut anew: the cut is not in its names.
    if len(target) == 1 or (stage is None and sum(file_depths) == sum(target)):
        stage, cut = None, file_depths
        target_of = {k: k for k in range(len(cut))}
    elif stage is None:
        raise LegacyError(
            f"{part.where}: holds stages of {list(file_depths)} blocks, the whole model has {list(target)}; say which stage is wanted"
        )
    else:
        cut = target
        target_of = {stage if len(file_depths) == len(target) else 0: stage}
    for k, t in target_of.items():
        if k >= len(file_depths) or file_depths[k] != cut[t]:
            raise LegacyError(
                f"{part.where}: holds stages of {list(file_depths)} blocks, which do not have stage {t} of depths {list(cut)}"
            )
    span = StageSpan.whole(sum(target)) if stage is None else stage_spans(target)[stage]
    try:
        merged, _ = transform(part.tensors, stage_rules(file_depths, cut, target_of))
        tensors, report = transform(merged, canonical_rules(cut))
        check_target(tensors, expected_shapes(tensors, span), report)
    except MappingError as err:
        raise err.at(part.where) from None
    if cut != target and any(name.startswith("stitches.") for name in tensors):
        raise LegacyError(f"{part.where}: has stitch layers between stages of {list(cut)} blocks, so it cannot be cut into {list(target)}")
    return LegacyCheckpoint(tensors, "model" if stage is None else "stage", part.layout, target, stage, part.model_name)


def _target_depths(part: LegacyPart, depths: tuple[int, ...] | None, stage: int | None) -> tuple[int, ...]:
    """Blocks per stage of the whole model: as asked for, else as the file tells."""
    known = part.divided_depths or (part.depths if len(part.depths) > 1 else ())
    if depths is None and not known and stage not in (None, 0):
        raise LegacyError(f"{part.where}: is one stage and does not tell the others; give the depths of the whole model")
    if depths is not None and part.divided_depths not in ((), depths):
        raise LegacyError(
            f"{part.where}: was cut from a model of depths {list(part.divided_depths)}, but depths {list(depths)} are asked for"
        )
    return depths if depths is not None else known or part.depths


def _read_several(parts: Sequence[LegacyPart], depths: tuple[int, ...] | None, stage: int | None) -> LegacyCheckpoint:
    """One part a stage; together they must be a whole model, of which `stage` may pick one."""
    ids = [i if part.block_index is None else part.block_index for i, part in enumerate(parts)]
    told = {part.divided_depths for part in parts if part.divided_depths}
    if len(told) > 1:
        raise LegacyError(f"{parts[0].where} and others: modules of different models, cut at {sorted(map(list, told))}")
    counted = tuple(
        part.depths[i if len(part.depths) > 1 else 0] for i, part in enumerate(parts) if i < len(part.depths) or len(part.depths) == 1
    )
    target = depths or next(iter(told), counted)
    twice = sorted(i for i, count in Counter(ids).items() if count > 1)
    lacking = sorted(set(range(len(target))) - set(ids))
    if twice or lacking or len(parts) != len(target):
        raise LegacyError(
            f"{parts[0].where} and others: {len(parts)} files for {len(target)} stages; stages twice: {twice}, stages missing: {lacking}"
        )
    tensors: dict[str, Tensor] = {}
    chosen = [(i, part) for i, part in zip(ids, parts, strict=True) if stage in (None, i)]
    if not chosen:
        raise LegacyError(f"{parts[0].where} and others: stage {stage} is asked for; there are stages 0 to {len(target) - 1}")
    for i, part in chosen:
        tensors.update(_read_one(part, target, i).tensors)
    if stage is None:
        # Again over the union: stages of different widths or vocabularies are each complete, but no model.
        check_target(tensors, expected_shapes(tensors, StageSpan.whole(sum(target))), MappingReport())
    layout = f"{parts[0].layout}, {len(parts)} parts"
    return LegacyCheckpoint(tensors, "model" if stage is None else "stage", layout, target, stage, parts[0].model_name)
