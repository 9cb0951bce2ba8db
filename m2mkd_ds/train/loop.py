"""The one training loop: fetch a batch, let every trainee learn from it, log, evaluate, save, resume.

A *trainee* is one module with its own engine (a whole model, or the module of one teaching pair): its own clipping,
norms, schedule position and checkpoints. A job of several trainees shares the batches, and gives bit for bit the weights
that a job for each of them would give.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.distributed.watch.activity import section
from m2mkd_ds.distributed.world import World, all_reduce_sum
from m2mkd_ds.logs import MetricsWriter, Progress, logger
from m2mkd_ds.moe.telemetry import load_metrics
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.train.bad_samples import FILE_NAME, BadSampleList, lists_of_phase
from m2mkd_ds.train.balance import Loads, add_loads, balance_routers
from m2mkd_ds.train.ending.stopping import stop_requested
from m2mkd_ds.train.evaluation.schedule import catch_up, evaluate_at_step, owed_evaluations, steps_between_evaluations, write_metrics
from m2mkd_ds.train.job import Job, Trainee
from m2mkd_ds.train.ledger import SlotLedger
from m2mkd_ds.train.micro_seed import seed_micro_batch
from m2mkd_ds.train.resume import resume
from m2mkd_ds.train.saving import Saver
from m2mkd_ds.train.schedule import scaled_lr


class NonFiniteLossError(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names trainee, step and the slots of the micro-batch."""

    exit_code = 77


@dataclass
class Fed:
    """What one rank's batches cost it since the last line of metrics."""

    wait_s: float = 0.0
    fallbacks: int = 0

    def add(self, batch: TeacherBatch) -> None:
        """Count one more batch."""
        self.wait_s += batch.wait_s
        self.fallbacks += batch.fallbacks


def train(job: Job) -> None:
    """Run the job to its last step. Resumes by itself from each trainee's newest good checkpoint.

    Raises, on every rank at the same step, NonFiniteLossError, or BadDataError past the cap of damaged samples or where nothing can be
    read; StopRequested, with everything saved, when any rank was asked to stop; ConfigError for a
    checkpoint of other data or of another global batch.
    """
    for trainee in job.trainees:
        # Rank 0 reads every byte of a checkpoint, while the others wait: as long as writing it, and not what a start may take.
        with section("resume", limit="save", may_wait=True):
            resume(trainee, job)
    start = min(trainee.step for trainee in job.trainees)
    owed = owed_evaluations(job)
    if start == job.total_steps and not owed:
        return
    _announce(job, start)
    for trainee in job.trainees if job.world.is_main else ():
        trainee.metrics = MetricsWriter(trainee.folder / "metrics.jsonl", resume_step=trainee.step)
        trainee.trackers = job.open_trackers(trainee)
    try:
        if owed:
            _save_scores(job, owed, catch_up(job, owed))
        if start < job.total_steps:
            _run_from(job, start)
    finally:
        for trainee in job.trainees:
            if trainee.metrics is not None:
                trainee.metrics.close()
            if trainee.trackers is not None:
                trainee.trackers.finish()


def _save_scores(job: Job, owed: list[Trainee], top1: dict[str, float]) -> None:
    """Save the steps that were evaluated late once more, with their scores, where these decide which checkpoints stay. Collective."""
    if job.checkpoint.keep_best == 0:
        return
    saver = Saver(job)
    try:
        with section("save", limit="save", may_wait=True):
            for trainee in owed:
                saver.save(trainee, score=top1[trainee.name])
            saver.wait()
    finally:
        saver.close()


def _run_from(job: Job, start: int) -> None:
    bad = BadSampleList(
        job.folder / FILE_NAME, cap=job.max_bad_samples, world=job.world, what=job.phase_name, start_step=start,
        others=lists_of_phase(job.folder),
    )  # fmt: skip
    feed = job.make_feed(start)
    saver = Saver(job)
    try:
        with section("train", limit="step"):
            _run_steps(job, feed, start, bad, saver)
        with section("save", limit="save", may_wait=True):
            saver.wait()
        if bad.total:
            logger.warning("%s: %d damaged samples were replaced (%s); list: %s", job.phase_name, bad.total, bad.summary(), bad.file)
    finally:
        saver.close()
        feed.close()
        bad.close()


