"""An exported folder -> weights, architecture and preprocessing for our own model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import read_json
from m2mkd_ds.checkpoint.hf.config import arch_from_config_json, data_from_processor
from m2mkd_ds.checkpoint.hf.manifest import MODEL_TYPE, verify_manifest
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import DataConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VMoEArch, parameter_shapes

_AGAIN = "export it again"
"""What helps against a damaged file."""


class Exported(NamedTuple):
    """What `load_exported` finds in a folder."""

    tensors: dict[str, Tensor]
    """fp32, canonical names."""
    arch: VMoEArch
    stitches: tuple[StitchSpec, ...]
    data: DataConfig
    """Only its preprocessing fields are meaningful: num_classes, image_size, mean, std, interpolation, crop_pct."""


def load_exported(folder: Path) -> Exported:
    """Read an exported folder for evaluation with VisionMoE.

    Raises StoreError for a missing or changed file, ValueError for a folder of another model or weights that do not fit it.
    """
    described = describe_export(Path(folder))
    tensors = {name: t.float() for file in described.files for name, t in read_weights(file).items()}
    shapes = parameter_shapes(described.arch, StageSpan.whole(described.arch.num_blocks), stitches=described.stitches)
    check_names(tensors, shapes, str(folder))
    return Exported(tensors, described.arch, described.stitches, described.data)


class Described(NamedTuple):
    """What an exported folder says of itself, without its weights."""

    arch: VMoEArch
    stitches: tuple[StitchSpec, ...]
    data: DataConfig
    files: tuple[Path, ...]
    """The weights files."""


def describe_export(folder: Path) -> Described:
    """Raises StoreError for a missing or changed file, ValueError for a folder of another model."""
    config = read_json(folder / "config.json", if_damaged=_AGAIN)
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder}: config.json is of model_type {config.get('model_type')!r}; expected {MODEL_TYPE!r}, an export of m2mkd_ds"
        )
    verify_manifest(folder)
    arch, stitches = arch_from_config_json(config)
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(read_json(index, if_damaged=_AGAIN)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    data = data_from_processor(read_json(folder / "preprocessor_config.json", if_damaged=_AGAIN), arch.num_classes)
    return Described(arch, stitches, data, tuple(folder / shard for shard in shards))


def class_names_of(folder: Path) -> list[str]:
    """Class names of an exported folder, in the order of the logits."""
    labels: dict[str, str] = read_json(Path(folder) / "config.json", if_damaged=_AGAIN)["id2label"]
    return [labels[str(i)] for i in range(len(labels))]


def check_names(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
    """Every name used, every name filled, every shape right; else one ValueError that lists them."""
    wrong = {
        "missing": sorted(set(shapes) - set(weights)),
        "unexpected": sorted(set(weights) - set(shapes)),
        "of another shape": [n for n in sorted(set(shapes) & set(weights)) if weights[n].shape != shapes[n]],
    }
    found = [f"{len(names)} {what}: {', '.join(names[:8])}" for what, names in wrong.items() if names]
    if found:
        raise ValueError(
            f"{where}: weights do not fit the model ({'; '.join(found)}); were stitches given or dropped as the model keeps them?"
        )
