"""The teacher's side of a finished run: what a server holds, what a trainer compares, both from the same run folder."""

from __future__ import annotations

from m2mkd_ds.checkpoint.store import file_sha256
from m2mkd_ds.config import ConfigError, PhaseConfig
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.protocol.handshake import fingerprints
from m2mkd_ds.teacher.server.produce import TeacherParts
from m2mkd_ds.train.context import RunContext, load_meta, load_teacher_module
from m2mkd_ds.train.nodes import output_hashes


def teacher_parts(ctx: RunContext, phase: PhaseConfig, pairs: tuple[TeachingPair, ...]) -> TeacherParts:
    """Meta stages and teacher modules for `pairs`, in the precision of `phase`. Raises ConfigError when they are not made yet."""
    dtype = ctx.dtype(phase.precision)
    check_files(ctx, pairs)
    return TeacherParts(
        index=ctx.train_index,
        data=ctx.config.data,
        seed=ctx.config.seed,
        pairs=pairs,
        meta=load_meta(ctx, FrozenMeta.needed_stages(pairs), dtype),
        teachers={pair.index: load_teacher_module(ctx, pair.index, dtype) for pair in pairs},
        device=ctx.world.device,
        dtype=dtype,
        validation=ctx.val_index,
    )


def run_fingerprints(ctx: RunContext, phase: PhaseConfig, pairs: tuple[TeachingPair, ...]) -> dict[str, str]:
    """What trainer and server must have in common, by field (teacher/protocol/handshake.py).

    The hashes of weights are those that the finished nodes recorded, so a trainer needs no teacher module to know them. Raises
    ConfigError when the meta model, which both sides have, is not the recorded one; a server checks its teacher modules as well.
    """
    check_files(ctx, ())
    prints = fingerprints(ctx.config, ctx.train_index, precision=ctx.precision(phase.precision), weights=_recorded(ctx, pairs))
    # Of evaluation images, which a server gives as well; `stored` logits have no use for them.
    return {**prints, "validation.shards": ctx.val_index.fingerprint, "validation.crop_pct": f"{ctx.config.data.crop_pct:g}"}


def check_files(ctx: RunContext, pairs: tuple[TeachingPair, ...]) -> None:
    """Raises ConfigError when the meta model's file, or a teacher module's of `pairs`, is not the one that its node recorded."""
    for name, sha in _recorded(ctx, pairs).items():
        where = "pretrain_meta/weights" if name == "meta" else f"split/module_{name.removeprefix('teacher.')}"
        file = ctx.root / f"{where}.safetensors"
        if not file.is_file() or file_sha256(file) != sha:
            raise ConfigError(
                f"{file} is not the file that the done.json beside it records; copy the run folder again, or run that node again"
            )


def _recorded(ctx: RunContext, pairs: tuple[TeachingPair, ...]) -> dict[str, str]:
    split = output_hashes(ctx.root, "split")
    return {
        "meta": output_hashes(ctx.root, "pretrain_meta")["weights.safetensors"],
        **{f"teacher.{pair.index}": split[f"module_{pair.index}.safetensors"] for pair in pairs},
    }
