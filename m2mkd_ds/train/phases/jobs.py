"""From modules to a Job for the loop: engines, data feed, evaluation; one function for whole models, one for teaching pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.config import DistillConfig, PhaseConfig, TeacherConfig, to_dict
from m2mkd_ds.data.order import order_name
from m2mkd_ds.data.plan import BatchLayout, StreamState
from m2mkd_ds.data.remote.addresses import redact
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine, Engine
from m2mkd_ds.distributed.expert_parallel import has_experts, shard_experts_
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.trackers.trackers import Trackers, open_trackers
from m2mkd_ds.train.bad_samples import resolve_cap
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.evaluation.evaluate import Output, Score, evaluate
from m2mkd_ds.train.feeds import FeedPlan, evaluation_loader, make_feed
from m2mkd_ds.train.job import Job, Trainee
from m2mkd_ds.train.lineage import lineage
from m2mkd_ds.train.nodes import find_node, fingerprint
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.schedule import num_steps
from m2mkd_ds.train.steps import StepOutput, pair_step, unpack

StepFunction = Callable[[Engine, TeacherBatch, bool], StepOutput]
"""(engine, batch, log) -> loss and metrics."""


def make_trainee(
    ctx: RunContext, phase: PhaseConfig, module: nn.Module, step: StepFunction, *, name: str, pair: int, folder: Path, print_: str
) -> Trainee:
    """Optimizer, DeepSpeed engine and (if asked for) the moving average around `module`."""
    precision = ctx.precision(phase.precision)
    # Field names in errors are those of the config: the control run borrows end_to_end's.
    owner = {"baseline": "end_to_end"}.get(name, name.split(" ")[0])
    settings = resolve_ds_config(phase.ds_config, phase, world_size=ctx.world.size, precision=precision, where=owner)
    # The averaged copy stays whole: it is filled from gathered weights, and evaluated by each rank for itself.
    average = copy.deepcopy(module).to(ctx.world.device, ctx.dtype(phase.precision)).eval() if phase.ema_decay else None
    if phase.ep_size > 1 and has_experts(module):  # a module of a pair may have dense blocks only
        shard_experts_(module, ctx.world, phase.ep_size)
    module.train()  # the engine moves it, after the cast to the precision of the run
    engine = DeepSpeedEngine(module, build_adamw(module, phase), settings, ctx.world, ema_decay=phase.ema_decay)
    return Trainee(
        name=name, pair=pair, folder=folder, engine=engine, fingerprint=print_, average=average,
        step_fn=lambda batch, log: step(engine, batch, log),
    )  # fmt: skip


def run_evaluation(
    ctx: RunContext,
    prepare: Callable[[torch.Tensor], Any],
    models: Mapping[str, Callable[[Any], Output]],
    dtype: torch.dtype,
    *,
    in_step: bool = False,
) -> dict[str, Score]:
    """Score models on the run's validation shards. `in_step`: a forward pass of some model talks to other ranks.

    Raises EvaluationAbandoned, on every rank, when any was asked to stop meanwhile.
    """
    with closing(evaluation_loader(ctx, batch_size=256)) as loader:
        return evaluate(
            prepare, models, loader, ctx.world, num_images=ctx.val_index.num_samples, dtype=dtype, in_step=in_step, stop=ctx.stop
        )  # fmt: skip


def scored(forward: Callable[[Any], Any]) -> Callable[[Any], Output]:
    """Adapt a stage or V-MoE module to what `evaluate` calls: (logits, routing statistics)."""

    def call(x: Any) -> Output:
        logits, _, stats = unpack(forward(x))
        return logits, stats

    return call


def eval_module(trainee: Trainee) -> nn.Module:
    """The weights that count, in evaluation mode: the moving average if there is one. Collective."""
    if trainee.average is None:
        return trainee.engine.module.eval()
    load_exact(trainee.average, result_weights(trainee))
    return trainee.average


def result_weights(trainee: Trainee) -> dict[str, torch.Tensor]:
    """fp32 weights that the phase will hand on. Collective."""
    return trainee.engine.full_state_dict(ema=trainee.average is not None)


def evaluate_trainees(
    ctx: RunContext,
    trainees: list[Trainee],
    prepare: Callable[[torch.Tensor], Any],
    logits_of: Callable[[Trainee, nn.Module, Any], Output],
    dtype: torch.dtype,
) -> dict[str, Score]:
    """Evaluate all trainees in one pass, then put their modules back into training mode."""
    modules = {t.name: (t, eval_module(t)) for t in trainees}
    models = {name: (lambda x, t=t, m=m: logits_of(t, m, x)) for name, (t, m) in modules.items()}
    in_step = any(t.average is None and t.engine.is_collective for t in trainees)
    scores = run_evaluation(ctx, prepare, models, dtype, in_step=in_step)
    for trainee in trainees:
        trainee.engine.module.train()
    return scores


def whole_model_job(ctx: RunContext, name: str, phase: PhaseConfig, module: nn.Module, step: StepFunction) -> Job:
    """A phase that trains one whole model on images."""
    node = find_node(ctx.config, name)
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    trainee = make_trainee(ctx, phase, module, step, name=name, pair=0, folder=ctx.root / name, print_=print_)
    steps = phase_steps(ctx, phase)
    first = (ctx.pairs[0],)  # pair 0's input is the image, and no meta stage runs before it
    return Job(
        phase_name=name,
        phase=phase,
        world=ctx.world,
        seed=ctx.config.seed,
        total_steps=steps,
        num_images=ctx.train_index.num_samples,
        trainees=[trainee],
        make_feed=FeedPlan(ctx, phase, steps, first, FrozenMeta({}), dict, with_teacher=False).colocated,
        evaluate=lambda trainees: evaluate_trainees(
            ctx, trainees, lambda images: images, lambda _, m, x: scored(m)(x), ctx.dtype(phase.precision)
        ),
        with_teacher=False,
        folder=trainee.folder,
        stream=stream_start(ctx, phase),
        max_bad_samples=resolve_cap(ctx.config.data.max_bad_samples, ctx.train_index.num_samples),
        open_trackers=lambda trainee: trackers_of(ctx, trainee),
        checkpoint=ctx.config.checkpoint,
        lineage=lineage(ctx, node, None),
        stop=ctx.stop,
    )


def pair_job(
    ctx: RunContext,
    name: str,
    phase: PhaseConfig,
    modules: Mapping[int, nn.Module],
    meta: FrozenMeta,
    *,
    load_teachers: Callable[[], Mapping[int, nn.Module]],
    loss: DistillConfig,
) -> Job:
    """A phase that trains one module a pair between frozen meta stages; without a teacher when kd_weight is 0."""
    node = find_node(ctx.config, name)
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    pairs = {index: ctx.pairs[index] for index in modules}

    def step_of(pair: TeachingPair) -> StepFunction:
        return lambda engine, batch, log: pair_step(engine, pair, meta, batch, loss, log=log)

    trainees = [
        make_trainee(
            ctx, phase, modules[i], step_of(pair), name=f"{name} pair {i}", pair=i, folder=ctx.root / name / f"pair_{i}", print_=print_
        )
        for i, pair in pairs.items()
    ]

    def logits_of(trainee: Trainee, module: nn.Module, hidden: dict[int, torch.Tensor]) -> Output:
        output, _, stats = unpack(module(hidden[trainee.pair]))
        return meta.suffix(pairs[trainee.pair], output), stats

    with_teacher = loss.kd_weight > 0
    plan = FeedPlan(
        ctx, phase, phase_steps(ctx, phase), tuple(pairs.values()), meta, load_teachers if with_teacher else dict, with_teacher
    )  # fmt: skip
    teacher = ctx.config.teacher if name == "m2mkd" else TeacherConfig()
    return Job(
        phase_name=name,
        phase=phase,
        world=ctx.world,
        seed=ctx.config.seed,
        total_steps=plan.total_steps,
        num_images=ctx.train_index.num_samples,
        trainees=trainees,
        make_feed=lambda start: make_feed(plan, teacher, start),
        evaluate=lambda active: evaluate_trainees(
            ctx, active, lambda images: meta.hidden_states(images, [pairs[t.pair] for t in active]), logits_of,
            ctx.dtype(phase.precision),
        ),
        with_teacher=with_teacher,
        # Jobs of single pairs may run side by side: each has a list of its own then.
        folder=ctx.root / name if len(pairs) == len(ctx.pairs) else trainees[0].folder,
        stream=stream_start(ctx, phase),
        max_bad_samples=resolve_cap(ctx.config.data.max_bad_samples, ctx.train_index.num_samples),
        open_trackers=lambda trainee: trackers_of(ctx, trainee),
        checkpoint=ctx.config.checkpoint,
        lineage=lineage(ctx, node, None),
        stop=ctx.stop,
    )  # fmt: skip


def trackers_of(ctx: RunContext, trainee: Trainee) -> Trackers | None:
    """Who else gets this trainee's metrics, as the config says."""
    config = ctx.config
    return open_trackers(
        config.trackers, trainee.folder, project=config.name, name=f"{ctx.root.name} {trainee.name}",
        config=without_secrets(to_dict(config)), resume_step=trainee.step,
    )  # fmt: skip


def without_secrets(tree: Any) -> Any:
    """Plain data with the credentials taken out of the addresses in it."""
    if isinstance(tree, dict):
        return {key: without_secrets(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [without_secrets(value) for value in tree]
    return redact(tree) if isinstance(tree, str) and ("://" in tree or tree.startswith("pipe:")) else tree


def stream_start(ctx: RunContext, phase: PhaseConfig) -> StreamState:
    """The stream of training images at its first position."""
    layout = BatchLayout(
        micro_batch_size=phase.micro_batch_size, accumulation=phase.gradient_accumulation_steps, world=ctx.world.size
    )  # fmt: skip
    return StreamState(
        seed=ctx.config.seed, fingerprint=ctx.train_index.fingerprint, order=order_name(ctx.config.data, layout), position=0
    )  # fmt: skip


def phase_steps(ctx: RunContext, phase: PhaseConfig) -> int:
    """Optimizer steps of a phase at this launch's global batch."""
    return num_steps(phase, ctx.train_index.num_samples, global_batch(ctx, phase))


def global_batch(ctx: RunContext, phase: PhaseConfig) -> int:
    """Images an optimizer step."""
    return phase.micro_batch_size * phase.gradient_accumulation_steps * ctx.world.size
