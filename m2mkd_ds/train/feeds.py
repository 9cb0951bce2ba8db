"""Which feed a phase gets: `teacher.feed` for phase m2mkd, and the loader in this process for every other phase.

Whatever the feed, the batches are the same: what differs is who makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from m2mkd_ds.config import ConfigError, PhaseConfig, TeacherConfig
from m2mkd_ds.data.loader import EvalLoader, TrainLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.client.remote_images import RemoteEvalLoader
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import TeacherFeed
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import Welcome
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.teacher.run import run_fingerprints

COLLECTIVE_TIMEOUT_S = 600.0
"""Of `init_world`: a rank that waits longer for its teacher would be found dead by the others before it can say why."""


@dataclass(frozen=True)
class FeedPlan:
    """What a phase's feed has to deliver."""

    ctx: RunContext
    phase: PhaseConfig
    total_steps: int
    pairs: tuple[TeachingPair, ...]
    meta: FrozenMeta
    load_teachers: Callable[[], Mapping[int, nn.Module]]
    """T_i by pair, read when they are needed in this process; empty for phases without a teacher."""
    with_teacher: bool

    @property
    def layout(self) -> BatchLayout:
        """How the phase deals its positions."""
        phase = self.phase
        return BatchLayout(
            micro_batch_size=phase.micro_batch_size, accumulation=phase.gradient_accumulation_steps, world=self.ctx.world.size
        )  # fmt: skip

    def colocated(self, start_step: int, *, with_teacher: bool = True) -> ColocatedFeed:
        """Everything in this process."""
        ctx, phase = self.ctx, self.phase
        loader = TrainLoader(
            ctx.train_index,
            ctx.config.data,
            seed=ctx.config.seed,
            micro_batch_size=phase.micro_batch_size,
            accumulation=phase.gradient_accumulation_steps,
            rank=ctx.world.rank,
            world=ctx.world.size,
            start_step=start_step,
            total_steps=self.total_steps,
            device=ctx.world.device,
            raise_lost=False,  # the loop stops every rank at the same step
        )
        teachers = self.load_teachers() if with_teacher else {}
        return ColocatedFeed(loader, self.pairs, self.meta, teachers, device=ctx.world.device, dtype=ctx.dtype(phase.precision))


def make_feed(plan: FeedPlan, teacher: TeacherConfig, start_step: int) -> TeacherFeed:
    """The feed that `teacher` asks for, from `start_step` on. Raises ConfigError or RuntimeError when it cannot be had."""
    if teacher.feed == "replay":
        return _replay(plan, teacher, start_step)
    if teacher.is_remote:
        return _remote(plan, teacher, start_step)
    return plan.colocated(start_step)


def needs_images(teacher: TeacherConfig, phase: str) -> bool:
    """Whether a trainer of `phase` reads training images itself, now or when its servers are gone."""
    return phase != "m2mkd" or not teacher.is_remote or teacher.payload == "logits" or teacher.on_teacher_loss == "colocate"


def check_feed(teacher: TeacherConfig) -> None:
    """Raises ConfigError for settings that cannot work, before anything is loaded: endpoints, files of keys and tokens, patience."""
    if teacher.is_remote and teacher.patience_s >= COLLECTIVE_TIMEOUT_S:
        raise ConfigError(
            f"teacher.patience_s is {teacher.patience_s:g}; it must be below the time-out of collectives, {COLLECTIVE_TIMEOUT_S:g} s: "
            "else the other ranks would end the job before the one that waits for its teacher says so"
        )
    if teacher.feed == "remote":
        from m2mkd_ds.teacher.client.connect import check_endpoints
        from m2mkd_ds.teacher.flight.security import ClientSecurity

        check_endpoints(teacher.endpoints, teacher.feed)
        ClientSecurity(teacher.tls_ca, teacher.tls_cert, teacher.tls_key, teacher.token_file).load()


