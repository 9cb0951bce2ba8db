"""The nodes that need no launcher: cut the teacher into modules, put the student's modules together."""

from __future__ import annotations

import time

from torch import Tensor

from m2mkd_ds.checkpoint.legacy.imports import read_legacy
from m2mkd_ds.checkpoint.store import read_metadata, read_weights, save_weights
from m2mkd_ds.config import ConfigError
from m2mkd_ds.distill.assemble import assemble_student, split_exact
from m2mkd_ds.models.vit import adapt_weights, pretrained_weights, stage_names
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.lineage import lineage
from m2mkd_ds.train.nodes import find_node, fingerprint, teacher_file, withdraw_done, write_done


def split(ctx: RunContext) -> None:
    """RUN/split/module_<i>.safetensors: the whole teacher (fine-tuned here, or pretrained elsewhere) by stages."""
    started = time.time()
    node = find_node(ctx.config, "split")
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    folder = ctx.root / "split"
    folder.mkdir(parents=True, exist_ok=True)
    stages = split_exact(teacher_weights(ctx), [stage_names(ctx.teacher_arch, pair.teacher) for pair in ctx.pairs])
    withdraw_done(folder)
    files = []
    for pair, tensors in zip(ctx.pairs, stages, strict=True):
        file = folder / f"module_{pair.index}.safetensors"
        save_weights(file, tensors, lineage(ctx, node, pair.index))
        files.append(file)
    write_done(folder, node, ctx.config, print_, files, wall_s=time.time() - started)


def teacher_weights(ctx: RunContext) -> dict[str, Tensor]:
    """The whole teacher's tensors under timm's names, fp32."""
    teacher = ctx.config.teacher
    if teacher.source == "incubate":
        return read_weights(ctx.root / "assemble_finetune" / "weights.safetensors")
    if teacher.weights == "timm":
        return pretrained_weights(ctx.teacher_arch)
    file = teacher_file(ctx.config)
    # A .pth file is read by torch's restricted unpickler, and its names are made canonical.
    tensors = read_weights(file) if file.suffix == ".safetensors" else read_legacy(file).tensors
    head = tensors.get("head.weight")
    if head is not None and head.shape[0] != ctx.config.data.num_classes:
        raise ConfigError(
            f"teacher.weights {teacher.weights} has a head of {head.shape[0]} classes and data.num_classes is "
            f"{ctx.config.data.num_classes}: use the data that the teacher was trained for, or fine-tune it on this data first"
        )
    return adapt_weights(ctx.teacher_arch, tensors)


def assemble(ctx: RunContext) -> None:
    """RUN/assemble/weights.safetensors: the student made of its separately trained modules."""
    started = time.time()
    node = find_node(ctx.config, "assemble")
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    modules = {}
    for pair in ctx.pairs:
        file = ctx.root / "m2mkd" / f"pair_{pair.index}" / "weights.safetensors"
        trained_as = read_metadata(file).get("pair")
        if trained_as != str(pair.index):
            raise ValueError(f"{file} was trained as pair {trained_as}, not {pair.index}: the modules are swapped")
        modules[pair.index] = read_weights(file)
    tensors = assemble_student(
        modules, ctx.pairs, ctx.student_arch, teacher_width=ctx.teacher_width, keep_stitches=ctx.config.student.keep_stitches
    )
    folder = ctx.root / "assemble"
    folder.mkdir(parents=True, exist_ok=True)
    withdraw_done(folder)
    save_weights(folder / "weights.safetensors", tensors, lineage(ctx, node, None))
    write_done(folder, node, ctx.config, print_, [folder / "weights.safetensors"], wall_s=time.time() - started)
