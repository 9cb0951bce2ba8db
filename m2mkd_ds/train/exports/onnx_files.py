"""`m2mkd onnx`: a student, or the teacher of a run, as an ONNX file, compared with torch before it takes its place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.onnx_export import check_new_onnx, compare_onnx, export_onnx, onnx_metadata
from m2mkd_ds.checkpoint.student_files import open_student
from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.logs import logger
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.static_vmoe import DenseExperts, GatheredExperts, StaticVMoE, smallest_gaps
from m2mkd_ds.models.vit import load_stage, num_blocks
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.exports.timm_folders import class_names, read_run_teacher

EXPERTS = {"gather": GatheredExperts, "dense": DenseExperts}
UNDECIDED = 2e-5
"""Images with a choice between experts that hangs on less than this are not compared: rounding may decide it the other way."""


@dataclass(frozen=True, kw_only=True)
class OnnxOptions:
    """How to write the file."""

    batch: int | None = None
    """Images a call; None: any number."""
    opset: int = 20
    check: bool = True


def student_onnx(path: Path, out: Path, options: OnnxOptions, *, experts: str = "gather") -> Path:
    """The student at `path` (run, export, weights file). Raises ValueError for a router whose choice depends on the batch, StoreError
    for a file that is there already, ends not in .onnx or has no folder."""
    check_new_onnx(out)
    student = open_student(path)
    model = student.build()
    names = class_names(student.run) if student.run is not None else student.class_names
    metadata = onnx_metadata(student.data, names, {"m2mkd_ds.experts": experts})
    return export_onnx(
        StaticVMoE(model, EXPERTS[experts]), out, image_size=student.arch.image_size, metadata=metadata, batch=options.batch,
        opset=options.opset, check=_checker(model, student.run, student.arch.image_size, options),
    )  # fmt: skip


def teacher_onnx(run: Path, out: Path, options: OnnxOptions) -> Path:
    """The whole teacher of a run, from its modules. Raises StoreError as `student_onnx` does."""
    check_new_onnx(out)
    config, arch, tensors, _ = read_run_teacher(run)
    model = load_stage(arch, StageSpan.whole(num_blocks(arch)), tensors).eval()
    return export_onnx(
        model, out, image_size=arch.image_size, metadata=onnx_metadata(config.data, class_names(config)), batch=options.batch,
        opset=options.opset, check=_checker(model, config, arch.image_size, options),
    )  # fmt: skip


def _checker(model: nn.Module, run: RunConfig | None, image_size: int, options: OnnxOptions) -> Callable[[Path], None] | None:
    return functools.partial(_check, model, run, image_size, options.batch) if options.check else None


@torch.no_grad()
def _check(model: nn.Module, run: RunConfig | None, image_size: int, batch: int | None, file: Path) -> None:
    """Random images, and real ones where the run's validation shards are here; in batches of 1 and 5, or of the file's own size."""
    images = torch.randn(20, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    images = torch.cat([images, *_real_images(run)])
    if isinstance(model, VisionMoE) and model.arch.moe_blocks:
        images = images[smallest_gaps(model, images) > UNDECIDED]
    sizes = [1, 5] if batch is None else [batch]
    if len(images) < max(sizes):
        raise ValueError(
            f"{file.name}: only {len(images)} images have a routing that rounding cannot turn; use a smaller --batch or --no-check"
        )
    worst = 0.0
    for size in sizes:
        for start in range(0, len(images) - size + 1, size):
            some = images[start : start + size]
            output = model(some)
            worst = max(worst, compare_onnx(file, some, output.output if isinstance(model, VisionMoE) else output))
            if size == 1:
                break  # one call tells whether one image works; all of them follow in fives
    logger.info("onnx: %d images, logits of onnxruntime within %.1g of torch's (relative to the largest)", len(images), worst)


def _real_images(run: RunConfig | None) -> list[Tensor]:
    """Twenty validation images, if there are any here."""
    if run is None or not run.data.validation:
        return []
    try:
        index = ShardIndex.load(run.data.validation, Access.from_config(run.data))
    except (ShardError, SampleError) as err:
        logger.warning("onnx: compared on random images only; the run's validation shards cannot be read (%s)", err)
        return []
    with closing(EvalLoader(index, replace(run.data, num_workers=0), batch_size=20, rank=0, world=1)) as loader:
        return [next(iter(loader)).images_BCHW]
