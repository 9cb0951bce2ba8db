"""From words on the command line to the run's config: a recipe or a file, overrides, absolute paths, shards that are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2mkd_ds.config import PHASES, ConfigError, DataConfig, RunConfig, TeacherConfig, apply_overrides, load
from m2mkd_ds.logs import logger

_TEACHER_FILES = ("replay", "tls_ca", "tls_cert", "tls_key", "token_file")
"""Fields of TeacherConfig that name a file or a folder."""


def resolve(config: Path | None, recipe: str, run_dir: str, overrides: Sequence[str]) -> RunConfig:
    """The run's config: a file or a recipe, then --set, then the run folder; paths made absolute.

    A `config.yaml` belongs to the folder that it lies in, so a run folder that was moved or copied goes on by itself.
    """
    from m2mkd_ds.recipes import get_recipe

    if (config is None) == (not recipe):
        raise ConfigError("give either --recipe NAME (see `m2mkd recipes`) or --config RUN/config.yaml")
    resolved = load(config) if config is not None else get_recipe(recipe)
    resolved = apply_overrides(resolved, list(overrides))
    home = config.parent if config is not None and config.name == "config.yaml" else resolved.run_dir
    folder = Path(run_dir or home or f"runs/{resolved.name}").resolve()
    from m2mkd_ds.data.remote.addresses import absolute

    data = resolved.data
    _refuse_secrets(data)
    data = replace(data, cache_dir=absolute(data.cache_dir))
    if not data.train and not data.validation and data.source:
        shards = folder.parent / "shards" / data.source
        data = replace(data, train=str(shards / "train"), validation=str(shards / "validation"))
    else:
        data = replace(data, train=absolute(data.train), validation=absolute(data.validation))
    teacher = resolved.teacher
    if teacher.weights not in ("", "timm"):
        teacher = replace(teacher, weights=str(Path(teacher.weights).resolve()))
    return replace(resolved, run_dir=str(folder), data=data, teacher=_with_absolute_files(teacher))


def _with_absolute_files(teacher: TeacherConfig) -> TeacherConfig:
    """Ranks on other hosts, and later commands, may have another working directory."""

    def endpoint(word: str) -> str:
        kind, _, path = word.partition(":")
        return f"{kind}:{Path(path).resolve()}" if kind in ("unix", "file") and path else word

    files: dict[str, Any] = {name: str(Path(getattr(teacher, name)).resolve()) for name in _TEACHER_FILES if getattr(teacher, name)}
    return replace(teacher, endpoints=tuple(map(endpoint, teacher.endpoints)), **files)


def _refuse_secrets(data: DataConfig) -> None:
    """RUN/config.yaml keeps the addresses. Raises ConfigError for one with credentials in it."""
    from m2mkd_ds.data.remote.addresses import holds_secret, redact

    for name in ("train", "validation", "cache_dir"):
        address = getattr(data, name)
        if holds_secret(address):
            raise ConfigError(
                f"data.{name} is {redact(address)}, which holds credentials, and the run's config.yaml keeps no secrets; take them out of "
                "the address and put a token into the environment (M2MKD_HTTP_TOKEN, HF_TOKEN)"
            )


def cut_evenly(config: RunConfig, modules: int) -> RunConfig:
    """Equal stages for any teacher. Raises ValueError, with an uneven split to copy, when the blocks do not divide."""
    from m2mkd_ds.distill.pairs import even_depths
    from m2mkd_ds.models.vit import VitArch, num_blocks

    teacher, student = config.teacher, config.student
    blocks = num_blocks(VitArch(teacher.arch, dict(teacher.arch_args), config.data.num_classes, config.data.image_size))
    return replace(
        config,
        teacher=replace(teacher, depths=even_depths(blocks, modules, "teacher.depths")),
        meta=replace(config.meta, depths=(1,) * modules),
        student=replace(student, depths=even_depths(sum(student.depths), modules, "student.depths")),
    )


def ensure_shards(config: RunConfig) -> RunConfig:
    """Make the shards of a recipe's named source when they are not there yet."""
    from m2mkd_ds.data.remote.addresses import is_remote

    home = Path(config.data.train).parent
    if config.data.source and not is_remote(config.data.train) and not (Path(config.data.train) / "index.json").is_file():
        from m2mkd_ds.data.shards.processes import default_workers
        from m2mkd_ds.data.sources.registry import make_source

        logger.info("making shards of %s in %s", config.data.source, home)
        make_source(config.data.source, home, workers=default_workers())
    return config


def with_ds_config(config: RunConfig, names: Sequence[str]) -> RunConfig:
    """Apply `--deepspeed_config FILE` to the training phases at hand."""
    file = os.environ.pop("M2MKD_DS_CONFIG", "")
    owners = {"end_to_end" if name == "baseline" else name for name in names if name in PHASES}
    return replace(config, **{owner: replace(getattr(config, owner), ds_config=file) for owner in owners}) if file else config
