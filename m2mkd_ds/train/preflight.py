"""What can be wrong in a phase that comes hours later is said before the first one starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from m2mkd_ds.checkpoint.hf.export import check_exportable, parse_size
from m2mkd_ds.config import PHASES, ConfigError, PhaseConfig
from m2mkd_ds.data.order import make_order
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data.transforms import Mixer, train_parts
from m2mkd_ds.data_config import check_mixing
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.groups import check_expert_parallel
from m2mkd_ds.distributed.world import World
from m2mkd_ds.moe.backends import get_backend
from m2mkd_ds.trackers.trackers import check_trackers
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.feeds import check_feed
from m2mkd_ds.train.phases.end_to_end import baseline_phase
from m2mkd_ds.train.phases.jobs import global_batch
from m2mkd_ds.train.schedule import num_warmup_steps, scaled_lr


def check_settings(ctx: RunContext, names: Sequence[str], *, ranks_known: bool = True) -> None:
    """Check the settings of the named nodes, as far as no input of theirs is needed. Raises ConfigError naming the field.

    `ranks_known`: false before a launch whose number of ranks the launcher will decide; the ranks then check what depends on it.
    """
    if any(name in PHASES for name in names):
        _check_augmentation(ctx)
        if ctx.world.is_main:  # no other rank has trackers
            check_trackers(ctx.config.trackers)
    for name in names:
        if name in PHASES:
            phase = baseline_phase(ctx) if name == "baseline" else getattr(ctx.config, name)
            try:
                _check_phase(ctx, name, phase)
                _check_images(ctx, phase, ranks_known)
            except ValueError as err:
                raise ConfigError(f"{name}: {err}") from None
            _check_experts(ctx, name, phase, ranks_known)
    if "m2mkd" in names:
        check_feed(ctx.config.teacher)
    if "export" in names:
        _check_export(ctx)


def _check_phase(ctx: RunContext, name: str, phase: PhaseConfig) -> None:
    batch = global_batch(ctx, phase)
    scaled_lr(phase, batch)
    num_warmup_steps(phase, ctx.train_index.num_samples, batch)
    resolve_ds_config(phase.ds_config, phase, world_size=ctx.world.size, precision=ctx.precision(phase.precision))
    if _has_experts(ctx, name):
        student, device = ctx.student_arch, ctx.world.device
        get_backend(
            student.backend,
            device=device,
            dtype=ctx.dtype(phase.precision),
            dim=student.embed_dim,
            hidden=student.hidden_dim,
            activation=student.activation,
        )


def _check_augmentation(ctx: RunContext) -> None:
    """Build the training transform once: timm says here, and not in a worker hours later, what it does not know."""
    data = ctx.config.data
    try:
        train_parts(data)
    except (AssertionError, ArithmeticError, LookupError, TypeError, ValueError) as err:  # timm asserts, and indexes into what it has split
        policy = data.augment.auto_augment
        raise ConfigError(
            f"data.augment: timm cannot build the training transform with auto_augment {policy!r} ({type(err).__name__}: {err}); give a "
            "policy that it knows, such as rand-m9-mstd0.5-inc1, original or augmix-m5-w4-d2, or none"
        ) from None


def _check_images(ctx: RunContext, phase: PhaseConfig, ranks_known: bool) -> None:
    """Whether this phase's micro-batches can be mixed as asked for, and its ranks given images."""
    data, seed = ctx.config.data, ctx.config.seed
    Mixer(data.augment, data.num_classes, seed).check(phase.micro_batch_size)
    check_mixing(data.augment, phase.micro_batch_size, ctx.world.size if ranks_known else None)
    if ranks_known:
        layout = BatchLayout(
            micro_batch_size=phase.micro_batch_size, accumulation=phase.gradient_accumulation_steps, world=ctx.world.size
        )  # fmt: skip
        make_order(data, seed, ctx.train_index.shard_sizes, layout)


def _has_experts(ctx: RunContext, name: str) -> bool:
    return name in ("m2mkd", "end_to_end", "baseline") and bool(ctx.student_arch.moe_blocks)


def _check_experts(ctx: RunContext, name: str, phase: PhaseConfig, ranks_known: bool) -> None:
    settings = resolve_ds_config(phase.ds_config, phase, world_size=ctx.world.size, precision=ctx.precision(phase.precision))
    check_expert_parallel(
        "end_to_end" if name == "baseline" else name,
        phase.ep_size,
        num_experts=ctx.student_arch.num_experts if _has_experts(ctx, name) else None,
        world_size=ctx.world.size if ranks_known else None,
        zero=settings["zero_optimization"],
    )


def _check_export(ctx: RunContext) -> None:
    export, classes = ctx.config.export, ctx.config.data.num_classes
    check_exportable(ctx.student_arch)
    parse_size(export.max_shard_size)
    if export.class_names and len(export.class_names) != classes:
        raise ConfigError(
            f"export.class_names has {len(export.class_names)} names and data.num_classes is {classes}; give one a class, or none"
        )


def as_launched(ctx: RunContext) -> RunContext:
    """The context as rank 0 of the coming launch would see it, as far as the config tells (hostfiles are not read)."""
    ranks = max(ctx.config.launch.num_gpus, 1)
    return replace(ctx, world=World(0, ranks, 0, ranks, ctx.world.device))
