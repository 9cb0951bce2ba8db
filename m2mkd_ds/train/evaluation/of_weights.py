"""`m2mkd eval` on one weights file of a run: a whole model on images, a module of a pair as the hybrid that it was trained in.

What the file is, it says itself (the metadata `phase` and `pair`); the run's config.yaml above it says the rest.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_metadata, read_weights
from m2mkd_ds.config import ConfigError, RunConfig, load
from m2mkd_ds.data.remote.addresses import absolute
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair, stitch_specs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, load_stage, num_blocks
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE
from m2mkd_ds.train.context import RunContext, load_meta, open_run
from m2mkd_ds.train.evaluation.of_run import hybrid
from m2mkd_ds.train.phases.end_to_end import student_stitches
from m2mkd_ds.train.phases.jobs import run_evaluation, scored


def find_run(file: Path) -> Path:
    """The run folder above a weights file. Raises ConfigError when there is none."""
    for folder in file.resolve().parents:
        if (folder / "config.yaml").is_file():
            return folder
    raise ConfigError(f"{file}: no config.yaml in a folder above it, so it is not known what model it is; move it back into its run folder")


def evaluate_weights(file: Path, world: World, validation: str) -> str:
    """Score the file on the run's validation shards (or on `validation`); numbers as JSON text, the same on every rank."""
    run = find_run(file)
    config: RunConfig = replace(load(run / "config.yaml"), run_dir=str(run))
    if validation:
        config = replace(config, data=replace(config.data, validation=absolute(validation)))
    ctx = open_run(config, world)
    told = read_metadata(file)
    phase, pair = told.get("phase", ""), told.get("pair")
    with torch.no_grad():
        if pair is None:
            module = _whole_model(ctx, phase, file)
            scores = run_evaluation(ctx, lambda images: images, {phase: scored(module)}, torch.float32)
        else:
            taught = ctx.pairs[int(pair)]
            meta = load_meta(ctx, FrozenMeta.needed_stages([taught]), torch.float32)
            models = {phase: hybrid(meta, taught, _pair_module(ctx, phase, taught, file))}
            scores = run_evaluation(ctx, lambda images: meta.hidden_states(images, [taught]), models, torch.float32)
    return json.dumps({"model": phase, "pair": pair, **scores[phase].summary()}, indent=2)


def _whole_model(ctx: RunContext, phase: str, file: Path) -> torch.nn.Module:
    tensors = read_weights(file)
    archs: dict[str, VitArch] = {"pretrain_meta": ctx.meta_arch, "assemble_finetune": ctx.teacher_arch}
    if phase in archs:
        module: torch.nn.Module = load_stage(archs[phase], StageSpan.whole(num_blocks(archs[phase])), tensors)
    elif phase in ("assemble", "end_to_end", "baseline"):
        stitches: tuple[StitchSpec, ...] = () if phase == "baseline" else student_stitches(ctx)
        module = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=stitches, seed=None)
        load_exact(module, tensors)
    else:
        raise ConfigError(f"{file}: its metadata name the phase {phase!r}, which makes no model to evaluate")
    return ctx.place(module, torch.float32).eval()


def _pair_module(ctx: RunContext, phase: str, pair: TeachingPair, file: Path) -> torch.nn.Module:
    """The student's or the teacher's module of a pair."""
    tensors = read_weights(file)
    if phase == "m2mkd":
        stitches = stitch_specs(pair, teacher_width=ctx.teacher_width, student_width=ctx.student_arch.embed_dim)
        module: torch.nn.Module = VisionMoE(ctx.student_arch, pair.student, stitches=stitches, seed=None)
        load_exact(module, tensors)
    else:  # modular_train and split hold teacher modules
        module = load_stage(ctx.teacher_arch, pair.teacher, tensors)
    return ctx.place(module, torch.float32).eval()
