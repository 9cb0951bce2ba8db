"""VitArch, the description of any timm VisionTransformer that can be cut into stages; models/vit.py makes stages from it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from m2mkd_ds.config import ConfigError, RunConfig

TIMM_NAMES = {
    "deit_large_patch16_224": "vit_large_patch16_224",
    "deit_huge_patch14_224": "vit_huge_patch14_224",
}
"""DeiT-L and DeiT-H of Deep Incubation: a training recipe, not an architecture. timm knows the same shapes as ViT-L and
ViT-H, and has no weights under the DeiT names."""

EMBED_PARTS = ("patch_embed", "cls_token", "reg_token", "pos_embed", "pos_drop", "patch_drop", "norm_pre")
"""What the first stage owns, by timm's attribute names."""

TAIL_PARTS = ("norm", "attn_pool", "fc_norm", "head_drop", "head")
"""What the last stage owns."""

OWNED_ARGS = {
    "num_classes": "data.num_classes",
    "img_size": "data.image_size",
    "drop_path_rate": "drop_path of the training phase",
    "pretrained": "teacher.weights",
    "checkpoint_path": "teacher.weights",
    "in_chans": "the loader, which always gives 3 channels",
    "device": "the launcher",
    "dtype": "precision of the training phase",
}
"""Arguments of timm.create_model that arch_args may not set, and the field that owns each."""


def timm_name(arch: str) -> str:
    """The name that timm's registry has for `arch` (a pretrained tag after a dot is kept).

    Raises ValueError, with the nearest names, if there is none. Names with a source (`hf-hub:...`, `local-dir:...`) are
    timm's business and pass through.
    """
    name, dot, tag = arch.partition(".")
    if ":" in arch:
        return arch
    if name in TIMM_NAMES:
        if dot:
            raise ValueError(f"teacher.arch {arch!r}: timm has no weights tagged {tag!r} for {name}; leave the tag out")
        return TIMM_NAMES[name]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*TIMM_NAMES, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "`timm.list_models()` lists the names"
        raise ValueError(f"teacher.arch {arch!r} is not a model of the installed timm {timm.__version__}; {hint}")
    return arch


@dataclass(frozen=True)
class VitArch:
    """Which timm model; cheap to make, nothing is built."""

    arch: str
    """timm model name, or a name of `variants.TIMM_NAMES`."""
    arch_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm.create_model."""
    num_classes: int = 1000
    image_size: int = 224
    depth: int | None = None
    """Number of blocks, if not the one that timm (or arch_args) gives: the meta model is the teacher with fewer blocks."""

    def __post_init__(self) -> None:
        for key, owner in OWNED_ARGS.items():
            if key in self.arch_args:
                raise ValueError(f"teacher.arch_args.{key} is {self.arch_args[key]!r}: this number belongs to {owner}; set it there")
        if self.num_classes < 1:
            raise ValueError(f"num_classes is {self.num_classes}; a teacher or meta model needs a head of at least 1 class")

    @staticmethod
    def from_teacher(config: RunConfig) -> VitArch:
        """The teacher of a run. Raises ConfigError when its blocks are not as many as teacher.depths says."""
        arch = VitArch(config.teacher.arch, config.teacher.arch_args, config.data.num_classes, config.data.image_size)
        depths, blocks = config.teacher.depths, len(meta_device_model(arch).blocks)
        if sum(depths) != blocks:
            raise ConfigError(
                f"teacher.depths {list(depths)} has {sum(depths)} blocks and teacher.arch {config.teacher.arch} has {blocks}; "
                "change teacher.depths, or set teacher.arch_args.depth"
            )
        return arch

    @staticmethod
    def from_meta(config: RunConfig) -> VitArch:
        """The meta model of a run: the teacher's architecture with sum(meta.depths) blocks."""
        teacher, data = config.teacher, config.data
        return VitArch(teacher.arch, teacher.arch_args, data.num_classes, data.image_size, depth=sum(config.meta.depths))


def meta_device_model(arch: VitArch, *, drop_path: float = 0.0) -> VisionTransformer:
    """The whole timm model on the meta device: names, shapes and attributes, no memory for weights.

    Raises ValueError if timm cannot build it or it cannot be cut into stages.
    """
    args = {**arch.arch_args, **({} if arch.depth is None else {"depth": arch.depth})}
    name = timm_name(arch.arch)
    try:
        model = timm.create_model(
            name, num_classes=arch.num_classes, img_size=arch.image_size, drop_path_rate=drop_path, device="meta", **args
        )
    except (TypeError, ValueError, AssertionError, RuntimeError, OSError) as err:
        raise ValueError(
            f"timm cannot build teacher.arch {arch.arch} with image size {arch.image_size} and arch_args {args} ({err}); "
            "the teacher must be a timm VisionTransformer, and arch_args its arguments"
        ) from err
    _refuse_unstageable(model, arch.arch)
    return model


def _refuse_unstageable(model: nn.Module, arch: str) -> None:
    """Raise ValueError for what a stage could not honour: other forward code, foreign parts, weights shared across parts."""
    if type(model) is not VisionTransformer:
        raise ValueError(
            f"teacher.arch {arch} is a timm {type(model).__name__}; only models of timm's class VisionTransformer itself can be cut "
            "into stages, so choose one of those (vit_*, deit_*, deit3_*, siglip and dinov2 ViTs)"
        )
    if not model.global_pool:
        raise ValueError(f"teacher.arch {arch} has global_pool '', one output a token; set arch_args.global_pool to token, avg or map")
    direct = {*model._parameters, *model._modules, *model._buffers} - {"blocks"}
    foreign = sorted(direct - {*EMBED_PARTS, *TAIL_PARTS})
    if foreign:
        raise ValueError(f"teacher.arch {arch} has parts that belong to no stage ({', '.join(foreign)}); choose a plain VisionTransformer")
    owner: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        top, *rest = name.split(".")
        part = "the embedding" if top in EMBED_PARTS else "the head" if top in TAIL_PARTS else f"{top}.{rest[0]}"
        if owner.setdefault(id(parameter), part) != part:
            raise ValueError(f"teacher.arch {arch} shares {name} between {owner[id(parameter)]} and {part}; stages cannot share weights")
