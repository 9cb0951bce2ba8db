"""What the ranks of test_distributed_reshape.py run: one training state that moves from cluster to cluster.

python -m deepspeed ... reshape_job.py OUT begin    2 ranks: ep 2 (saved, and trained to the end without moving); ZeRO-1 -> 2 -> 3 -> 1
python -m deepspeed ... reshape_job.py OUT four     4 ranks: ep 4 x dp 1, then ep 2 x dp 2
python -m deepspeed ... reshape_job.py OUT back     2 ranks: ep 2 again, what the engine saved and what the tool made
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor

from m2mkd_ds.config import PhaseConfig, RouterConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.expert_parallel import shard_experts_
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.train.optim import build_adamw
from tests.distributed.experts_job import batch, loss_of

PIECES = 4
"""Micro-batches a step, on any number of ranks."""
PHASE = PhaseConfig(micro_batch_size=3, clip_grad=0.2, lr=1e-2, weight_decay=0.1, eps=1e-5)
RATES = (1e-2, 8e-3, 5e-3, 2e-3)
SAVED_AT = 2
"""Steps before the state is saved; the rest is what every cluster makes again."""


def make_net(seed: int) -> VisionMoE:
    """Two blocks of four experts each, router losses, and biases of the routers that no gradient moves."""
    router = RouterConfig(switch_weight=0.05, z_weight=0.01, importance_weight=0.02, balance_rate=0.001)
    net = VisionMoE(VMoEArch(8, 4, 5, 16, 2, 1.5, 2, (0, 1), 4, router), StageSpan.whole(2), seed=seed)
    with torch.no_grad():  # fresh routers have nearly equal logits, and a rounding would move tokens
        for block in net.blocks.values():
            block.moe.router.weight.mul_(20)  # type: ignore[union-attr, operator]
    return net


@contextmanager
def engine_of(world: jobs.World, ep_size: int, stage: int = 1, *, seed: int = 5) -> Iterator[DeepSpeedEngine]:
    """Weights of other seeds than 0 are to be replaced by what is loaded."""
    net = make_net(seed)
    if ep_size > 1:
        shard_experts_(net, world, ep_size)
    phase = dataclasses.replace(PHASE, gradient_accumulation_steps=PIECES // world.size)
    config = resolve_ds_config(f"zero{stage}", phase, world_size=world.size, precision="fp32")
    engine = DeepSpeedEngine(net, build_adamw(net, phase), config, world, ema_decay=0.5)
    yield engine
    engine.close()


def train(engine: DeepSpeedEngine, world: jobs.World, steps: range) -> None:
    """The same four micro-batches a step, shared out over the ranks there are."""
    mine = range(world.rank, PIECES, world.size)
    for step in steps:
        for piece in mine:
            images, labels = batch(step, piece // 2, piece % 2)
            engine.backward(loss_of(engine(images), labels))
            engine.step(RATES[step])


def held_by_deepspeed(engine: DeepSpeedEngine, ep_size: int) -> dict[str, dict[str, Tensor]]:
    """Whole weights and moments by kind and name as DeepSpeed itself puts them together; the shares of experts joined here."""
    zero = engine._engine.optimizer
    zero._hp_optimizer_states_linked = False  # DeepSpeed 0.19 links the states of all groups when only the first one has any
    zero._lazy_init_hp_params_optimizer_state()
    kinds: dict[str, dict[str, Tensor]] = {"master": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, p in engine.module.named_parameters():
        kinds["master"][name] = safe_get_full_fp32_param(p)
        for kind in ("exp_avg", "exp_avg_sq"):
            kinds[kind][name] = safe_get_full_optimizer_state(p, kind)
    shares = jobs.gather_object(kinds)[:ep_size]
    return {
        kind: {name: torch.cat([s[kind][name] for s in shares]) if "experts" in name else value for name, value in shares[0][kind].items()}
        for kind in kinds
    }


def save(engine: DeepSpeedEngine, world: jobs.World, folder: Path) -> None:
    if world.is_main:
        folder.mkdir()
    jobs.barrier()
    engine.save(folder)
    jobs.barrier()


def go_on(engine: DeepSpeedEngine, world: jobs.World) -> dict[str, Tensor]:
    """The last steps; the weights then."""
    train(engine, world, range(SAVED_AT, len(RATES)))
    return engine.full_state_dict()


def begin(world: jobs.World, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for ep_size, name in ((2, "ep2"), (1, "zero1")):
        with engine_of(world, ep_size, seed=0) as engine:
            with torch.no_grad():
                for number, block in enumerate(engine.module.blocks.values()):  # type: ignore[union-attr, operator, arg-type]
                    block.moe.router.balance_bias.copy_(torch.tensor([0.01, -0.02, 0.03, 0.0]) * (number + 1))
            train(engine, world, range(SAVED_AT))
            results[name] = {"truth": held_by_deepspeed(engine, ep_size), "middle": engine.full_state_dict()}
            results[name]["truth"]["ema"] = engine.full_state_dict(ema=True)
            save(engine, world, out / name)
            results[name]["end"] = go_on(engine, world)
    for stage, source, target in ((2, "zero1", "zero12"), (3, "zero12", "zero123"), (1, "zero123", "zero1231")):
        with engine_of(world, 1, stage) as engine:
            engine.load(out / source)
            save(engine, world, out / target)
            results[target] = {"end": go_on(engine, world)}
    return results


def four(world: jobs.World, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for ep_size, stage, source, target in ((4, 1, "one", "ep4"), (2, 2, "ep4", "ep2dp2")):
        with engine_of(world, ep_size, stage) as engine:
            engine.load(out / source)
            save(engine, world, out / target)
            results[target] = {"middle": engine.full_state_dict(), "end": go_on(engine, world)}
    return results


def back(world: jobs.World, out: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for source, target in (("ep2dp2", "ep2_again"), ("tool_ep2", "ep2_of_tool")):
        with engine_of(world, 2) as engine:
            engine.load(out / source)
            first = engine.snapshot()
            train(engine, world, range(SAVED_AT, SAVED_AT + 1))  # the snapshot does not move with the weights
            folder = out / target
            if world.is_main:
                folder.mkdir()
            jobs.barrier()
            first.write(folder)
            engine.load(out / source)
            results[target] = {"end": go_on(engine, world)}
            if target == "ep2_again":
                results["reused"] = jobs.gather_object(reused(engine, first, out / f"reused_{world.rank}"))
    return results


def reused(engine: DeepSpeedEngine, old: Any, folder: Path) -> dict[str, Any]:
    """A second snapshot in the memory of the first: where its tensors lie, what the old one says, and what is written."""
    folder.mkdir()
    before = {name: value.data_ptr() for name, value in old._tensors.items()}
    new = engine.snapshot(old)
    refusal = ""
    try:
        old.write(folder)
    except RuntimeError as err:
        refusal = str(err)
    written = new.write(folder)
    engine_again = engine.snapshot().write(make(folder / "fresh"))
    return {
        "same_memory": before == {name: value.data_ptr() for name, value in new._tensors.items()},
        "refusal": refusal,
        "written": {name: tuple(record) for name, record in written.items()},
        "fresh": {name: tuple(record) for name, record in engine_again.items()},
    }


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main(out: Path, part: str) -> None:
    world = jobs.init_world(timeout_s=60)
    results = {"begin": begin, "four": four, "back": back}[part](world, out)
    if world.is_main:
        torch.save(results, out / f"{part}.pt")
    jobs.shutdown()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(Path(words[0]), words[1])
