"""The one training loop: fetch a batch, let every trainee learn from it, log, evaluate, save, resume.

A *trainee* is one module with its own engine (a whole model, or the module of one teaching pair): its own clipping,
norms, schedule position and checkpoints. A job of several trainees shares the batches, and gives bit for bit the weights
that a job for each of them would give.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.commit import commit_checkpoint, latest_checkpoint
from m2mkd_ds.config import ConfigError, PhaseConfig
from m2mkd_ds.data.plan import positions
from m2mkd_ds.distributed.engine import Engine
from m2mkd_ds.distributed.world import World, all_reduce_sum, barrier, broadcast_object
from m2mkd_ds.logs import MetricsWriter, Progress, logger
from m2mkd_ds.moe.routers import LinearRouter
from m2mkd_ds.moe.telemetry import load_metrics
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.train.balance import Loads, add_loads, balance_routers, biased_routers
from m2mkd_ds.train.evaluate import Score
from m2mkd_ds.train.schedule import lr_at, num_warmup_steps, scaled_lr
from m2mkd_ds.train.steps import StepOutput


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names trainee, step and the slots of the micro-batch."""


@dataclass
class Trainee:
    """One module in training."""

    name: str
    """For logs: `end_to_end`, `m2mkd pair 2`."""
    pair: int
    """Teaching pair; 0 for whole models, whose input is the image as for pair 0."""
    folder: Path
    engine: Engine
    step_fn: Callable[[TeacherBatch, bool], StepOutput]
    """(batch, log) -> loss and metrics, through `engine`."""
    fingerprint: str
    """Of the node; a checkpoint made for another one is not resumed."""
    average: nn.Module | None = None
    """With ema_decay: a second module of the same shape, into which the averaged weights are put for evaluation."""
    step: int = 0
    """Optimizer steps done."""
    metrics: MetricsWriter | None = None
    pending: dict[str, Any] = field(default_factory=dict)
    """Metrics of the current step, written at its end."""
    routers: dict[int, LinearRouter] = field(init=False)
    """Routers with a balance bias by block, which the loop moves after every step; none without balance_rate."""

    def __post_init__(self) -> None:
        self.routers = biased_routers(self.engine.module)


@dataclass(frozen=True)
class Job:
    """Everything the loop needs."""

    phase_name: str
    phase: PhaseConfig
    world: World
    seed: int
    total_steps: int
    num_images: int
    trainees: list[Trainee]
    make_feed: Callable[[int], TeacherFeed]
    """start step -> feed that answers from there on."""
    evaluate: Callable[[list[Trainee]], dict[str, Score]]
    """Scores on the validation set by trainee name."""
    with_teacher: bool
    tensorboard: bool = False

    @property
    def global_batch_size(self) -> int:
        return self.phase.micro_batch_size * self.phase.gradient_accumulation_steps * self.world.size


def train(job: Job) -> None:
    """Run the job to its last step. Resumes by itself from each trainee's newest good checkpoint."""
    for trainee in job.trainees:
        _resume(trainee, job)
    start = min(trainee.step for trainee in job.trainees)
    if start == job.total_steps:
        return
    _announce(job, start)
    for trainee in job.trainees if job.world.is_main else ():
        trainee.metrics = MetricsWriter(trainee.folder / "metrics.jsonl", resume_step=trainee.step)
        if job.tensorboard:
            trainee.metrics.attach_tensorboard(trainee.folder / "tensorboard")
    feed = job.make_feed(start)
    try:
        _run_steps(job, feed, start)
    finally:
        feed.close()
        for trainee in job.trainees:
            if trainee.metrics is not None:
                trainee.metrics.close()


