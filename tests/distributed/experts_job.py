"""What the ranks of test_distributed_expert_parallel.py run, and the one-process references that they are compared with.

python -m deepspeed ... experts_job.py OUT
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import ROUTER_PRESETS, PhaseConfig, RouterConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.expert_parallel import ParallelExperts, gather_experts, shard_experts_
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch, VMoEOutput
from m2mkd_ds.moe.backends import Activation
from m2mkd_ds.moe.dispatch import make_plan
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.train.optim import build_adamw

CASES = {
    2: (
        ("zero1", "fp32", 1), ("zero1", "fp32", 2), ("zero2", "fp32", 2), ("zero1", "bf16", 2), ("zero2", "bf16", 2),
        ("zero3", "fp32", 1), ("zero3", "bf16", 1),
    ),
    4: (("zero1", "fp32", 1), ("zero1", "fp32", 2), ("zero2", "fp32", 2), ("zero1", "fp32", 4), ("zero2", "fp32", 4)),
}  # fmt: skip
"""(ds_config, precision, ep_size) by number of ranks."""
PHASE = PhaseConfig(micro_batch_size=3, gradient_accumulation_steps=2, clip_grad=0.2, lr=1e-2, weight_decay=0.1, eps=1e-5)
"""eps: with AdamW's usual 1e-8, a gradient that is zero in exact arithmetic (the key's bias: softmax does not see it) would turn rounding
noise into steps of size lr."""
RATES = (1e-2, 8e-3, 5e-3, 2e-3)
TOKENS = {2: (5, 0), 4: (5, 0, 3, 1)}
"""Uneven tokens by rank, one rank without any."""


def make_net(seed: int, *, losses: bool) -> VisionMoE:
    """Two blocks of four experts each; a learning signal through every part."""
    router = RouterConfig(switch_weight=0.05, z_weight=0.01, importance_weight=0.02) if losses else RouterConfig(switch_weight=0.0)
    arch = VMoEArch(8, 4, 5, 16, 2, 1.5, 2, (0, 1), 4, router)
    net = VisionMoE(arch, StageSpan.whole(2), seed=seed)
    with torch.no_grad():  # fresh routers have nearly equal logits, and a rounding would move tokens
        for block in net.blocks.values():
            block.moe.router.weight.mul_(20)  # type: ignore[union-attr, operator]
    return net


def batch(step: int, micro_step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Another micro-batch for every step, micro-step and rank."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + 10 * rank)
    return torch.randn(3, 3, 8, 8, generator=generator), torch.randint(0, 5, (3,), generator=generator)


def loss_of(output: VMoEOutput, labels_B: Tensor) -> Tensor:
    task = F.cross_entropy(output.output.float(), labels_B)
    return task + sum((value.float() for value in output.router_losses.values()), torch.zeros(()))


def reference(ranks: int, *, losses: bool, steps: int = len(RATES)) -> tuple[dict[str, Tensor], list[float]]:
    """One process, plain torch. Without router losses: one forward pass over the concatenated batch of all ranks and micro-batches.

    Router losses are not linear in the batch and belong to a micro-batch of a rank (as in V-MoE and DeepSpeed), so with them the mean is
    taken over the same pieces.
    """
    net = make_net(0, losses=losses)
    optimizer = build_adamw(net, PHASE)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        pieces = [batch(step, m, r) for m in range(PHASE.gradient_accumulation_steps) for r in range(ranks)]
        if losses:
            torch.stack([loss_of(net(images), labels) for images, labels in pieces]).mean().backward()
        else:
            images, labels = (torch.cat(part) for part in zip(*pieces, strict=True))
            loss_of(net(images), labels).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(net.parameters(), PHASE.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        optimizer.step()
    return {k: v.detach().clone() for k, v in net.state_dict().items()}, norms


@contextmanager
def engine_of(
    world: jobs.World, name: str, precision: str, ep_size: int, *, seed: int, losses: bool = True, ema_decay: float = 0.0
) -> Iterator[DeepSpeedEngine]:
    net = make_net(seed, losses=losses)
    if ep_size > 1:
        shard_experts_(net, world, ep_size)
    config = resolve_ds_config(name, PHASE, world_size=world.size, precision=precision)
    engine = DeepSpeedEngine(net, build_adamw(net, PHASE), config, world, ema_decay=ema_decay)
    yield engine
    engine.close()


def train(engine: DeepSpeedEngine, world: jobs.World, steps: range) -> list[float]:
    norms = []
    for step in steps:
        for micro_step in range(PHASE.gradient_accumulation_steps):
            images, labels = batch(step, micro_step, world.rank)
            engine.backward(loss_of(engine(images), labels))
            norm = engine.step(RATES[step])
        assert norm is not None
        norms.append(norm)
    return norms


def parity(world: jobs.World, out: Path, name: str, precision: str, ep_size: int) -> dict[str, Any]:
    """With router losses: two steps, save, two more; then a fresh engine with other weights loads and makes the last two again."""
    folder = out / f"{world.size}_{name}_{precision}_{ep_size}"
    if world.is_main:
        folder.mkdir(parents=True)
    seed = 0 if world.rank == 0 else 77  # rank 0's weights are the ones that count
    with engine_of(world, name, precision, ep_size, seed=seed, ema_decay=0.5) as engine:
        start = engine.full_state_dict()
        norms = train(engine, world, range(2))
        middle, middle_ema = engine.full_state_dict(), engine.full_state_dict(ema=True)
        engine.save(folder)
        norms += train(engine, world, range(2, 4))
        end, ema = engine.full_state_dict(), engine.full_state_dict(ema=True)
    with engine_of(world, name, precision, ep_size, seed=5, ema_decay=0.5) as engine:
        engine.load(folder)
        loaded = engine.full_state_dict()
        again = train(engine, world, range(2, 4))
        resumed, resumed_ema = engine.full_state_dict(), engine.full_state_dict(ema=True)
    moved: dict[str, dict[str, Tensor]] = {}
    if name != "zero3":
        with engine_of(world, name, precision, 2 if ep_size == 1 else 1, seed=5, ema_decay=0.5) as engine:
            engine.load(folder)
            moved = {"moved": engine.full_state_dict(), "moved_ema": engine.full_state_dict(ema=True)}
    with engine_of(world, name, precision, ep_size, seed=seed, losses=False) as engine:
        plain_norms = train(engine, world, range(4))
        plain = engine.full_state_dict()
    return {"start": start, "middle": middle, "end": end, "ema": ema, "loaded": loaded, "resumed": resumed, "resumed_ema": resumed_ema,
            "norms": norms, "again": again, "plain": plain, "plain_norms": plain_norms, "middle_ema": middle_ema, **moved}  # fmt: skip


def another_stage(world: jobs.World, out: Path, saved: str, wanted: str) -> dict[str, Any]:
    """What `parity` saved with ZeRO stage `saved` goes on with stage `wanted`, on as many ranks and (rank 0 of) every number of them."""
    with engine_of(world, wanted, "fp32", 1, seed=5, ema_decay=0.5) as engine:
        engine.load(out / f"2_{saved}_fp32_1")
        loaded, ema = engine.full_state_dict(), engine.full_state_dict(ema=True)
        train(engine, world, range(2, 4))
        return {"loaded": loaded, "ema": ema, "end": engine.full_state_dict()}


def left_alive(world: jobs.World, name: str) -> int:
    """How many of an engine's parameters are still in memory after it was closed and nobody else has them."""
    with engine_of(world, name, "fp32", 1, seed=0) as engine:
        train(engine, world, range(1))
        watched = [weakref.ref(p) for p in engine.module.parameters()]
    del engine
    gc.collect()
    return sum(reference() is not None for reference in watched)


