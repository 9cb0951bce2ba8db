"""m2mkd: every chosen student module S_i learns from its teacher module T_i inside the frozen meta model (section 3.2)."""

from __future__ import annotations

from torch import nn

from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import stitch_specs
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.context import RunContext, load_meta, load_teacher_module
from m2mkd_ds.train.job import Job
from m2mkd_ds.train.phases.jobs import pair_job


def m2mkd(ctx: RunContext, chosen: tuple[int, ...]) -> Job:
    """Fresh student modules with their stitch layers; only the meta stages and teacher modules that the pairs need are read."""
    config, phase = ctx.config, ctx.config.m2mkd
    dtype = ctx.dtype(phase.precision)
    pairs = tuple(ctx.pairs[i] for i in chosen)
    meta = load_meta(ctx, FrozenMeta.needed_stages(pairs), dtype)
    students = {}
    for pair in pairs:
        stitches = stitch_specs(pair, teacher_width=ctx.teacher_width, student_width=ctx.student_arch.embed_dim)
        students[pair.index] = VisionMoE(ctx.student_arch, pair.student, stitches=stitches, drop_path=phase.drop_path, seed=config.seed)

    def load_teachers() -> dict[int, nn.Module]:
        return {pair.index: load_teacher_module(ctx, pair.index, dtype) for pair in pairs}

    return pair_job(ctx, "m2mkd", phase, students, meta, load_teachers=load_teachers, loss=config.distill)
