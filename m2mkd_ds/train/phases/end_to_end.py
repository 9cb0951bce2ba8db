"""end_to_end: the assembled student on labels (section 3.3), and its control: the same student from scratch for as many steps."""

from __future__ import annotations

from dataclasses import replace

from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.distill.assemble import pair_stitches
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.job import Job
from m2mkd_ds.train.phases.jobs import global_batch, phase_steps, whole_model_job
from m2mkd_ds.train.phases.prepare import supervised


def student_stitches(ctx: RunContext) -> tuple[StitchSpec, ...]:
    """Stitch layers of the whole student: those of all pairs when they are kept, else none."""
    return pair_stitches(ctx.pairs, ctx.student_arch, ctx.teacher_width) if ctx.config.student.keep_stitches else ()


def end_to_end(ctx: RunContext) -> Job:
    """The student that RUN/assemble holds."""
    phase = ctx.config.end_to_end
    student = VisionMoE(
        ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=student_stitches(ctx), drop_path=phase.drop_path, seed=None
    )
    load_exact(student, read_weights(ctx.root / "assemble" / "weights.safetensors"))
    return whole_model_job(ctx, "end_to_end", phase, student, supervised)


def baseline_phase(ctx: RunContext) -> PhaseConfig:
    """Settings of the control: end_to_end's, but learning rate and warm-up of m2mkd, because it too starts from fresh weights;
    as many optimizer steps as m2mkd and end_to_end take together."""
    tuning, fresh = ctx.config.end_to_end, ctx.config.m2mkd
    steps = phase_steps(ctx, fresh) + phase_steps(ctx, tuning)
    return replace(
        tuning,
        epochs=steps * global_batch(ctx, tuning) / ctx.train_index.num_samples,
        max_steps=steps,
        lr=fresh.lr,
        lr_batch=fresh.lr_batch,
        warmup_lr=fresh.warmup_lr,
        warmup_epochs=fresh.warmup_epochs,
    )


def baseline(ctx: RunContext) -> Job:
    """The same student, fresh, trained on labels alone."""
    config, phase = ctx.config, baseline_phase(ctx)
    student = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), drop_path=phase.drop_path, seed=config.seed)
    return whole_model_job(ctx, "baseline", phase, student, supervised)
