"""config.json and preprocessor_config.json of an exported folder: from our architecture and data settings, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch

from m2mkd_ds.checkpoint.hf.manifest import MODEL_TYPE
from m2mkd_ds.config import DataConfig, RouterConfig
from m2mkd_ds.models.vmoe import LAYER_NORM_EPS, StitchSpec, VMoEArch

CODE_FILES = ("configuration_vmoe.py", "experts_vmoe.py", "image_processing_vmoe.py", "modeling_vmoe.py", "routing_vmoe.py")
DTYPES = {"fp32": ("float32", torch.float32), "bf16": ("bfloat16", torch.bfloat16), "fp16": ("float16", torch.float16)}
"""Our name -> (transformers' name, torch's)."""
_RESAMPLE: dict[Literal["bilinear", "bicubic"], int] = {"bilinear": 2, "bicubic": 3}  # PIL's numbers, which image processors store
_BACKEND = {"auto": "auto", "grouped": "grouped", "reference": "loop"}  # ours -> the template's; all others become its `auto`


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
            "AutoModel": "modeling_vmoe.VMoEModel",
            "AutoModelForImageClassification": "modeling_vmoe.VMoEForImageClassification",
        },
        "dtype": DTYPES[dtype][0],
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

    The class is hf_template's own: those of transformers place the crop one pixel off where its margin is odd.
    """
    return {
        "auto_map": {"AutoImageProcessor": "image_processing_vmoe.VMoEImageProcessor"},
        "crop_size": {"height": data.image_size, "width": data.image_size},
        "do_center_crop": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(data.mean),
        "image_processor_type": "VMoEImageProcessor",
        "image_std": list(data.std),
        "resample": _RESAMPLE[data.interpolation],
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