def _run_steps(job: Job, feed: TeacherFeed, start: int) -> None:
    eval_every = _steps_between_evaluations(job)
    began = clock = time.monotonic()
    since_log = 0
    with Progress(job.total_steps, job.phase_name, enabled=job.world.rank == 0, start=start) as bar:
        for step in range(start, job.total_steps):
            # A trainee that was trained further elsewhere waits until the others have caught up.
            active = [trainee for trainee in job.trainees if trainee.step == step]
            log = step % job.phase.log_steps == 0 or step + 1 == job.total_steps
            _train_step(job, feed, active, step, log)
            since_log += job.global_batch_size
            if log:
                now = time.monotonic()
                for trainee in active:
                    trainee.pending = mean_over_ranks(trainee.pending, job.world)
                    trainee.pending.update(lr=_learning_rate(job, step), images_per_second=since_log / (now - clock), time_s=now - began)
                clock, since_log = now, 0
            done = step + 1
            if done == job.total_steps or (eval_every and done % eval_every == 0):
                _evaluate(job, active)
                clock, since_log = time.monotonic(), 0  # throughput is that of training alone
            for trainee in active:
                if trainee.metrics is not None and trainee.pending:
                    trainee.metrics.write({"step": done, "epoch": done * job.global_batch_size / job.num_images, **trainee.pending})
                if done % job.phase.checkpoint_steps == 0 or done == job.total_steps:
                    _save(trainee, job)
            bar.advance(note=_note(active))


def _train_step(job: Job, feed: TeacherFeed, active: list[Trainee], step: int, log: bool) -> None:
    """One optimizer step of every active trainee: accumulate micro-batches, agree that all losses are finite, step."""
    phase, world = job.phase, job.world
    lr = _learning_rate(job, step)
    losses: list[tuple[str, range, Tensor]] = []
    loads: dict[str, Loads] = {trainee.name: {} for trainee in active if trainee.routers}
    for micro_step in range(phase.gradient_accumulation_steps):
        last = micro_step + 1 == phase.gradient_accumulation_steps
        slots = positions(
            step, micro_step, world.rank,
            micro_batch_size=phase.micro_batch_size, accumulation=phase.gradient_accumulation_steps, world=world.size,
        )  # fmt: skip
        request = BatchRequest(step, micro_step, slots, tuple(t.pair for t in active), job.with_teacher)
        batch = feed.batch(request)
        for trainee in active:
            seed_micro_batch(job.seed, job.phase_name, trainee.pair, slots.start)
            output = trainee.step_fn(batch, log and last)
            trainee.pending = dict(output.metrics) if log and last else {}
            trainee.engine.backward(output.loss)
            losses.append((trainee.name, slots, output.loss.detach()))
            if trainee.routers:
                loads[trainee.name] = add_loads(loads[trainee.name], output.load)
        if last:
            _stop_if_not_finite(losses, step, world)
        for trainee in active:
            grad_norm = trainee.engine.step(lr)
            if last:
                _after_optimizer_step(trainee, step, grad_norm)
    if loads:
        balance_routers([(trainee.routers, loads[trainee.name]) for trainee in active if trainee.name in loads])


def mean_over_ranks(metrics: dict[str, Any], world: World) -> dict[str, Any]:
    """Average numbers and lists of numbers over the ranks (each saw its own micro-batch); one collective."""
    widths = {key: len(value) if isinstance(value, list) else 1 for key, value in metrics.items()}
    flat = [x for value in metrics.values() for x in (value if isinstance(value, list) else [value])]
    # Not in fp64: accelerators without it exist, and 24 bits are plenty for a curve.
    mean = (all_reduce_sum(torch.tensor(flat, dtype=torch.float32, device=world.device)) / world.size).tolist()
    averaged: dict[str, Any] = {}
    for key, width in widths.items():
        taken, mean = mean[:width], mean[width:]
        averaged[key] = taken if isinstance(metrics[key], list) else taken[0]
    for key in [k for k in averaged if k.endswith("/load")]:
        averaged |= load_metrics(int(key.split("/")[1]), averaged[key])  # an expert is dead if it got nothing on any rank
    return averaged


def _after_optimizer_step(trainee: Trainee, step: int, grad_norm: float | None) -> None:
    # The norm is the same on every rank, so all of them raise together.
    if grad_norm is None or not torch.isfinite(torch.tensor(grad_norm)):
        raise NonFiniteLossError(f"{trainee.name}: the gradient norm is {grad_norm} at step {step}; lower lr or set clip_grad")
    if trainee.pending:
        trainee.pending["grad_norm"] = grad_norm
    trainee.step = step + 1


