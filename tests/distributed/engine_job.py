"""What the ranks of test_distributed_engine.py run, and the one-process reference that it is compared with.

python -m deepspeed ... engine_job.py first  OUT     all cases, one start
python -m deepspeed ... engine_job.py second OUT     a fresh job: resume, and one of three engines alone
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.train.optim import build_adamw

RANKS = 2
PHASE = PhaseConfig(micro_batch_size=3, gradient_accumulation_steps=2, clip_grad=0.05, lr=1e-2, weight_decay=0.1)
RATES = (1e-2, 8e-3, 5e-3, 2e-3, 1e-3)
CASES = (("zero1", "fp32"), ("zero2", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero2_bf16_reduce", "bf16"))


@dataclass
class Outputs:
    """An output in which DeepSpeed finds no tensor by itself."""

    logits_BV: Tensor
    losses: dict[str, Tensor]


class Net(nn.Module):
    """Odd sizes: 13 * 7 + ... elements do not divide by the ranks, and a weight lies across the border of two parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(5, 13)
        self.norm = nn.LayerNorm(13)
        self.fc2 = nn.Linear(13, 7)
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x_BD: Tensor) -> Outputs:
        self.calls += 1
        logits_BV = self.fc2(torch.tanh(self.norm(self.fc1(x_BD)))) + self.frozen
        return Outputs(logits_BV, {"z": logits_BV.float().logsumexp(-1).square().mean()})


def batch(step: int, micro_step: int, rank: int, net: int = 0) -> tuple[Tensor, Tensor]:
    """Another micro-batch for every step, micro-step, rank and net."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro_step + 10 * rank + net)
    return torch.randn(3, 5, generator=generator), torch.randint(0, 7, (3,), generator=generator)


def loss_of(outputs: Outputs, labels_B: Tensor) -> Tensor:
    """Cross entropy plus a second term that also goes through the module's outputs."""
    return nn.functional.cross_entropy(outputs.logits_BV.float(), labels_B) + 0.1 * outputs.losses["z"]


def reference(precision: str, rates: tuple[float, ...]) -> tuple[dict[str, Tensor], list[float]]:
    """One process, plain torch: fp32 on the concatenated batch; bf16 as bf16 forward and backward around fp32 masters."""
    net = Net(0)
    optimizer = build_adamw(net, PHASE)
    norms = []
    trainable = [p for p in net.parameters() if p.requires_grad]
    for step, lr in enumerate(rates):
        optimizer.zero_grad()
        pieces = [batch(step, m, r) for m in range(PHASE.gradient_accumulation_steps) for r in range(RANKS)]
        if precision == "fp32":
            x_BD, labels_B = (torch.cat(part) for part in zip(*pieces, strict=True))
            loss_of(net(x_BD), labels_B).backward()
        else:
            for p in trainable:
                p.grad = torch.zeros_like(p)
            for x_BD, labels_B in pieces:
                low = Net(0).bfloat16()
                low.load_state_dict({k: v.to(low.state_dict()[k].dtype) for k, v in net.state_dict().items()})
                (loss_of(low(x_BD.bfloat16()), labels_B) / PHASE.gradient_accumulation_steps).backward()
                for p, q in zip(trainable, (q for q in low.parameters() if q.requires_grad), strict=True):
                    p.grad += q.grad.float() / RANKS
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable, PHASE.clip_grad)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return {k: v.detach().clone() for k, v in net.state_dict().items()}, norms


def make_engine(
    world: jobs.World, name: str, precision: str, *, seed: int = 0, phase: PhaseConfig = PHASE, ema_decay: float = 0.0
) -> DeepSpeedEngine:
    net = Net(seed)
    config = resolve_ds_config(name, phase, world_size=world.size, precision=precision)
    return DeepSpeedEngine(net, build_adamw(net, phase), config, world, ema_decay=ema_decay)


def train(engines: list[DeepSpeedEngine], world: jobs.World, steps: range, nets: list[int]) -> list[list[float]]:
    """Steps over all engines in turn, micro-batch by micro-batch; the norms of each engine."""
    norms: list[list[float]] = [[] for _ in engines]
    for step in steps:
        for micro_step in range(PHASE.gradient_accumulation_steps):
            for index, engine in enumerate(engines):
                x_BD, labels_B = batch(step, micro_step, world.rank, nets[index])
                engine.backward(loss_of(engine(x_BD), labels_B))
                norm = engine.step(RATES[step])
                assert (norm is None) == (micro_step == 0), "a norm comes with the last micro-batch and only then"
                if norm is not None:
                    norms[index].append(norm)
    return norms


@contextmanager
def closing(*engines: DeepSpeedEngine) -> Iterator[list[DeepSpeedEngine]]:
    yield list(engines)
    for engine in engines:
        engine.close()


def same_on_all_ranks(state: dict[str, Tensor]) -> bool:
    """Bitwise, by every rank's bytes."""
    views = jobs.gather_object({k: v.contiguous().view(torch.uint8).numpy().tobytes() if v.ndim else v.item() for k, v in state.items()})
    return all(view == views[0] for view in views)


