"""A trained V-MoE -> a Hugging Face folder that anybody loads with transformers alone, and back.

    config.json, preprocessor_config.json, model*.safetensors, configuration_vmoe.py, modeling_vmoe.py, routing_vmoe.py, README.md,
    manifest.json

Weights keep their canonical names: the folder's model is a VisionMoE written with torch and transformers only (hf_template/).
The folder is written beside its place and renamed, and holds no date, so that the same input gives the same bytes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError, file_sha256, fsync_path, read_json, write_json_atomic
from m2mkd_ds.checkpoint.hf_card import write_card
from m2mkd_ds.checkpoint.hf_check import check_export
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import DataConfig, RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import LAYER_NORM_EPS, StitchSpec, VMoEArch, parameter_shapes

__all__ = ["Exported", "check_export", "class_names_of", "export_hf", "load_exported", "verify_manifest"]

MODEL_TYPE = "m2mkd_vmoe"
MANIFEST = "manifest.json"
CODE_FILES = ("configuration_vmoe.py", "modeling_vmoe.py", "routing_vmoe.py")
_DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16), "fp16": ("float16", torch.float16)}
_RESAMPLE: dict[Literal["bilinear", "bicubic"], int] = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, which image processors store
_BACKEND = {"auto": "auto", "grouped": "grouped", "reference": "loop"}  # ours -> the template's; all others become its `auto`


class Exported(NamedTuple):
    """What `load_exported` finds in a folder."""

    tensors: dict[str, Tensor]
    """fp32, canonical names."""
    arch: VMoEArch
    stitches: tuple[StitchSpec, ...]
    data: DataConfig
    """Only its preprocessing fields are meaningful: num_classes, image_size, mean, std, interpolation, crop_pct."""


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
) -> Path:
    """Write the folder `out` (an older export there is replaced) and return it.

    `weights`: canonical names, exactly those of VisionMoE(arch, whole model, stitches). `card`: what the model card says, see
    `hf_card.write_card`. `dtype`: fp32 | bf16 | fp16; router weights stay fp32, the model computes with them in fp32.
    Raises ValueError for weights, class names or data that do not fit, StoreError when the disk is full; then nothing is left.
    """
    _check_fit(weights, arch, stitches, class_names, data, dtype)
    limit = parse_size(max_shard_size)
    with _new_folder(Path(out)) as folder:
        _write_shards(folder, weights, _DTYPES[dtype][1], limit)
        write_json_atomic(folder / "config.json", model_config(arch, stitches, class_names, dtype))
        write_json_atomic(folder / "preprocessor_config.json", processor_config(data))
        template = resources.files("m2mkd_ds.checkpoint") / "hf_template"
        for name in CODE_FILES:
            (folder / name).write_bytes((template / name).read_bytes())
        write_card(folder / "README.md", arch, license=license, card={"name": Path(out).name, **(card or {})})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": file_sha256(p)} for p in sorted(folder.iterdir())}
        write_json_atomic(folder / MANIFEST, {"format": 1, "files": files})
    return Path(out)


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
    _check_names(tensors, parameter_shapes(arch, StageSpan.whole(arch.num_blocks), stitches=stitches), str(folder))
    return Exported(tensors, arch, stitches, data_from_processor(read_json(folder / "preprocessor_config.json"), arch.num_classes))


def verify_manifest(folder: Path) -> None:
    """Compare every file with the manifest, if there is one (transformers' save_pretrained writes none). Raises StoreError."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return
    for name, entry in read_json(manifest)["files"].items():
        if file_sha256(folder / name) != entry["sha256"]:
            raise StoreError(f"{folder / name}: changed since the export (its SHA-256 is not the manifest's); export it again")


def check_exportable(arch: VMoEArch) -> None:
    """Raises ValueError for an architecture that the template's model cannot compute."""
    if arch.moe_blocks and arch.router.kind in ("balanced", "zipf"):
        raise ValueError(
            f"student.moe.router.kind is {arch.router.kind!r}, a benchmark's router that ignores its tokens; a model to export needs topk, "
            "noisy_topk or expert_choice"
        )


def model_config(arch: VMoEArch, stitches: Sequence[StitchSpec], class_names: Sequence[str], dtype: str) -> dict[str, Any]:
    """config.json; its fields are documented in hf_template/configuration_vmoe.py."""
    return {
        "architectures": ["VMoEForImageClassification"],
        "auto_map": {
            "AutoConfig": "configuration_vmoe.VMoEConfig",
            "AutoModelForImageClassification": "modeling_vmoe.VMoEForImageClassification",
        },
        "dtype": _DTYPES[dtype][0],
        "expert_activation": arch.activation,
        "expert_backend": _BACKEND.get(arch.backend, "auto"),
        "hidden_size": arch.embed_dim,
        "id2label": {str(i): name for i, name in enumerate(class_names)},
        "image_size": arch.image_size,
        "initializer_range": 0.02,
        "label2id": {name: i for i, name in enumerate(class_names)},
        "layer_norm_eps": LAYER_NORM_EPS,
        "mlp_ratio": arch.mlp_ratio,
        "model_type": MODEL_TYPE,
        "moe_layers": list(arch.moe_blocks),
        "num_attention_heads": arch.num_heads,
        "num_channels": 3,
        "num_experts": arch.num_experts,
        "num_hidden_layers": arch.num_blocks,
        "patch_size": arch.patch_size,
        **{f"router_{f.name}": getattr(arch.router, f.name) for f in dataclasses.fields(RouterConfig)},
        "stitches": [dataclasses.asdict(s) for s in stitches] or None,
    }


def arch_from_config_json(config: Mapping[str, Any]) -> tuple[VMoEArch, tuple[StitchSpec, ...]]:
    """The inverse of `model_config`. Raises ValueError for a field that is missing."""
    backends = {hf: ours for ours, hf in _BACKEND.items()}
    try:
        arch = VMoEArch(
            image_size=config["image_size"],
            patch_size=config["patch_size"],
            num_classes=len(config["id2label"]),
            embed_dim=config["hidden_size"],
            num_heads=config["num_attention_heads"],
            mlp_ratio=config["mlp_ratio"],
            num_blocks=config["num_hidden_layers"],
            moe_blocks=tuple(config["moe_layers"]),
            num_experts=config["num_experts"],
            router=RouterConfig(**{f.name: config[f"router_{f.name}"] for f in dataclasses.fields(RouterConfig)}),
            backend=backends[config["expert_backend"]],
            activation=config["expert_activation"],
        )
        return arch, tuple(StitchSpec(**s) for s in config["stitches"] or ())
    except KeyError as err:
        raise ValueError(f"config.json: field {err} is missing or has no such value; export the model again") from err


def processor_config(data: DataConfig) -> dict[str, Any]:
    """preprocessor_config.json: the evaluation transform (resize the shorter side, centre crop, normalise).

    The class is CLIPImageProcessor, the plainest one in transformers that does these steps; nothing of CLIP is in it. One known
    difference: where the margin to crop is odd, transformers rounds it down and torchvision to even, one pixel apart.
    """
    return {
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(data.mean),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(data.std),
        "resample": _RESAMPLE[data.interpolation],
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": math.floor(data.image_size / data.crop_pct)},
    }


def data_from_processor(processor: Mapping[str, Any], num_classes: int) -> DataConfig:
    """The inverse of `processor_config`; crop_pct is one that leads to the same resize."""
    size, edge = processor["crop_size"]["height"], processor["size"]["shortest_edge"]
    crop_pct = size / edge
    if math.floor(size / crop_pct) != edge:  # rounding: aim at the middle of the pixel
        crop_pct = size / (edge + 0.5)
    names = {number: name for name, number in _RESAMPLE.items()}
    mean, std = (tuple(processor[key]) for key in ("image_mean", "image_std"))
    interpolation = names[processor["resample"]]
    return DataConfig(num_classes=num_classes, image_size=size, mean=mean, std=std, interpolation=interpolation, crop_pct=crop_pct)


def parse_size(text: str) -> int:
    """`500KB`, `2GB`, `123` -> bytes (powers of 1000, as in transformers). Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*(|KB|MB|GB|TB)", text.strip(), re.IGNORECASE)
    if not match or int(match[1]) == 0:
        raise ValueError(f"export.max_shard_size is {text!r}; expected a positive number of bytes such as 500MB or 2GB")
    return int(match[1]) * 1000 ** ["", "KB", "MB", "GB", "TB"].index(match[2].upper())


def _check_fit(
    weights: Mapping[str, Tensor],
    arch: VMoEArch,
    stitches: Sequence[StitchSpec],
    class_names: Sequence[str],
    data: DataConfig,
    dtype: str,
) -> None:
    if dtype not in _DTYPES:
        raise ValueError(f"export dtype is {dtype!r}; allowed is one of {list(_DTYPES)}")
    check_exportable(arch)
    if len(class_names) != arch.num_classes:
        raise ValueError(f"{len(class_names)} class names were given and the model has {arch.num_classes} classes; set export.class_names")
    if data.image_size != arch.image_size:
        raise ValueError(f"data.image_size is {data.image_size} and the model was built for {arch.image_size}; they must agree")
    _check_names(weights, parameter_shapes(arch, StageSpan.whole(arch.num_blocks), stitches=stitches), "export")


def _check_names(weights: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], where: str) -> None:
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


def _write_shards(folder: Path, weights: Mapping[str, Tensor], dtype: torch.dtype, limit: int) -> None:
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


@contextmanager
def _new_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that takes its place at the end; after an error neither a half folder nor a lost old one."""
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST).is_file())):
        raise ValueError(f"{out}: exists and is not an export; choose another folder or delete it")
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
        raise StoreError(f"{out}: not exported ({err}); free space or choose another folder, then run it again") from err
    finally:
        if old.exists() and not out.exists():
            os.replace(old, out)
        for leftover in (temp, old):
            shutil.rmtree(leftover, ignore_errors=True)


def class_names_of(folder: Path) -> list[str]:
    """Class names of an exported folder, in the order of the logits."""
    labels: dict[str, str] = read_json(Path(folder) / "config.json")["id2label"]
    return [labels[str(i)] for i in range(len(labels))]
