"""Where a trained student lies and what it is, told by its folder or file; nothing but headers is read until it is asked for.

    an exported folder (config.json)   a run folder (config.yaml): its end_to_end weights   a .safetensors file of a run
        -> StudentFiles(arch, stitches, preprocessing, class names, tensor name -> file)

The common entrance of everything that uses finished students: timm's entry point, ONNX, big models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.hf.load import class_names_of, describe_export
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_metadata, read_weights, weight_shapes
from m2mkd_ds.config import DataConfig, RunConfig, load
from m2mkd_ds.models.spans import StageSpan, stage_spans
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEArch, arch_from_config, parameter_shapes

STUDENT_PHASES = ("assemble", "end_to_end", "baseline")
"""Nodes of a run whose weights are a whole student."""


@dataclass(frozen=True)
class StudentFiles:
    """A whole student on the disk. Its names and shapes have been compared with the architecture."""

    path: Path
    """What was opened."""
    arch: VMoEArch
    stitches: tuple[StitchSpec, ...]
    data: DataConfig
    """Only its preprocessing fields are meaningful: num_classes, image_size, mean, std, interpolation, crop_pct."""
    class_names: tuple[str, ...]
    """In the order of the logits; empty where the source does not tell."""
    file_of: Mapping[str, Path]
    """Canonical tensor name -> the safetensors file that holds it."""
    run: RunConfig | None = None
    """The config of the run, where it is a run's student."""

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights files, each once."""
        return tuple(sorted(set(self.file_of.values())))

    def read(self) -> dict[str, Tensor]:
        """All tensors, fp32, on the CPU. Raises StoreError for a damaged file."""
        return {name: tensor.float() for file in self.files for name, tensor in read_weights(file).items()}

    def build(self) -> VisionMoE:
        """The model with its weights, fp32 on the CPU, in evaluation mode. Raises StoreError."""
        model = VisionMoE(self.arch, StageSpan.whole(self.arch.num_blocks), stitches=self.stitches, seed=None)
        load_exact(model, self.read())
        return model.eval()


def open_student(path: str | Path) -> StudentFiles:
    """Find the student in an exported folder, a run folder, or a `.safetensors` file inside a run folder.

    Raises StoreError for files that are missing or damaged, ValueError for what is no student or does not fit its description.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return _of_run(path, path, _run_above(path))
    if (path / "config.yaml").is_file():
        return _of_run(path, path / "end_to_end" / "weights.safetensors", path)
    if (path / "config.json").is_file():
        return _of_export(path)
    raise ValueError(
        f"{path}: no student here; give an exported folder (config.json), a run folder (config.yaml) or a .safetensors file in a run folder"
    )


def _of_export(folder: Path) -> StudentFiles:
    arch, stitches, data, files = describe_export(folder)
    return _checked(StudentFiles(folder, arch, stitches, data, tuple(class_names_of(folder)), _file_of(files)))


def _of_run(path: Path, weights: Path, run: Path) -> StudentFiles:
    config = load(run / "config.yaml")
    phase = read_metadata(weights).get("phase", "end_to_end")
    if phase not in STUDENT_PHASES:
        raise ValueError(f"{weights}: its metadata name the phase {phase!r}; a whole student comes from {', '.join(STUDENT_PHASES)}")
    arch = arch_from_config(config)
    file_of = _file_of([weights])
    stitches = _stitches_in(weight_shapes(weights), config, str(weights))
    return _checked(StudentFiles(path, arch, stitches, config.data, config.export.class_names, file_of, config))


def _run_above(file: Path) -> Path:
    for folder in file.resolve().parents:
        if (folder / "config.yaml").is_file():
            return folder
    raise ValueError(f"{file}: no config.yaml in a folder above it, so it is not known what model it is; move it back into its run folder")


def _stitches_in(shapes: Mapping[str, torch.Size], config: RunConfig, where: str) -> tuple[StitchSpec, ...]:
    """Which stitch layers a student kept, from the names that it holds: a pre stitch stands before its stage, a post stitch after it."""
    spans = stage_spans(config.student.depths)
    found = []
    for name, shape in shapes.items():
        match = re.fullmatch(r"stitches\.(\d+)\.(pre|post)\.proj\.weight", name)
        if not match:
            continue
        pair, is_pre = int(match[1]), match[2] == "pre"
        if pair >= len(spans):
            raise ValueError(f"{where}: holds {name}, and student.depths {list(config.student.depths)} has pairs 0 to {len(spans) - 1}")
        span = spans[pair]
        found.append(
            StitchSpec(
                pair, "pre" if is_pre else "post", span.first_block if is_pre else span.last_block, in_dim=shape[1], out_dim=shape[0]
            )
        )
    return tuple(sorted(found, key=lambda s: (s.pair, s.kind == "post")))


def _file_of(files: Sequence[Path]) -> dict[str, Path]:
    """Raises StoreError for a tensor that two files hold."""
    found: dict[str, Path] = {}
    for file in files:
        for name in weight_shapes(file):
            if name in found:
                raise StoreError(f"{file}: holds {name}, and so does {found[name].name}; export the model again")
            found[name] = file
    return found


def _checked(student: StudentFiles) -> StudentFiles:
    """Every name of the architecture, no others, all of the right shape. Raises ValueError that lists them."""
    wanted = parameter_shapes(student.arch, StageSpan.whole(student.arch.num_blocks), stitches=student.stitches)
    held = {name: shape for file in student.files for name, shape in weight_shapes(file).items()}
    wrong = {
        "missing": sorted(set(wanted) - set(held)),
        "unexpected": sorted(set(held) - set(wanted)),
        "of another shape": sorted(name for name in set(wanted) & set(held) if wanted[name] != held[name]),
    }
    found = [f"{len(names)} {what}: {', '.join(names[:5])}" for what, names in wrong.items() if names]
    if found:
        raise ValueError(f"{student.path}: weights do not fit the model that its description names ({'; '.join(found)}); make them again")
    return student