ROUTERS = {
    **{name: dataclasses.replace(router, noise=0.0, load_weight=0.0) for name, router in ROUTER_PRESETS.items()},
    "batch priority": RouterConfig(capacity_factor=0.6, capacity_priority="batch"),
}
"""Every preset (the noise would differ from call to call), and one that drops a lot."""
BACKENDS = ("reference", "loop", "grouped", "padded", "fused", *(["tutel_dispatch"] if importlib.util.find_spec("tutel") else []))


def spread_and_whole(world: jobs.World, router: RouterConfig, backend: str, activation: Activation) -> float:
    """Largest difference, on this rank's tokens, of output and input's gradient between a layer with spread experts and the whole one."""
    whole = MoELayer(16, 24, 4, router, backend, activation, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole.router.weight.mul_(20)
    spread = copy.deepcopy(whole)
    shard_experts_(spread, world, world.size)
    generator = torch.Generator().manual_seed(world.rank)
    x_BLD, grad_BLD = (torch.randn(2 + world.rank, 5, 16, generator=generator) for _ in range(2))
    results = []
    for layer in (whole, spread):
        leaf_BLD = x_BLD.clone().requires_grad_()
        y_BLD, _ = layer(leaf_BLD)
        y_BLD.backward(grad_BLD)
        assert leaf_BLD.grad is not None
        results.append(torch.stack([y_BLD.detach(), leaf_BLD.grad]))
    return float((results[0] - results[1]).abs().max())


def uneven(world: jobs.World, ep_size: int) -> dict[str, Any]:
    """One spread layer on ranks with other numbers of tokens; rank 2 (or 0) sends everything to expert 1, so others get nothing."""
    experts = Experts(8, 12, 4, "auto", generator=torch.Generator().manual_seed(1))
    holder = nn.Sequential(experts)
    groups = shard_experts_(holder, world, ep_size)
    spread = holder[0]
    assert isinstance(spread, ParallelExperts)
    x_TD, weights_TK, ids_TK, grad_TD = tokens_of(world.size, world.rank)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    y_TD = spread(x_TD, weights_TK, make_plan(ids_TK, 4, max_rows=ids_TK.numel()))
    y_TD.backward(grad_TD)
    grads = {}
    for name, p in spread.named_parameters():
        assert p.grad is not None
        torch.distributed.all_reduce(p.grad, group=groups.data_group)
        grads[name] = gather_experts(p.grad, groups)
    return {"ranks": jobs.gather_object((y_TD.detach(), x_TD.grad, weights_TK.grad)), "grads": grads}


def tokens_of(ranks: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x_TD, weights_TK, ids_TK, grad_TD) of a rank; id 4 is "no expert"."""
    num_tokens = TOKENS[ranks][rank]
    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(num_tokens, 5, generator=generator).argsort(dim=1)[:, :2].contiguous()
    if rank == 2:
        ids_TK = torch.tensor([[1, 4]]).repeat(num_tokens, 1)
    weights_TK = torch.rand(num_tokens, 2, generator=generator) * (ids_TK < 4)
    return torch.randn(num_tokens, 8, generator=generator), weights_TK, ids_TK, torch.randn(num_tokens, 8, generator=generator)


def uneven_reference(ranks: int) -> dict[str, Any]:
    """One process, the tokens of all ranks one after the other, in fp64, one token at a time."""
    experts = Experts(8, 12, 4, "reference", generator=torch.Generator().manual_seed(1)).double()
    parts = [[t.double() if t.is_floating_point() else t for t in tokens_of(ranks, r)] for r in range(ranks)]
    leaves = [(x.requires_grad_(), w.requires_grad_()) for x, w, _, _ in parts]
    outputs = []
    for (x_TD, weights_TK), (_, _, ids_TK, grad_TD) in zip(leaves, parts, strict=True):
        rows = []
        for t in range(x_TD.shape[0]):
            y_D = torch.zeros(8, dtype=torch.double)
            for k in range(2):
                e = int(ids_TK[t, k])
                if e < 4:
                    h = F.gelu(experts.up_proj[e] @ x_TD[t] + experts.up_proj_bias[e])
                    y_D = y_D + weights_TK[t, k] * (experts.down_proj[e] @ h + experts.down_proj_bias[e])
            rows.append(y_D)
        y_TD = torch.stack(rows) if rows else torch.zeros(0, 8, dtype=torch.double)
        if rows:
            y_TD.backward(grad_TD)
        outputs.append(y_TD.detach())
    return {
        "ranks": [(y, x.grad, w.grad) for y, (x, w) in zip(outputs, leaves, strict=True)],
        "grads": {name: p.grad for name, p in experts.named_parameters()},
    }


def main(out: Path) -> None:
    world = jobs.init_world(timeout_s=60)
    results: dict[str, Any] = {}
    for name, precision, ep_size in CASES[world.size]:
        results[f"{name}_{precision}_{ep_size}"] = parity(world, out, name, precision, ep_size)
    if world.size == 2:
        for saved, wanted in (("zero1", "zero3"), ("zero3", "zero2")):
            results[f"{saved}_to_{wanted}"] = another_stage(world, out, saved, wanted)
        results["left_alive"] = {name: left_alive(world, name) for name in ("zero1", "zero3")}
        results["spread_and_whole"] = {
            f"{name}-{backend}-{activation}": jobs.gather_object(spread_and_whole(world, router, backend, activation))
            for name, router in ROUTERS.items()
            for backend, activation in [*((b, "gelu") for b in BACKENDS), ("fused", "swiglu")]
        }
    for ep_size in (2, world.size):
        results[f"uneven_{ep_size}"] = uneven(world, ep_size)
    if world.is_main:
        torch.save(results, out / f"world_{world.size}.pt")
    jobs.shutdown()


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(Path(words[0]))
