"""The models that few-shot episodes are played with: whole models of a run (student, baseline, teacher), or an exported folder.

A model comes with a head of as many classes as an episode has ways, still without values: its own head knows other classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.hf.export import load_exported
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import ConfigError, DataConfig, RunConfig, load
from m2mkd_ds.distill.assemble import pair_stitches
from m2mkd_ds.distill.hybrid import freeze
from m2mkd_ds.distill.pairs import teaching_pairs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, load_stage, num_blocks, width
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEArch, arch_from_config

STUDENTS = {"student": "end_to_end", "baseline": "baseline", "student_cold": "assemble"}
"""Students of a run by name, and the node whose weights they have."""
RUN_MODELS = (*STUDENTS, "teacher")


@dataclass(frozen=True)
class Candidate:
    """One model to play episodes with."""

    name: str
    model: nn.Module
    """Whole, frozen, in evaluation mode, on its device; `head` has as many classes as an episode has ways."""
    data: DataConfig
    """How its images are prepared."""
    files: tuple[Path, ...]
    """Where its weights come from; their checksums name the model."""

    def trunk(self) -> nn.Module:
        """The same weights with an identity in place of the head: what it gives are features, timm's `pre_logits`."""
        return pre_logits(self.model)


def pre_logits(model: nn.Module) -> nn.Module:
    """A model that shares the weights of `model` and gives what would enter its head: normalised, pooled, [B, D]."""
    trunk = copy.copy(model)
    # A copy of the dictionary only: modules and parameters in it stay those of `model`.
    trunk._modules = dict(model._modules)
    trunk._modules["head"] = nn.Identity()
    return trunk


def open_candidates(path: Path, names: Sequence[str], ways: int, drop_path: float, device: torch.device) -> list[Candidate]:
    """The models of the run folder or exported folder `path`; `names` in their order, by default the student and its control.

    Raises ConfigError for another folder, an unknown name, or a model that the run has not made yet.
    """
    if (path / "config.yaml").is_file():
        config = replace(load(path / "config.yaml"), run_dir=str(path.resolve()))
        wanted = list(names) or ["student", *(["baseline"] if config.baseline else [])]
        return [_of_run(config, path, name, ways, drop_path, device) for name in wanted]
    if (path / "config.json").is_file():
        if names:
            raise ConfigError(f"{path} is an exported folder and holds one model; leave --model out (given {', '.join(names)})")
        return [_exported(path, ways, drop_path, device)]
    raise ConfigError(f"{path}: neither a run folder (config.yaml) nor an exported folder (config.json)")


def check_names(names: Sequence[str]) -> None:
    """Raises ConfigError for a model that no run has, or one that is named twice."""
    for name in names:
        if name not in RUN_MODELS or names.count(name) > 1:
            raise ConfigError(f"--model {name}: give each of {', '.join(RUN_MODELS)} at most once")


def _of_run(config: RunConfig, run: Path, name: str, ways: int, drop_path: float, device: torch.device) -> Candidate:
    check_names([name])
    stages = len(config.teacher.depths)
    files = (
        tuple(run / "split" / f"module_{i}.safetensors" for i in range(stages))
        if name == "teacher"
        else (run / STUDENTS[name] / "weights.safetensors",)
    )
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ConfigError(
            f"{missing[0]} is not there, so the run has no {name} yet; finish `m2mkd pipeline --config {run / 'config.yaml'}`, or choose "
            "another --model"
        )
    tensors = {key: value for file in files for key, value in read_weights(file).items()}
    if name == "teacher":
        model = _teacher(VitArch.from_teacher(config), tensors, ways, drop_path)
    else:
        kept = config.student.keep_stitches and name != "baseline"
        model = _student(arch_from_config(config), _stitches(config) if kept else (), tensors, ways, drop_path)
    return Candidate(name, freeze(model.to(device)), config.data, files)


def _exported(folder: Path, ways: int, drop_path: float, device: torch.device) -> Candidate:
    exported = load_exported(folder)
    model = _student(exported.arch, exported.stitches, exported.tensors, ways, drop_path)
    files = tuple(sorted(folder.glob("*.safetensors")))
    return Candidate("model", freeze(model.to(device)), replace(exported.data, num_workers=0), files)


def _stitches(config: RunConfig) -> tuple[StitchSpec, ...]:
    pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
    return pair_stitches(pairs, arch_from_config(config), width(VitArch.from_teacher(config)))


def _student(arch: VMoEArch, stitches: tuple[StitchSpec, ...], tensors: Mapping[str, Tensor], ways: int, drop_path: float) -> nn.Module:
    model = VisionMoE(replace(arch, num_classes=ways), StageSpan.whole(arch.num_blocks), stitches=stitches, drop_path=drop_path, seed=None)
    load_exact(model, _with_head_of(tensors, ways))
    return model


def _teacher(arch: VitArch, tensors: Mapping[str, Tensor], ways: int, drop_path: float) -> nn.Module:
    arch = replace(arch, num_classes=ways)
    return load_stage(arch, StageSpan.whole(num_blocks(arch)), _with_head_of(tensors, ways), drop_path=drop_path)


def _with_head_of(tensors: Mapping[str, Tensor], ways: int) -> dict[str, Tensor]:
    """The tensors with zeros for a head of `ways` classes; an episode fills it."""
    dim = tensors["head.weight"].shape[1]
    return {**tensors, "head.weight": torch.zeros(ways, dim), "head.bias": torch.zeros(ways)}
