"""A trained V-MoE -> a Hugging Face folder that anybody loads with transformers alone.

    config.json, preprocessor_config.json, model*.safetensors, the code of hf_template/, README.md, manifest.json

Weights keep their canonical names: the folder's model is a VisionMoE written with torch and transformers only (hf_template/).
The folder is written beside its place and renamed, and holds no date, so that the same input gives the same bytes.
The way back is hf_load.py, the way to a hub hf_push.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor

from m2mkd_ds.checkpoint.atomic import write_json_atomic
from m2mkd_ds.checkpoint.hf.card import write_card
from m2mkd_ds.checkpoint.hf.check import check_export
from m2mkd_ds.checkpoint.hf.config import CODE_FILES, DTYPES, check_exportable, model_config, processor_config
from m2mkd_ds.checkpoint.hf.files import new_folder, parse_size, write_shards
from m2mkd_ds.checkpoint.hf.load import Exported, check_names, class_names_of, load_exported
from m2mkd_ds.checkpoint.hf.manifest import verify_manifest, write_manifest
from m2mkd_ds.config import DataConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VMoEArch, parameter_shapes

__all__ = [
    "CODE_FILES", "Exported", "check_export", "check_exportable", "class_names_of", "export_hf", "load_exported", "parse_size",
    "verify_manifest",
]  # fmt: skip


def export_hf(
    weights: Mapping[str, Tensor],
    arch: VMoEArch,
    out: Path,
    *,
    class_names: Sequence[str],
    data: DataConfig,
    license: str,
    stitches: Sequence[StitchSpec] = (),
    card: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    max_shard_size: str = "2GB",
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write the folder `out` (an older export there is replaced) and return it.

    `weights`: canonical names, exactly those of VisionMoE(arch, whole model, stitches). `card`: what the model card says, see
    `hf_card.write_card`. `dtype`: fp32 | bf16 | fp16; router weights stay fp32, the model computes with them in fp32. `check` gets the
    finished folder before it takes its place, and may raise. Raises ValueError for weights, class names or data that do not fit,
    StoreError when the disk is full; then nothing is left.
    """
    _check_fit(weights, arch, stitches, class_names, data, dtype)
    limit = parse_size(max_shard_size)
    with new_folder(Path(out)) as folder:
        write_shards(folder, weights, DTYPES[dtype][1], limit)
        write_json_atomic(folder / "config.json", model_config(arch, stitches, class_names, dtype))
        write_json_atomic(folder / "preprocessor_config.json", processor_config(data))
        template = resources.files("m2mkd_ds.checkpoint") / "hf_template"
        for name in CODE_FILES:
            (folder / name).write_bytes((template / name).read_bytes())
        facts = {"name": Path(out).name, **(card or {})}
        write_card(folder / "README.md", arch, dtype=DTYPES[dtype][0], license=license, card=facts)
        write_manifest(folder)
        if check is not None:
            check(folder)
    return Path(out)


def _check_fit(
    weights: Mapping[str, Tensor],
    arch: VMoEArch,
    stitches: Sequence[StitchSpec],
    class_names: Sequence[str],
    data: DataConfig,
    dtype: str,
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"export dtype is {dtype!r}; allowed is one of {list(DTYPES)}")
    check_exportable(arch)
    if len(class_names) != arch.num_classes:
        raise ValueError(f"{len(class_names)} class names were given and the model has {arch.num_classes} classes; set export.class_names")
    if data.image_size != arch.image_size:
        raise ValueError(f"data.image_size is {data.image_size} and the model was built for {arch.image_size}; they must agree")
    check_names(weights, parameter_shapes(arch, StageSpan.whole(arch.num_blocks), stitches=stitches), "export")