def parity(world: jobs.World, out: Path, name: str, precision: str) -> dict[str, Any]:
    """Three steps, save, two more; rank 1 starts from other weights, which rank 0's replace."""
    seed = 0 if world.rank == 0 else 77
    with closing(make_engine(world, name, precision, seed=seed, ema_decay=0.5)) as (engine,):
        start = engine.full_state_dict()
        norms = train([engine], world, range(3), [0])
        middle, ema = engine.full_state_dict(), engine.full_state_dict(ema=True)
        folder = out / f"{name}_{precision}"
        if world.is_main:
            folder.mkdir(parents=True)
        jobs.barrier()
        engine.save(folder)
        x_BD, labels_B = batch(3, 0, world.rank)
        engine.backward(loss_of(engine(x_BD), labels_B))
        engine.step(RATES[3])
        refusal = ""
        try:
            engine.save(folder)
        except RuntimeError as err:
            refusal = str(err)
        x_BD, labels_B = batch(3, 1, world.rank)
        engine.backward(loss_of(engine(x_BD), labels_B))
        norms[0].append(engine.step(RATES[3]))
        norms[0] += train([engine], world, range(4, 5), [0])[0]
        end = engine.full_state_dict()
        rounded = {k: p.detach().float().cpu().clone() for k, p in engine.module.named_parameters()}
        return {"start": start, "middle": middle, "ema": ema, "end": end, "ema_end": engine.full_state_dict(ema=True), "norms": norms[0],
                "same": all(same_on_all_ranks(s) for s in (start, middle, ema, end)), "rounded": rounded, "refusal": refusal}  # fmt: skip


def resume(world: jobs.World, out: Path, name: str, precision: str) -> dict[str, Any]:
    """A fresh job and other initial weights: load, then the two steps that `parity` made after saving."""
    with closing(make_engine(world, name, precision, seed=5, ema_decay=0.5)) as (engine,):
        engine.load(out / f"{name}_{precision}")
        loaded = engine.full_state_dict()
        norms = train([engine], world, range(3, 5), [0])
        return {"middle": loaded, "end": engine.full_state_dict(), "ema_end": engine.full_state_dict(ema=True), "norms": norms[0]}


def not_finite(world: jobs.World, name: str, precision: str) -> dict[str, Any]:
    """Rank 1 alone meets an infinite loss."""
    phase = dataclasses.replace(PHASE, gradient_accumulation_steps=1)
    with closing(make_engine(world, name, precision, phase=phase)) as (engine,):
        before = engine.full_state_dict()
        x_BD, labels_B = batch(0, 0, world.rank)
        loss = loss_of(engine(x_BD), labels_B)
        engine.backward(loss * float("inf") if world.rank == 1 else loss)
        norm = engine.step(1e-2)
        after = engine.full_state_dict()
        after["calls"] = before["calls"]
        return {"norm": jobs.gather_object(norm), "unchanged": all(torch.equal(before[k], after[k]) for k in before)}


def three_engines(world: jobs.World, name: str, which: list[int]) -> list[dict[str, Tensor]]:
    """Engines of the nets `which`, trained in turn on the same steps; each net has its own weights and data."""
    with closing(*(make_engine(world, name, "fp32", seed=20 + i) for i in which)) as engines:
        train(engines, world, range(3), which)
        return [engine.full_state_dict() for engine in engines]


def collectives(world: jobs.World) -> dict[str, Any]:
    return {
        "ranks": jobs.gather_object(world.rank),
        "local": (world.local_rank, world.local_size, world.size, str(world.device)),
        "from_1": jobs.broadcast_object({"rank": world.rank}, src=1),
        "sum": float(jobs.all_reduce_sum(torch.tensor(float(world.rank + 1)))),
    }


def gloo_threads() -> int:
    """Threads of this process that belong to process groups (Linux keeps the names that torch and gloo give them)."""
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))


def main(part: str, out: Path) -> None:
    world = jobs.init_world(timeout_s=60)
    todo: dict[str, Callable[[], Any]] = {}
    for name, precision in CASES:
        step = parity if part == "first" else resume
        todo[f"{name}_{precision}"] = lambda n=name, p=precision, s=step: s(world, out, n, p)
        if part == "first":
            todo[f"not_finite_{name}_{precision}"] = lambda n=name, p=precision: not_finite(world, n, p)
    for name in ("zero1", "zero2"):
        todo[f"engines_{name}"] = lambda n=name: three_engines(world, n, [0, 1, 2] if part == "first" else [1])
    todo["collectives"] = lambda: collectives(world)
    results = {key: run() for key, run in todo.items()}
    if world.is_main:
        torch.save(results, out / f"{part}.pt")
    working = gloo_threads()
    jobs.shutdown()
    (out / f"{part}_threads_{world.rank}.json").write_text(json.dumps({"working": working, "left": gloo_threads()}))


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    main(words[0], Path(words[1]))