def _run_steps(job: Job, feed: TeacherFeed, start: int, bad: BadSampleList, saver: Saver) -> None:
    eval_every = steps_between_evaluations(job)
    began = clock = time.monotonic()
    since_log, fed = 0, Fed()
    ledger = SlotLedger(job.layout, start, job.world)
    with Progress(job.total_steps, job.phase_name, enabled=job.world.rank == 0, start=start) as bar:
        for step in range(start, job.total_steps):
            # A trainee that was trained further elsewhere waits until the others have caught up.
            active = [trainee for trainee in job.trainees if trainee.step == step]
            log = step % job.phase.log_steps == 0 or step + 1 == job.total_steps
            with section("step", limit="first" if step == start else "", step=step + 1):
                stopping = _train_step(job, feed, active, step, log, bad, fed, ledger, saver)
            since_log += job.global_batch_size
            if log:
                now = time.monotonic()
                of_feed = feed.metrics()
                for trainee in active:
                    trainee.pending |= {"data/wait_share": fed.wait_s / (now - clock), "data/fallbacks": fed.fallbacks, **of_feed}
                    trainee.pending = mean_over_ranks(trainee.pending, job.world)
                    for name in ("data/fallbacks", *(key for key in of_feed if key.startswith("data/cache_"))):
                        trainee.pending[name] = round(trainee.pending[name] * job.world.size)  # a sum, not a mean
                    trainee.pending.update(lr=job.learning_rate(step), images_per_second=since_log / (now - clock), time_s=now - began)
                    trainee.pending["data/bad_samples"] = bad.total
                clock, since_log, fed = now, 0, Fed()
            done = step + 1
            # An evaluation that a stop leaves out is made up for at the next start (evaluations.py).
            is_evaluated = not stopping and (done == job.total_steps or (eval_every > 0 and done % eval_every == 0))
            if is_evaluated:
                stopping = not evaluate_at_step(job, active)
                clock, since_log, fed = time.monotonic(), 0, Fed()  # throughput is that of training alone
            is_saved = stopping or saver.is_due(done, is_evaluated=is_evaluated)
            if is_saved or _ends_epoch(job, done):
                ledger.check(done)  # before the weights are saved: a checkpoint holds none that were trained otherwise
            for trainee in active:
                write_metrics(job, trainee, done)
                if is_saved:
                    with section("save", limit="save", may_wait=True, step=done):
                        saver.save(trainee, score=trainee.pending.get("eval/top1"))
            bar.advance(note=_note(active))
            if stopping:
                with section("save", limit="save", may_wait=True, step=done):
                    saver.wait()
                    raise stop_requested(job.phase_name, done, job.stop)


