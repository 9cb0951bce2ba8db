"""The phases that make teacher and meta model (Deep Incubation, ICCV 2023; arXiv 2402.16918 section 3.1).

pretrain_meta      train the small meta model M on labels (for a pretrained teacher: also to follow its hidden states)
modular_train      train each teacher module T_i inside the frozen M, on labels, all pairs in one job
assemble_finetune  put the T_i together and fine-tune the whole teacher
"""

from __future__ import annotations

from torch import nn

from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import DistillConfig
from m2mkd_ds.distill.assemble import union
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze
from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.distributed.engine import Engine
from m2mkd_ds.models.meta import BoundaryVit, meta_from_teacher
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import build_stage, load_stage, num_blocks, stage_names
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train.context import RunContext, load_meta, load_teacher_stages
from m2mkd_ds.train.job import Job
from m2mkd_ds.train.phases.jobs import pair_job, whole_model_job
from m2mkd_ds.train.steps import StepOutput, aligned_step, supervised_step

LABELS_ONLY = DistillConfig(kd_weight=0.0)
"""modular_train is the m2mKD step without a teacher."""

TEACHER_SEED_OFFSET = 1


def pretrain_meta(ctx: RunContext) -> Job:
    """M on labels; with a pretrained teacher M starts from the teacher's own blocks and also learns to follow its stages."""
    config = ctx.config
    phase = config.pretrain_meta
    span = StageSpan.whole(num_blocks(ctx.meta_arch))
    if config.teacher.source == "incubate":
        module: nn.Module = build_stage(ctx.meta_arch, span, seed=config.seed, drop_path=phase.drop_path)
        return whole_model_job(ctx, "pretrain_meta", phase, module, supervised)
    teacher = load_teacher_stages(ctx, ctx.dtype(phase.precision))
    stages = [freeze(stage) for stage in teacher]
    whole = union({f"module {i}": {k: v.float().cpu() for k, v in s.state_dict().items()} for i, s in enumerate(stages)})
    meta_spans = stage_spans(config.meta.depths)
    start = meta_from_teacher(whole, stage_spans(config.teacher.depths), meta_spans)
    module = BoundaryVit(load_stage(ctx.meta_arch, span, start, drop_path=phase.drop_path), meta_spans)

    def step(engine: Engine, batch: TeacherBatch, log: bool) -> StepOutput:
        return aligned_step(engine, stages, batch, config.meta.align_weight, log=log)

    return whole_model_job(ctx, "pretrain_meta", phase, module, step)


def modular_train(ctx: RunContext, chosen: tuple[int, ...]) -> Job:
    """Each chosen T_i, fresh, between the frozen stages of M."""
    phase = ctx.config.modular_train
    pairs = tuple(ctx.pairs[i] for i in chosen)
    meta = load_meta(ctx, FrozenMeta.needed_stages(pairs), ctx.dtype(phase.precision))
    # A block's fresh weights depend on seed and number only; another seed keeps T_i from starting as a copy of M's blocks.
    seed = ctx.config.seed + TEACHER_SEED_OFFSET
    modules = {p.index: build_stage(ctx.teacher_arch, p.teacher, seed=seed, drop_path=phase.drop_path) for p in pairs}
    return pair_job(ctx, "modular_train", phase, modules, meta, load_teachers=dict, loss=LABELS_ONLY)


def assemble_finetune(ctx: RunContext) -> Job:
    """The union of all T_i, trained as one model."""
    phase = ctx.config.assemble_finetune
    folder = ctx.root / "modular_train"
    parts = {f"pair {p.index}": read_weights(folder / f"pair_{p.index}" / "weights.safetensors") for p in ctx.pairs}
    for pair in ctx.pairs:
        expected, given = set(stage_names(ctx.teacher_arch, pair.teacher)), set(parts[f"pair {pair.index}"])
        if expected != given:
            raise ValueError(
                f"modular_train/pair_{pair.index} does not hold teacher module {pair.index}: "
                f"missing {sorted(expected - given)[:5]}, unexpected {sorted(given - expected)[:5]}"
            )
    module = load_stage(ctx.teacher_arch, StageSpan.whole(num_blocks(ctx.teacher_arch)), union(parts), drop_path=phase.drop_path)
    return whole_model_job(ctx, "assemble_finetune", phase, module, supervised)


def supervised(engine: Engine, batch: TeacherBatch, log: bool) -> StepOutput:
    """The step of every whole-model phase that learns from labels alone."""
    return supervised_step(engine, batch, log=log)
