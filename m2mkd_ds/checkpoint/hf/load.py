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
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if config.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{folder}: config.json is of model_type {config.get('model_type')!r}; expected {MODEL_TYPE!r}, an export of m2mkd_ds"
        )
    verify_manifest(folder)
    arch, stitches = arch_from_config_json(config)
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors = {name: t.float() for shard in shards for name, t in read_weights(folder / shard).items()}
    check_names(tensors, parameter_shapes(arch, StageSpan.whole(arch.num_blocks), stitches=stitches), str(folder))
    return Exported(tensors, arch, stitches, data_from_processor(read_json(folder / "preprocessor_config.json"), arch.num_classes))


def class_names_of(folder: Path) -> list[str]:
    """Class names of an exported folder, in the order of the logits."""
    labels: dict[str, str] = read_json(Path(folder) / "config.json")["id2label"]
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
