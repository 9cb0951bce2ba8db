"""What every phase of a run needs to know: config, ranks, data, precision, the three architectures and where weights lie."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import check_data
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair, stage_spans, teaching_pairs
from m2mkd_ds.distributed.world import World, resolve_precision
from m2mkd_ds.models.vit import VitArch, load_stage, stage_names, width
from m2mkd_ds.models.vmoe import VMoEArch, arch_from_config
from m2mkd_ds.train.ending.stopping import StopFlag


@dataclass(frozen=True)
class RunContext:
    """Built once a process by `open_run`; read-only after that."""

    config: RunConfig
    root: Path
    world: World
    train_index: ShardIndex
    val_index: ShardIndex
    teacher_arch: VitArch
    meta_arch: VitArch
    student_arch: VMoEArch
    pairs: tuple[TeachingPair, ...]
    teacher_width: int
    """Width of teacher and meta model: the width that stitch layers translate to and from."""
    images: bool = True
    """Whether the shards themselves are here; else the index alone is, and a teacher server has the images."""
    stop: StopFlag = field(default_factory=StopFlag)
    """Set when this process is asked to stop."""

    @property
    def data_fingerprints(self) -> dict[str, str]:
        """Content hashes of the shards, part of every node's fingerprint."""
        return {"train": self.train_index.fingerprint, "validation": self.val_index.fingerprint}

    def precision(self, wanted: str) -> str:
        """`fp32` or `bf16` on this hardware."""
        return resolve_precision(wanted, self.world.device)

    def dtype(self, wanted: str) -> torch.dtype:
        """The torch dtype of `precision`."""
        return torch.bfloat16 if self.precision(wanted) == "bf16" else torch.float32

    def place(self, module: nn.Module, dtype: torch.dtype) -> nn.Module:
        """Move a frozen module to this rank's device and dtype."""
        return module.to(self.world.device, dtype)


def open_run(config: RunConfig, world: World, *, images: bool = True, stop: StopFlag | None = None) -> RunContext:
    """Check data and models against each other and return the context; `stop`: one that somebody sets.

    Raises ConfigError before any compute is spent.
    """
    if not config.run_dir:
        raise ConfigError("run_dir is empty: give the run folder with --run-dir")
    train_index, val_index = check_data(config.data, images=images)
    teacher_arch = VitArch.from_teacher(config)  # refuses depths that are not the model's
    return RunContext(
        config=config,
        root=Path(config.run_dir),
        world=world,
        train_index=train_index,
        val_index=val_index,
        teacher_arch=teacher_arch,
        meta_arch=VitArch.from_meta(config),
        student_arch=arch_from_config(config),
        pairs=teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths),
        teacher_width=width(teacher_arch),
        images=images,
        stop=stop or StopFlag(),
    )


def load_meta(ctx: RunContext, stages: set[int], dtype: torch.dtype) -> FrozenMeta:
    """Read just the wanted stages of RUN/pretrain_meta/weights.safetensors and freeze them."""
    spans = stage_spans(ctx.config.meta.depths)
    file = ctx.root / "pretrain_meta" / "weights.safetensors"
    loaded = {}
    for i in sorted(stages):
        tensors = read_weights(file, stage_names(ctx.meta_arch, spans[i]))
        loaded[i] = ctx.place(load_stage(ctx.meta_arch, spans[i], tensors), dtype)
    return FrozenMeta(loaded)


def load_teacher_module(ctx: RunContext, index: int, dtype: torch.dtype) -> nn.Module:
    """Teacher module T_index from RUN/split, on this rank's device."""
    tensors = read_weights(ctx.root / "split" / f"module_{index}.safetensors")
    return ctx.place(load_stage(ctx.teacher_arch, ctx.pairs[index].teacher, tensors), dtype)


def load_teacher_stages(ctx: RunContext, dtype: torch.dtype) -> list[nn.Module]:
    """All teacher modules in running order: together, the whole teacher."""
    return [load_teacher_module(ctx, pair.index, dtype) for pair in ctx.pairs]
