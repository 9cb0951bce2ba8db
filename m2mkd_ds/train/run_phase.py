"""One or several phases on all ranks: what `deepspeed --module m2mkd_ds train --phase ...` calls, and a Python caller can call.

Several phases in one job save the start of the launcher for each (about ten seconds); the nodes between them that need no
ranks (split, assemble) are then done by rank 0 while the others wait.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from pathlib import Path

from m2mkd_ds.config import PAIR_PHASES, ConfigError, RunConfig
from m2mkd_ds.distill.pairs import check_pairs, parse_pairs
from m2mkd_ds.distributed.start.rendezvous import GivenUpError
from m2mkd_ds.distributed.watch.activity import section
from m2mkd_ds.distributed.world import World, barrier, broadcast_object, gather_object, init_world, shutdown
from m2mkd_ds.logs import format_seconds, logger, setup_logging
from m2mkd_ds.train import local_nodes
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.ending.closed_output import outliving_readers
from m2mkd_ds.train.ending.guard import guarded
from m2mkd_ds.train.ending.stopping import StopFlag, StopRequested, launcher_chain, listening, reason_of, tells_of_stop
from m2mkd_ds.train.evaluation.of_run import evaluate_run
from m2mkd_ds.train.feeds import needs_images
from m2mkd_ds.train.job import Job
from m2mkd_ds.train.loop import train
from m2mkd_ds.train.nodes import Node, find_node, fingerprint, is_done
from m2mkd_ds.train.phases import end_to_end, m2mkd, prepare
from m2mkd_ds.train.phases.finish import finish_node, finish_trainee, unfinished_pairs
from m2mkd_ds.train.preflight import check_settings

WHOLE_MODEL_PHASES = {
    "pretrain_meta": prepare.pretrain_meta,
    "assemble_finetune": prepare.assemble_finetune,
    "end_to_end": end_to_end.end_to_end,
    "baseline": end_to_end.baseline,
}
JOBS_OF_PAIRS = {"modular_train": prepare.modular_train, "m2mkd": m2mkd.m2mkd}
RANK_ZERO_NODES = {"split": local_nodes.split, "assemble": local_nodes.assemble}
RUNNABLE = (*WHOLE_MODEL_PHASES, *JOBS_OF_PAIRS, *RANK_ZERO_NODES, "evaluate")
"""Nodes that a launched job can run."""


def run_phases(config: RunConfig, names: Sequence[str], pairs: str = "all") -> None:
    """Run the named phases one after the other (for pair phases: `all`, or numbers such as `0,2`); results go to config.run_dir.

    Resumes each from its own checkpoints; does nothing for one whose result is there and whose inputs are unchanged. Works
    under the launcher and without it (one rank). Raises ConfigError before compute is spent; StopRequested, with everything saved, on
    every rank, when any was asked to stop (stopping.py) or lost its launcher; PeerLostError where another rank has gone.
    """
    check_phases(config, names, pairs)
    stop, chain = StopFlag(), launcher_chain()
    with outliving_readers(), listening(stop, chain):
        try:
            world = init_world(config.watch.collective_timeout_s, start_timeout_s=config.watch.start_s, give_up=stop)
        except GivenUpError:
            # Told by each: there is no job yet whose rank 0, or whose record, could tell it for all.
            raise StopRequested(names[0], 0, stop.why or "asked of another rank") from None
        setup_logging(world.rank)
        stopped = _run_watched(config, world, names, pairs, stop)
        stop.leaving = True
        # Not in a `finally`: after an error on one rank the others stand in other collectives, and meeting them would hide the
        # error until the time-out. The process ends, its connections close, and the launcher ends the rest.
        shutdown()
    if stopped is not None:
        stopped.is_told = not tells_of_stop(world.rank, chain, os.environ)
        raise stopped


def _run_watched(config: RunConfig, world: World, names: Sequence[str], pairs: str, stop: StopFlag) -> StopRequested | None:
    """All phases, each with its own records. Returns how it was stopped, free of the frames that hold engines and groups."""
    try:
        for name in names:
            with guarded(config.watch, world, name, record_folder(config, name, pairs), stop):
                if name == names[0]:
                    images = any(needs_images(config.teacher, each) for each in names)
                    check_settings(open_run(config, world, images=images), names)
                run_in_world(config, world, name, pairs, stop)
    except StopRequested as asked:
        return StopRequested(asked.phase, asked.step, asked.why)
    return None


def record_folder(config: RunConfig, name: str, pairs: str = "all") -> Path:
    """Where a launch's records of a phase go; jobs of single pairs may run side by side, and each has a folder of its own."""
    folder = Path(config.run_dir) / name
    if name not in PAIR_PHASES or pairs == "all":
        return folder
    return folder / f"pair_{parse_pairs(pairs, config.num_stages)[0]}"