def _train_step(
    job: Job, feed: TeacherFeed, active: list[Trainee], step: int, log: bool, bad: BadSampleList, fed: Fed, ledger: SlotLedger,
    saver: Saver,
) -> bool:
    """One optimizer step of every active trainee: accumulate micro-batches, agree that all losses are finite and the data good, step.

    Returns whether any rank was asked to stop; the same on all of them.
    """
    phase, world, layout = job.phase, job.world, job.layout
    lr = job.learning_rate(step)
    found: list[BadSample] = []
    lost = ""
    losses: list[tuple[str, range, Tensor]] = []
    loads: dict[str, Loads] = {trainee.name: {} for trainee in active if trainee.routers}
    for micro_step in range(phase.gradient_accumulation_steps):
        last = micro_step + 1 == phase.gradient_accumulation_steps
        slots = layout.positions(step, micro_step, world.rank)
        request = BatchRequest(step, micro_step, slots, tuple(t.pair for t in active), job.with_teacher)
        with section("wait for data", step=step + 1, slots=slots):
            batch = feed.batch(request)
        found += batch.bad
        lost = lost or batch.lost
        fed.add(batch)
        ledger.add(batch.slot_ids_B)
        for trainee in active:
            seed_micro_batch(job.seed, job.phase_name, trainee.pair, slots.start)
            with section("forward", may_wait=trainee.engine.is_collective, step=step + 1, pair=trainee.pair, slots=slots):
                output = trainee.step_fn(batch, log and last)
            trainee.pending = dict(output.metrics) if log and last else {}
            with section("backward", may_wait=True, step=step + 1, pair=trainee.pair, slots=slots):
                trainee.engine.backward(output.loss)
            losses.append((trainee.name, slots, output.loss.detach()))
            if trainee.routers:
                loads[trainee.name] = add_loads(loads[trainee.name], output.load)
        if last:
            with section("agree", step=step + 1):
                stopping = _agree(losses, found, lost, step, world, bad, saver, job.stop())
        for trainee in active:
            with section("optimizer step", may_wait=True, step=step + 1, pair=trainee.pair):
                grad_norm = trainee.engine.step(lr)
            if last:
                _after_optimizer_step(trainee, step, grad_norm)
    if loads:
        balance_routers([(trainee.routers, loads[trainee.name]) for trainee in active if trainee.name in loads])
    return stopping


def mean_over_ranks(metrics: dict[str, Any], world: World) -> dict[str, Any]:
    """Average numbers and lists of numbers over the ranks (each saw its own micro-batch); one collective."""
    widths = {key: len(value) if isinstance(value, list) else 1 for key, value in metrics.items()}
    flat = [x for value in metrics.values() for x in (value if isinstance(value, list) else [value])]
    # Not in fp64: accelerators without it exist, and 24 bits are plenty for a curve.
    mean = (all_reduce_sum(torch.tensor(flat, dtype=torch.float32, device=world.device), "mean of metrics") / world.size).tolist()
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


def _agree(
    losses: list[tuple[str, range, Tensor]], found: list[BadSample], lost: str, step: int, world: World, bad: BadSampleList,
    saver: Saver, stop: bool,
) -> bool:
    """Before the optimizer step, in one sum over the ranks: did any see a NaN or infinite loss (trainee, slots, loss), damaged samples,
    a lost batch, or an earlier checkpoint fail? Then every rank raises, or records them. And was any asked to stop? Returns that, the
    same on every rank."""
    bad_losses = ~torch.isfinite(torch.stack([loss for _, _, loss in losses]))
    of_host = (len(found) + bool(lost), int(saver.has_failed()), int(stop))
    told = [torch.full_like(bad_losses[0], number, dtype=torch.int64) for number in of_host]
    counts = torch.stack([bad_losses.sum(), *told]).to(world.device)
    not_finite, damaged, unsaved, stopping = all_reduce_sum(counts, "agree on losses").tolist()  # the step's one host sync
    if unsaved:
        with section("save", limit="save"):  # it may wait for what is left of the save
            saver.raise_failure()
    if damaged:
        bad.add(step + 1, found, lost)
    if not_finite:
        here: dict[str, list[int]] = {}
        for (name, slots, _), is_bad in zip(losses, bad_losses.tolist(), strict=True):
            if is_bad:
                here.setdefault(name, []).extend(slots)
        where = "; ".join(f"{name}: slots {slots}" for name, slots in here.items()) or "on another rank"
        raise NonFiniteLossError(f"loss is NaN or infinite at step {step} ({where}); no weight was changed in this step")
    return bool(stopping)


def _ends_epoch(job: Job, done: int) -> bool:
    """Whether the step before `done` was the last that uses images of some epoch."""
    return done * job.global_batch_size // job.num_images > (done - 1) * job.global_batch_size // job.num_images


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
