"""Evaluations in the course of a phase: when they are due, what they leave in the metrics, and those that a stop has left out.

A stop at a step that ends with an evaluation, or in its midst, saves the step at once; the next start finds that the metrics lack the
evaluation of the step that it goes on from, and makes up for it before it trains.
"""

from __future__ import annotations

from typing import Any

from m2mkd_ds.distributed.watch.activity import section
from m2mkd_ds.distributed.world import broadcast_object
from m2mkd_ds.logs import logger, read_metrics
from m2mkd_ds.train.ending.stopping import stop_requested
from m2mkd_ds.train.evaluation.evaluate import EvaluationAbandoned
from m2mkd_ds.train.job import Job, Trainee


def steps_between_evaluations(job: Job) -> int:
    """0: only at the end."""
    return max(1, round(job.phase.eval_epochs * job.num_images / job.global_batch_size)) if job.phase.eval_epochs else 0


def evaluate_at_step(job: Job, active: list[Trainee]) -> bool:
    """Put scores into the trainees' pending metrics. False when any rank was asked to stop meanwhile: then there are none. Collective."""
    try:
        with section("evaluate", limit="eval", may_wait=True, step=active[0].step):
            scores = job.evaluate(active)
    except EvaluationAbandoned:
        return False
    for name, score in scores.items():
        trainee = next(t for t in active if t.name == name)
        trainee.pending.update({"eval/top1": score.top1, "eval/loss": score.loss_sum / score.images})
        logger.info("%s: step %d, top-1 %.2f %%", name, trainee.step, 100 * score.top1)
    return True


def owed_evaluations(job: Job) -> list[Trainee]:
    """Trainees whose last step ends with an evaluation that is not in their metrics. Collective: rank 0, which has the metrics, decides."""
    every = steps_between_evaluations(job)
    due = [t for t in job.trainees if t.step and (t.step == job.total_steps or (every and t.step % every == 0))]
    names = [t.name for t in due if not _is_evaluated(t)] if job.world.is_main else []
    chosen = broadcast_object(names, what="evaluations left out")
    return [t for t in due if t.name in chosen]


def _is_evaluated(trainee: Trainee) -> bool:
    lines = read_metrics(trainee.folder / "metrics.jsonl")
    return any(line["step"] == trainee.step and "eval/top1" in line for line in lines)


def catch_up(job: Job, owed: list[Trainee]) -> dict[str, float]:
    """Evaluate these -> top-1 by name. What they score goes into the line of their step, as if it had not been left out; where the step
    has none, into one that holds nothing else. Collective.

    Raises StopRequested when the run is stopped again.
    """
    if not evaluate_at_step(job, owed):
        raise stop_requested(job.phase_name, min(t.step for t in job.trainees), job.stop)
    top1 = {}
    for trainee in owed:
        if trainee.metrics is not None:
            record = _record(job, trainee, trainee.step)
            trainee.metrics.amend(record)
            _track(trainee, record)
        top1[trainee.name] = trainee.pending["eval/top1"]
        trainee.pending = {}
    return top1


def write_metrics(job: Job, trainee: Trainee, done: int) -> None:
    """The pending metrics of a trainee as those of step `done`; only rank 0 has a writer."""
    if trainee.metrics is not None and trainee.pending:
        record = _record(job, trainee, done)
        trainee.metrics.write(record)
        _track(trainee, record)


def _record(job: Job, trainee: Trainee, done: int) -> dict[str, Any]:
    return {"step": done, "epoch": done * job.global_batch_size / job.num_images, **trainee.pending}


def _track(trainee: Trainee, record: dict[str, Any]) -> None:
    """Trackers take a step once: those that have had its line get no late evaluation."""
    if trainee.trackers is not None:
        trainee.trackers.log(record)