def check_phases(config: RunConfig, names: Sequence[str], pairs: str = "all") -> None:
    """Raise ConfigError for a name that this run does not have, or that a launched job cannot run, and for pairs that no phase has."""
    for name in names:
        find_node(config, name)
        if name not in RUNNABLE:
            raise ConfigError(f"--phase {name}: runs without ranks (m2mkd pipeline --only {name}); allowed are {', '.join(RUNNABLE)}")
    check_pairs(pairs, config.num_stages, names)


def run_in_world(config: RunConfig, world: World, name: str, pairs: str = "all", stop: StopFlag | None = None) -> None:
    """One phase in a job that was joined already; several may follow each other in one process. `stop`: set when it is asked to stop."""
    ctx = open_run(config, world, images=needs_images(config.teacher, name), stop=stop)
    node = find_node(config, name)
    print_ = fingerprint(config, node, ctx.root, ctx.data_fingerprints)
    started = time.monotonic()
    # Rank 0 looks for all: another rank might look when rank 0 has finished the node already, and leave it out.
    told = gather_object((is_done(ctx.root / name, node, config, print_, world.size), ctx.stop.why), what="is it done, or to be stopped")
    if any(why for _, why in told):
        raise StopRequested(name, 0, reason_of([why for _, why in told]))
    if told[0][0]:
        logger.info("%s: complete, nothing to do", name)
        return
    if name in PAIR_PHASES:
        _run_pairs(ctx, node, print_, pairs)
    elif name in WHOLE_MODEL_PHASES:
        _run_whole(ctx, node, print_)
    elif name in RANK_ZERO_NODES:
        with section(name, limit="save"):
            if world.is_main:
                RANK_ZERO_NODES[name](ctx)
            barrier("wait for rank 0")
    else:
        with section("evaluate", limit="eval", may_wait=True):
            evaluate_run(ctx, node, print_)
    gc.collect()  # engines hold cycles; the next phase should not find their memory taken
    logger.info("%s: done in %s", name, format_seconds(time.monotonic() - started))


def _run_whole(ctx: RunContext, node: Node, print_: str) -> None:
    started = time.time()
    job = WHOLE_MODEL_PHASES[node.name](ctx)
    _train(job)
    with section("write the result", limit="save", may_wait=True):
        finish_trainee(ctx, node, job.trainees[0], {"wall_s": time.time() - started, **_facts(job)})
    _close(job)


def _run_pairs(ctx: RunContext, node: Node, print_: str, pairs: str) -> None:
    chosen = parse_pairs(pairs, len(ctx.pairs))
    left = tuple(i for i in chosen if i in broadcast_object(unfinished_pairs(ctx, node, print_), what="pairs to train"))
    started = time.time()
    if left:
        job = JOBS_OF_PAIRS[node.name](ctx, left)
        _train(job)
        with section("write the result", limit="save", may_wait=True):
            for trainee in job.trainees:
                finish_trainee(ctx, node, trainee, {"wall_s": time.time() - started, **_facts(job)})
        _close(job)
    else:
        logger.info("%s: pairs %s are complete, nothing to do", node.name, list(chosen))
    finish_node(ctx, node, print_, started)


def _train(job: Job) -> None:
    try:
        train(job)
    except StopRequested:
        _close(job)  # as after a phase that has ended well: what is left open would hold the process groups
        raise


def _close(job: Job) -> None:
    for trainee in job.trainees:
        trainee.engine.close()


def _facts(job: Job) -> dict[str, int]:
    """Numbers for done.json: optimizer steps, images used, ranks."""
    return {"steps": job.total_steps, "images": job.total_steps * job.global_batch_size, "world_size": job.world.size}
