"""What the ranks of test_train_parity.py run: phases of a very small run on digits, in several arrangements.

    python train_job.py OUT MODE      MODE: one (1 rank) | two (2 ranks) | broken (2 ranks)
Every arrangement writes its own run folder below OUT; the test compares the weights.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.config import AugmentConfig, PhaseConfig, RouterConfig, RunConfig
from m2mkd_ds.distributed.world import World, barrier, init_world, shutdown
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.train import feeds, loop, run_phase
from m2mkd_ds.train.context import open_run
from m2mkd_ds.train.local_nodes import assemble, split
from m2mkd_ds.train.phases import jobs
from m2mkd_ds.train.steps import StepOutput

MICRO_BATCH = 8
STEPS = 4


def small_config(out: Path, name: str, world_size: int) -> RunConfig:
    """Three uneven pairs, mixup and drop-path on, one global batch whatever the number of ranks."""
    base = get_recipe("tiny")
    phase = PhaseConfig(
        epochs=1.0, max_steps=STEPS, micro_batch_size=MICRO_BATCH, gradient_accumulation_steps=4 // world_size, lr=2e-3, lr_batch=0,
        # The gradient of an attention key's bias is exactly zero in theory, so in practice it is rounding noise, and AdamW divides
        # noise by its own size. An eps above that noise keeps such weights from turning the order of a sum into a step.
        eps=1e-6,
        warmup_epochs=0.25, clip_grad=0.5, drop_path=0.2, precision="fp32", ds_config="zero2", eval_epochs=0.0, checkpoint_steps=2,
        log_steps=1,
    )  # fmt: skip
    augment = AugmentConfig(crop_scale=(0.5, 1.0), hflip=0.5, mixup=0.8, cutmix=1.0, random_erase=0.25, label_smoothing=0.1)
    data = replace(base.data, augment=augment, train=str(out / "shards" / "train"), validation=str(out / "shards" / "validation"))
    teacher = replace(base.teacher, arch_args={"patch_size": 4, "embed_dim": 32, "depth": 5, "num_heads": 2}, depths=(2, 1, 2))
    # With loss-free balancing, so that its biases are among the weights that all arrangements must agree on.
    router = RouterConfig(kind="noisy_topk", softmax="before", switch_weight=0.01, balance_rate=0.001)
    student = replace(base.student, embed_dim=16, depths=(1, 2, 1), moe=replace(base.student.moe, router=router))
    return replace(
        base, run_dir=str(out / name), data=data, teacher=teacher, meta=replace(base.meta, depths=(1, 2, 1)), student=student,
        pretrain_meta=phase, modular_train=phase, assemble_finetune=replace(phase, ds_config="zero1"), m2mkd=phase,
        end_to_end=replace(phase, ema_decay=0.5),
    )  # fmt: skip


INPUTS = {
    "pretrain_meta": (),
    "modular_train": ("pretrain_meta",),
    "assemble_finetune": ("modular_train",),
    "m2mkd": ("pretrain_meta", "split"),
    "end_to_end": ("assemble",),
}
"""What each phase reads."""


def run_chain(config: RunConfig, world: World) -> None:
    """From meta model to fine-tuned student."""
    for phase in ("pretrain_meta", "modular_train", "assemble_finetune"):
        run_phase.run_in_world(config, world, phase)
    local(config, world, split)
    run_phase.run_in_world(config, world, "m2mkd")
    local(config, world, assemble)
    run_phase.run_in_world(config, world, "end_to_end")


def each_phase_from(source: Path, config: RunConfig, world: World) -> None:
    """Every phase once, each from the very inputs that the run in `source` had, so that differences do not add up."""
    for phase in INPUTS:
        run_phase.run_in_world(start_from(config, world, f"two_{phase}", phase, source), world, phase)


def local(config: RunConfig, world: World, node: Callable[..., None]) -> None:
    if world.rank == 0:
        node(open_run(config, world))
    barrier()


def start_from(config: RunConfig, world: World, name: str, phase: str, source: Path) -> RunConfig:
    """A new run folder that holds the inputs of `phase` as the run in `source` made them."""
    new = replace(config, run_dir=str(source.with_name(name)))
    if world.rank == 0:
        for node in INPUTS[phase]:
            shutil.copytree(source / node, Path(new.run_dir) / node)
    barrier()
    return new


def single_pair_jobs(config: RunConfig, world: World, mode: str, source: Path) -> None:
    """Three jobs of one pair each, in another order."""
    separate = start_from(config, world, f"{mode}_separate", "m2mkd", source)
    for pair in ("2", "0", "1"):
        run_phase.run_in_world(separate, world, "m2mkd", pair)
    # As if the job had been killed between the last pair's record and the node's.
    again = replace(separate, run_dir=str(source.with_name(f"{mode}_recorded_again")))
    if world.rank == 0:
        shutil.copytree(separate.run_dir, again.run_dir)
        (Path(again.run_dir) / "m2mkd" / "done.json").unlink()
    barrier()
    run_phase.run_in_world(again, world, "m2mkd")


def in_bf16(config: RunConfig, world: World, mode: str, source: Path) -> None:
    """Pairs, and a whole model with a moving average, in bf16."""
    for phase in ("m2mkd", "end_to_end"):
        coarse = replace(config, **{phase: replace(getattr(config, phase), precision="bf16")})
        run_phase.run_in_world(start_from(coarse, world, f"{mode}_bf16_{phase}", phase, source), world, phase)


def interrupted(config: RunConfig, world: World, mode: str, phase: str, source: Path, at_step: int) -> None:
    """Stop the phase at `at_step`, after the checkpoint of step 2, by an exception; then run it again to the end."""
    again = start_from(config, world, f"{mode}_interrupted_{phase}", phase, source)
    original = loop._train_step

    def failing(job: loop.Job, feed: object, active: list[loop.Trainee], step: int, *rest: Any) -> None:
        if step == at_step:
            raise KeyboardInterrupt("stopped by the test")
        original(job, feed, active, step, *rest)  # type: ignore[arg-type]

    loop._train_step = failing
    try:
        run_phase.run_in_world(again, world, phase)
    except KeyboardInterrupt:
        (Path(again.run_dir) / f"stopped_{world.rank}").touch()
    finally:
        loop._train_step = original
    run_phase.run_in_world(again, world, phase)


def spread(config: RunConfig, world: World, mode: str, source: Path) -> None:
    """The student's phases with experts spread over the ranks, and with ZeRO-3: straight, and stopped and resumed; evaluated on the way.

    Batches of 179 of the 359 validation images: rank 0 has 180 of them and needs two forward passes, rank 1 one.
    """
    original = feeds.EvalLoader
    feeds.EvalLoader = lambda *args, **options: original(*args, **{**options, "batch_size": 179})  # type: ignore[assignment, misc]
    try:
        _spread(config, world, mode, source)
    finally:
        feeds.EvalLoader = original  # type: ignore[misc]


def _spread(config: RunConfig, world: World, mode: str, source: Path) -> None:
    for name, change in {"ep": {"ep_size": world.size}, "zero3": {"ds_config": "zero3"}}.items():
        changed = replace(
            config, m2mkd=replace(config.m2mkd, eval_epochs=0.05, **change), end_to_end=replace(config.end_to_end, ema_decay=0.0, **change)
        )
        for phase in ("m2mkd", "end_to_end"):
            run_phase.run_in_world(start_from(changed, world, f"{mode}_{name}_{phase}", phase, source), world, phase)
            interrupted(changed, world, f"{mode}_{name}", phase, source, at_step=3)


def late_rank(config: RunConfig, world: World, mode: str, source: Path) -> None:
    """The last rank comes late to a node that rank 0 does alone; it must neither leave the node out nor wait for ever."""
    late = replace(config, run_dir=str(source.with_name(f"{mode}_late")))
    if world.rank == 0:
        shutil.copytree(source / "assemble_finetune", Path(late.run_dir) / "assemble_finetune")
    barrier()
    for _ in range(2):
        if world.rank == world.size - 1:
            time.sleep(1.5)
        run_phase.run_in_world(late, world, "split")


def broken(config: RunConfig) -> None:
    """A damaged image on the last rank only, at step 1, in a job as the command line starts it."""
    original = ColocatedFeed.batch

    def damaged(feed: ColocatedFeed, request: BatchRequest) -> TeacherBatch:
        if request.step == 1 and os.environ["RANK"] == "1":
            raise ValueError("shard-000000.tar: image number 7 cannot be decoded")
        return original(feed, request)

    ColocatedFeed.batch = damaged  # type: ignore[method-assign]
    run_phase.run_phases(config, ["pretrain_meta"])


def poisoned(config: RunConfig, world: World, mode: str, source: Path) -> None:
    """A NaN loss on the last rank only, at step 2: every rank must stop with the same error before the step."""
    bad = start_from(config, world, f"{mode}_nan", "pretrain_meta", source)
    original = jobs.make_trainee

    def poison(*args: Any, **options: Any) -> loop.Trainee:
        trainee = original(*args, **options)
        inner = trainee.step_fn

        def step(batch: TeacherBatch, log: bool) -> StepOutput:
            output = inner(batch, log)
            hit = trainee.step == 2 and world.rank == world.size - 1
            return replace(output, loss=output.loss * float("nan")) if hit else output

        trainee.step_fn = step
        return trainee

    jobs.make_trainee = poison
    try:
        run_phase.run_in_world(bad, world, "pretrain_meta")
    except loop.NonFiniteLossError as err:
        (Path(bad.run_dir) / f"error_{world.rank}.txt").write_text(str(err))
    finally:
        jobs.make_trainee = original


def main() -> None:
    out, mode = Path(sys.argv[-2]), sys.argv[-1]  # the launcher puts --local_rank in front
    torch.set_num_threads(1)
    if mode == "broken":
        broken(small_config(out, mode, 2))
        return
    world = init_world()
    source = out / "one"
    config = small_config(out, mode, world.size)
    if mode == "one":
        run_chain(config, world)
    else:
        each_phase_from(source, config, world)
    single_pair_jobs(config, world, mode, source)
    in_bf16(config, world, mode, source)
    interrupted(config, world, mode, "m2mkd", source, at_step=3)
    interrupted(config, world, mode, "end_to_end", source, at_step=3)
    if world.size > 1:
        plain = replace(config, end_to_end=replace(config.end_to_end, ema_decay=0.0))
        run_phase.run_in_world(start_from(plain, world, f"{mode}_plain_end_to_end", "end_to_end", source), world, "end_to_end")
        spread(config, world, mode, source)
    late_rank(config, world, mode, source)
    poisoned(config, world, mode, source)
    shutdown()


if __name__ == "__main__":
    main()
