"""One phase on all ranks: what `deepspeed --module m2mkd_ds train --phase ...` calls, and a Python caller can call too."""

from __future__ import annotations

import time

from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.distill.pairs import parse_pairs
from m2mkd_ds.distributed.world import World, init_world, shutdown
from m2mkd_ds.logs import logger, setup_logging
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.loop import Job, train
from m2mkd_ds.train.nodes import Node, find_node, fingerprint, missing_files, read_done
from m2mkd_ds.train.phases import end_to_end, m2mkd, prepare
from m2mkd_ds.train.phases.finish import finish_node, finish_trainee, unfinished_pairs

WHOLE_MODEL_PHASES = {
    "pretrain_meta": prepare.pretrain_meta,
    "assemble_finetune": prepare.assemble_finetune,
    "end_to_end": end_to_end.end_to_end,
    "baseline": end_to_end.baseline,
}
PAIR_PHASES = {"modular_train": prepare.modular_train, "m2mkd": m2mkd.m2mkd}


def run_phase(config: RunConfig, phase: str, pairs: str = "all") -> None:
    """Train `phase` (for pair phases: `all`, or numbers such as `0,2`) and write its result into config.run_dir.

    Resumes from its own checkpoints; does nothing when the result is there and its inputs are unchanged. Works under the
    launcher and without it (one rank). Raises ConfigError before compute is spent.
    """
    world = init_world()
    setup_logging(world.rank)
    try:
        run_in_world(config, world, phase, pairs)
    finally:
        shutdown()


def run_in_world(config: RunConfig, world: World, phase: str, pairs: str = "all") -> None:
    """As `run_phase`, in a job that was joined already; several phases may follow each other in one process."""
    ctx = open_run(config, world)
    node = find_node(config, phase)
    print_ = fingerprint(config, node, ctx.root, ctx.data_fingerprints)
    if phase in PAIR_PHASES:
        _run_pairs(ctx, node, print_, pairs)
    elif phase in WHOLE_MODEL_PHASES:
        _run_whole(ctx, node, print_)
    else:
        raise ConfigError(f"--phase {phase}: not a training phase; allowed are {', '.join([*WHOLE_MODEL_PHASES, *PAIR_PHASES])}")


def _run_whole(ctx: RunContext, node: Node, print_: str) -> None:
    done = read_done(ctx.root / node.name)
    if done is not None and done["fingerprint"] == print_ and not missing_files(ctx.root / node.name, done):
        logger.info("%s: complete, nothing to do", node.name)
        return
    started = time.time()
    job = WHOLE_MODEL_PHASES[node.name](ctx)
    train(job)
    finish_trainee(ctx, node, job.trainees[0], {"wall_s": time.time() - started, **_facts(job)})


def _run_pairs(ctx: RunContext, node: Node, print_: str, pairs: str) -> None:
    chosen = parse_pairs(pairs, len(ctx.pairs))
    left = tuple(i for i in chosen if i in unfinished_pairs(ctx, node, print_))
    started = time.time()
    facts = {}
    if left:
        job = PAIR_PHASES[node.name](ctx, left)
        train(job)
        facts = _facts(job)
        for trainee in job.trainees:
            finish_trainee(ctx, node, trainee, {"wall_s": time.time() - started, **facts})
    else:
        logger.info("%s: pairs %s are complete, nothing to do", node.name, list(chosen))
    finish_node(ctx, node, print_, started, facts)


def _facts(job: Job) -> dict[str, int]:
    """Numbers for done.json: optimizer steps, images used, ranks."""
    return {"steps": job.total_steps, "images": job.total_steps * job.global_batch_size, "world_size": job.world.size}
