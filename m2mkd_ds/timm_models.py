"""timm's entry point for students of this project. Importing this file registers the architecture `m2mkd_vmoe` with timm.

    import timm, m2mkd_ds.timm_models
    timm.create_model("m2mkd_vmoe", weights="RUN or EXPORT or FILE.safetensors", num_classes=10)      any of the three
    timm.create_model("local-dir:FOLDER", pretrained=True)                                            a folder of `m2mkd export-timm`
    m2mkd_ds.create_model("RUN or EXPORT or FILE.safetensors or RECIPE")                              the same without timm's registry

timm loads `checkpoint_path` only after it has built the model, so the path alone cannot say which model it is: hence `weights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from m2mkd_ds.checkpoint.atomic import read_json
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.student_files import StudentFiles, open_student
from m2mkd_ds.checkpoint.timm_export import input_cfg, write_timm_folder
from m2mkd_ds.models.timm_vmoe import TimmVMoE, arch_to_dict
from m2mkd_ds.models.vmoe import VMoEArch, arch_from_config

__all__ = ["create_model", "export_student", "m2mkd_vmoe"]

NAME = "m2mkd_vmoe"

default_cfgs = generate_default_cfgs({NAME: {"first_conv": "patch_embed.proj", "classifier": "head", "fixed_input_size": True}})


@register_model
def m2mkd_vmoe(
    pretrained: bool = False,
    *,
    weights: str | Path | None = None,
    arch: VMoEArch | Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TimmVMoE:
    """A student with the weights of `weights` (a run folder, an exported folder, a .safetensors file of a run), or fresh from `arch`.

    `num_classes` other than the weights' gives a fresh head. Raises ValueError when neither is given or the weights do not fit.
    """
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    if weights is None and arch is None and overlay.get("file"):  # timm's own way to say which file
        weights = overlay.pop("file")
    settings: dict[str, Any] = {"feature_cfg": {"out_indices": 3, "feature_cls": "getter"}, "pretrained_cfg_overlay": overlay, **kwargs}
    if weights is None:
        if arch is None:
            raise ValueError(
                f"{NAME}: say which model: weights=FOLDER_OR_FILE (a run, an export, a .safetensors file of a run), or arch=..."
            )
        return build_model_with_cfg(TimmVMoE, NAME, pretrained, arch=arch, **settings)
    if arch is not None:
        raise ValueError(f"{NAME}: weights and arch were given; the architecture is that of the weights")
    student = open_student(weights)
    # timm's metadata are those of the weights; what the caller changes (a head, a pooling) changes the model only.
    settings["pretrained_cfg"] = input_cfg(NAME, student.data, student.class_names)
    return build_model_with_cfg(lambda **args: _load(student, **args), NAME, False, **settings)


def create_model(
    name_or_path: str | Path, *, pretrained: bool = True, num_classes: int | None = None, features_only: bool = False, **kwargs: Any
) -> Any:
    """A student by path (a run, an export, a .safetensors file of a run, a folder in timm's layout) or, fresh, by the name of a recipe.

    `pretrained=False` takes only the architecture from the path. `num_classes` other than the weights' gives a fresh head, 0 none.
    `features_only`: timm's feature extractor around it. Further arguments as in timm.create_model: drop_path_rate, global_pool,
    out_indices. Raises ValueError for a path without a student, and for a recipe with `pretrained=True`: nobody publishes its weights.
    """
    given = {"num_classes": num_classes, "features_only": features_only or None, **kwargs}
    folder = Path(name_or_path)
    if (folder / "config.json").is_file() and "architecture" in read_json(folder / "config.json"):
        return timm.create_model(f"local-dir:{folder}", pretrained=pretrained, **given)
    if folder.exists():
        if pretrained:
            return timm.create_model(NAME, weights=folder, **given)
        student = open_student(folder)
        return _fresh(student.arch, input_cfg(NAME, student.data, student.class_names), stitches=student.stitches, **given)
    from m2mkd_ds.recipes import get_recipe

    config = get_recipe(str(name_or_path))
    if pretrained:
        raise ValueError(f"{name_or_path} is a recipe, for which there are no published weights; give a path, or pretrained=False")
    return _fresh(arch_from_config(config), input_cfg(NAME, config.data), **given)


def export_student(student: StudentFiles, out: Path) -> Path:
    """Write a student as a folder in timm's layout. Raises ValueError and StoreError as `write_timm_folder` does."""
    config = {
        "architecture": NAME,
        "num_classes": student.arch.num_classes,
        "num_features": student.arch.embed_dim,
        "global_pool": "token",
        "model_args": {"arch": arch_to_dict(student.arch), "stitches": [dataclasses.asdict(s) for s in student.stitches]},
        "pretrained_cfg": input_cfg(NAME, student.data, student.class_names),
    }
    return write_timm_folder(Path(out), config, student.read())


def _fresh(arch: VMoEArch, cfg: dict[str, Any], **given: Any) -> Any:
    return timm.create_model(NAME, arch=arch, pretrained_cfg=cfg, **given)


def _load(student: StudentFiles, *, num_classes: int | None = None, **args: Any) -> TimmVMoE:
    """Every tensor of the file used, every parameter filled; only then is the head exchanged, if another one is wanted."""
    model = TimmVMoE(student.arch, student.stitches, seed=None, **args)
    load_exact(model, student.read())
    if num_classes not in (None, student.arch.num_classes):
        model.reset_classifier(num_classes)
    return model
