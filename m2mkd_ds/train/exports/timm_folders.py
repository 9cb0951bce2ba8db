"""`m2mkd export-teacher`: the teacher's modules of a run, joined again, as a folder that timm alone loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from m2mkd_ds.checkpoint.store import read_metadata, read_weights
from m2mkd_ds.checkpoint.timm_export import export_teacher, join_modules
from m2mkd_ds.config import ConfigError, RunConfig, load
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.logs import logger
from m2mkd_ds.models.vit import VitArch, stage_names


class RunTeacher(NamedTuple):
    """The whole teacher of a run."""

    config: RunConfig
    arch: VitArch
    tensors: dict[str, Tensor]
    """timm's names and order, fp32."""
    told: dict[str, str]
    """Metadata of its modules: what made them, from what."""


def read_run_teacher(run: Path) -> RunTeacher:
    """Join RUN/split/module_<i>.safetensors.

    Raises ConfigError where the run has no modules, ValueError for modules of another cut or architecture.
    """
    config = replace(load(run / "config.yaml"), run_dir=str(run.resolve()))
    arch = VitArch.from_teacher(config)
    modules = {}
    told: dict[str, str] = {}
    for i, span in enumerate(stage_spans(config.teacher.depths)):
        file = run / "split" / f"module_{i}.safetensors"
        if not file.is_file():
            raise ConfigError(f"{file}: not there; make the modules with `m2mkd pipeline --config {run / 'config.yaml'} --until split`")
        modules[file.name], told = read_weights(file), read_metadata(file)
        others = sorted(set(modules[file.name]) ^ set(stage_names(arch, span)))
        if others:
            what = f"blocks {span.first_block}..{span.last_block} of {arch.arch}"
            raise ValueError(f"{file}: does not hold {what} ({', '.join(others[:5])}); delete {file.parent} and split again")
    told.pop("pair", None)
    return RunTeacher(config, arch, join_modules(arch, modules), told)


def export_run_teacher(run: Path, out: Path) -> Path:
    """Write the joined teacher as the folder `out`. Raises as `read_run_teacher` and `export_teacher` do."""
    config, arch, tensors, told = read_run_teacher(run)
    return export_teacher(arch, tensors, out, data=config.data, class_names=class_names(config), lineage=told)


def class_names(config: RunConfig) -> tuple[str, ...]:
    """export.class_names, else those of the shards' index; none, which the log says, where a run has left its shards behind."""
    if config.export.class_names:
        return config.export.class_names
    try:
        return ShardIndex.load_unchecked(config.data.train, Access.from_config(config.data)).class_names
    except (ShardError, SampleError) as err:
        logger.warning("no class names, because the training shards' index cannot be read (%s); set export.class_names", err)
        return ()
