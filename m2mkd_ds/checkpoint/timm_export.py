"""Folders in timm's own layout: the teacher whose modules were split or trained here, and the student.

    config.json (architecture, model_args, pretrained_cfg), model.safetensors    timm.create_model("local-dir:FOLDER", pretrained=True)

The same folder on the hub is `hf-hub:USER/NAME`. A teacher needs timm alone; the student's architecture is registered by
`import m2mkd_ds.timm_models`. Every folder is loaded by timm and compared with the given tensors before it takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import read_json, write_json_atomic
from m2mkd_ds.checkpoint.hf.files import new_folder
from m2mkd_ds.checkpoint.mapping import apply_rules, same_bits
from m2mkd_ds.config import DataConfig
from m2mkd_ds.models.variants import OWNED_ARGS, VitArch, meta_device_model

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def input_cfg(architecture: str, data: DataConfig, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """timm's `pretrained_cfg`: inputs as in the evaluation that this project measures with, and the head."""
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "input_size": (3, data.image_size, data.image_size),
        "fixed_input_size": True,
        "mean": data.mean,
        "std": data.std,
        "interpolation": data.interpolation,
        "crop_pct": data.crop_pct,
        "crop_mode": "center",
        "num_classes": data.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return {**cfg, "label_names": tuple(class_names)} if class_names else cfg


def join_modules(arch: VitArch, modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The whole teacher's state dict, in timm's order, of its modules' (named for messages).

    Raises ValueError for a tensor that two modules hold, and MappingError for what the whole model lacks or does not have.
    """
    owner: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for module, held in modules.items():
        for name, tensor in held.items():
            if name in owner:
                raise ValueError(f"{name} comes from {owner[name]} and from {module}: every tensor may come from one module only")
            owner[name], tensors[name] = module, tensor
    whole = {name: tensor.shape for name, tensor in meta_device_model(arch).state_dict().items()}
    filled, _ = apply_rules(tensors, whole)
    return {name: filled[name] for name in whole}


def export_teacher(
    arch: VitArch,
    tensors: Mapping[str, Tensor],
    out: Path,
    *,
    data: DataConfig,
    class_names: Sequence[str] = (),
    lineage: Mapping[str, str] | None = None,
) -> Path:
    """Write the timm model `arch` with the whole state dict `tensors`. `lineage` (say, the metadata of the modules) goes into config.json.

    Raises ValueError when `out` is something else than an older folder of this kind, and when timm does not give the tensors back.
    """
    model = meta_device_model(arch)
    architecture = str(model.pretrained_cfg["architecture"])
    config = {
        "architecture": architecture,
        "num_classes": arch.num_classes,
        "num_features": int(model.num_features),
        "global_pool": str(model.global_pool),
        "model_args": _model_args(arch, model),
        "pretrained_cfg": {**input_cfg(architecture, data, class_names), "first_conv": model.pretrained_cfg["first_conv"]},
    }
    return write_timm_folder(Path(out), {**config, "m2mkd_ds": dict(lineage or {})}, tensors)


def write_timm_folder(out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """The folder beside its place, read back by timm, then renamed. Raises ValueError, and StoreError when it cannot be written."""
    with new_folder(out, _is_timm_folder, "no folder in timm's layout") as temp:
        # One metadata key only: safetensors writes several in random order. transformers reads timm's folders too and asks for this one.
        packed = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in sorted(tensors.items())}
        save_file(packed, temp / WEIGHTS, metadata={"format": "pt"})
        os.chmod(temp / WEIGHTS, 0o644)  # save_file makes it private to the user
        write_json_atomic(temp / CONFIG, _labels_on_top(config))
        _read_back(temp, tensors)
    return out


def _labels_on_top(config: Mapping[str, Any]) -> dict[str, Any]:
    """Class names where timm writes them and transformers looks for them: beside `pretrained_cfg`, not in it."""
    inputs = dict(config["pretrained_cfg"])
    labels = inputs.pop("label_names", None)
    return {**config, **({"label_names": labels} if labels else {}), "pretrained_cfg": inputs}


def _is_timm_folder(folder: Path) -> bool:
    return (
        (folder / CONFIG).is_file()
        and (folder / WEIGHTS).is_file()
        and "architecture" in read_json(folder / CONFIG, if_damaged=f"choose another folder, or delete {folder}")
    )


def _read_back(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless timm's own loader makes a model of the folder that holds exactly the given bits."""
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
    differing = sorted(name for name in {*loaded, *tensors} if name not in loaded or not same_bits(loaded[name], tensors[name].cpu()))
    if differing:
        raise ValueError(f"timm {timm.__version__} reads other weights from the folder than were written ({', '.join(differing[:5])})")


def _model_args(arch: VitArch, model: Any) -> dict[str, Any]:
    """Arguments that rebuild the model where this project is absent; those of a `hf-hub:` or `local-dir:` teacher's own file included.

    Raises ValueError where the installed timm does not tell the latter.
    """
    built_with = getattr(model, "_model_args", None)
    if built_with is None and ":" in arch.arch:
        raise ValueError(
            f"teacher.arch {arch.arch}: timm {timm.__version__} does not tell the arguments in its config; use timm 1.0.31 or newer"
        )
    owned = {*OWNED_ARGS, "cache_dir", "pretrained_cfg"}
    given = {name: value for name, value in {**(built_with or {}), **arch.arch_args}.items() if name not in owned}
    depth = {} if arch.depth is None else {"depth": arch.depth}
    return {**given, **depth, "img_size": arch.image_size}