def _remote(plan: FeedPlan, teacher: TeacherConfig, start_step: int) -> TeacherFeed:
    from m2mkd_ds.teacher.client.connect import connect
    from m2mkd_ds.teacher.client.receive import Assembler
    from m2mkd_ds.teacher.client.remote import LogitsFeed, RemoteFeed, Stream
    from m2mkd_ds.teacher.protocol.answer_check import answer_shapes
    from m2mkd_ds.teacher.protocol.golden import check_golden

    ctx, data = plan.ctx, plan.ctx.config.data
    device, dtype = ctx.world.device, ctx.dtype(plan.phase.precision)
    settings = resolved_settings(plan.ctx, teacher, plan.phase)
    stream = Stream(
        layout=plan.layout, rank=ctx.world.rank, start_step=start_step, total_steps=plan.total_steps,
        pairs=tuple(pair.index for pair in plan.pairs), with_teacher=plan.with_teacher,
        fingerprints=run_fingerprints(ctx, plan.phase, plan.pairs),
    )  # fmt: skip

    def golden(link: Connection, welcome: Welcome) -> None:
        check_golden(
            link, welcome, pairs=plan.pairs, meta=plan.meta, data=data, device=device, dtype=dtype, deadline_s=teacher.deadline_s
        )  # fmt: skip

    shapes = answer_shapes(ctx.config, precision=ctx.precision(plan.phase.precision))
    feed = RemoteFeed(
        stream, settings, Assembler(data, plan.pairs, plan.meta, shapes, device=device, dtype=dtype),
        lambda endpoint: connect(endpoint, settings), golden,
        plan.colocated if teacher.on_teacher_loss == "colocate" else None,
    )  # fmt: skip
    return LogitsFeed(plan.colocated(start_step, with_teacher=False), feed) if teacher.payload == "logits" else feed


def evaluation_loader(ctx: RunContext, *, batch_size: int) -> EvalLoader | RemoteEvalLoader:
    """Validation images: from the shards here, or from the teacher's servers where there are none."""
    world = ctx.world
    if ctx.images:
        return EvalLoader(ctx.val_index, ctx.config.data, batch_size=batch_size, rank=world.rank, world=world.size, device=world.device)
    from m2mkd_ds.teacher.client.connect import connect
    from m2mkd_ds.teacher.protocol.answer_check import answer_shapes

    phase = ctx.config.m2mkd
    settings = resolved_settings(ctx, ctx.config.teacher, phase)
    return RemoteEvalLoader(
        ctx.val_index, ctx.config.data, settings, lambda endpoint: connect(endpoint, settings),
        answer_shapes(ctx.config, precision=ctx.precision(phase.precision)), run_fingerprints(ctx, phase, ()),
        batch_size=batch_size, rank=world.rank, world=world.size, device=world.device,
    )  # fmt: skip


def _replay(plan: FeedPlan, teacher: TeacherConfig, start_step: int) -> TeacherFeed:
    from m2mkd_ds.teacher.stored.replay import LogitsStore, ReplayFeed

    ctx = plan.ctx
    prints = run_fingerprints(ctx, plan.phase, plan.pairs)
    store = LogitsStore(Path(teacher.replay), {name: value for name, value in prints.items() if not name.startswith("validation.")})
    store.check_run(plan.layout, ctx.config.data.augment, [pair.index for pair in plan.pairs], plan.total_steps, start_step)
    base = plan.colocated(start_step, with_teacher=False)
    return ReplayFeed(base, store, device=ctx.world.device, dtype=ctx.dtype(plan.phase.precision))


def resolved_settings(ctx: RunContext, teacher: TeacherConfig, phase: PhaseConfig) -> TeacherConfig:
    """The settings with what follows from the run: the wire's dtype for `auto`, the socket in the run folder for feed=shm."""
    exact: Literal["bf16", "fp32"] = "bf16" if ctx.precision(phase.precision) == "bf16" else "fp32"
    wire = exact if teacher.wire_dtype == "auto" else teacher.wire_dtype
    return replace(teacher, wire_dtype=wire, endpoints=teacher.endpoints or (f"unix:{ctx.root / 'teacher.sock'}",))