def _stop_if_not_finite(losses: list[tuple[str, range, Tensor]], step: int, world: World) -> None:
    """Every rank raises before the optimizer step when any rank saw a NaN or infinite loss (trainee, slots, loss)."""
    bad_losses = ~torch.isfinite(torch.stack([loss for _, _, loss in losses]))
    if int(all_reduce_sum(bad_losses.sum().to(world.device))):  # the step's one host sync
        bad: dict[str, list[int]] = {}
        for (name, slots, _), is_bad in zip(losses, bad_losses.tolist(), strict=True):
            if is_bad:
                bad.setdefault(name, []).extend(slots)
        here = "; ".join(f"{name}: slots {slots}" for name, slots in bad.items()) or "on another rank"
        raise NonFiniteLossError(f"loss is NaN or infinite at step {step} ({here}); no weight was changed in this step")


def seed_micro_batch(seed: int, phase: str, pair: int, first_slot: int) -> None:
    """Make drop-path (and router noise) a function of (seed, phase, pair, slots), never of rank, resume or company."""
    digest = hashlib.blake2b(f"{seed}/{phase}/{pair}/{first_slot}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "big") >> 1)


def _learning_rate(job: Job, step: int) -> float:
    phase = job.phase
    return lr_at(
        step,
        total_steps=job.total_steps,
        warmup_steps=num_warmup_steps(phase, job.num_images, job.global_batch_size),
        peak=scaled_lr(phase, job.global_batch_size),
        min_lr=phase.min_lr,
        warmup_lr=phase.warmup_lr,
    )


def _steps_between_evaluations(job: Job) -> int:
    return max(1, round(job.phase.eval_epochs * job.num_images / job.global_batch_size)) if job.phase.eval_epochs else 0


def _evaluate(job: Job, active: list[Trainee]) -> None:
    for name, score in job.evaluate(active).items():
        trainee = next(t for t in active if t.name == name)
        trainee.pending.update({"eval/top1": score.top1, "eval/loss": score.loss_sum / score.images})
        logger.info("%s: step %d, top-1 %.2f %%", name, trainee.step, 100 * score.top1)


def _save(trainee: Trainee, job: Job) -> None:
    def write(folder: Path) -> None:
        trainee.engine.save(folder)

    record = {"step": trainee.step, "fingerprint": trainee.fingerprint, "global_batch_size": job.global_batch_size}
    root = trainee.folder / "checkpoints"
    commit_checkpoint(root, trainee.step, write, record, is_main=job.world.rank == 0, barrier=barrier)


def _resume(trainee: Trainee, job: Job) -> None:
    """Go on from the newest checkpoint that verifies and belongs to this very node."""
    # Verifying reads every byte: once, on rank 0, and not by every rank.
    found = broadcast_object(latest_checkpoint(trainee.folder / "checkpoints") if job.world.is_main else None)
    if found is None:
        return
    folder, record = found
    if record["fingerprint"] != trainee.fingerprint:
        logger.warning("%s: %s was made for another configuration or other inputs; starting from step 0", trainee.name, folder)
        _set_aside(folder.parent, job.world)
        return
    if record["global_batch_size"] != job.global_batch_size:
        raise ConfigError(
            f"{folder} was made with a global batch of {record['global_batch_size']} and this launch has {job.global_batch_size}: launch "
            f"with as many ranks as before, or delete {folder.parent} to start the phase again"
        )
    trainee.engine.load(folder)
    trainee.step = int(record["step"])
    logger.info("%s: resumed from step %d", trainee.name, trainee.step)


def _set_aside(checkpoints: Path, world: World) -> None:
    """Rename outdated checkpoints, so that nothing is lost and none of them is taken for one of this run."""
    barrier()  # every rank has read the record by now
    if world.rank == 0:
        aside = checkpoints.with_name("checkpoints.outdated")
        if aside.exists():
            shutil.rmtree(aside)
        checkpoints.rename(aside)
    barrier()


def _announce(job: Job, start: int) -> None:
    logger.info(
        "%s: %s, steps %d..%d, global batch %d (%d x %d x %d ranks), peak lr %.3g",
        job.phase_name, ", ".join(t.name for t in job.trainees), start, job.total_steps, job.global_batch_size,
        job.phase.micro_batch_size, job.phase.gradient_accumulation_steps, job.world.size,
        scaled_lr(job.phase, job.global_batch_size),
    )  # fmt: skip


def _note(active: list[Trainee]) -> str:
    losses = [f"{t.pending['loss']:.3f}" for t in active if "loss" in t.pending]
    return "loss " + " ".join(losses) if losses else ""
