"""An independent slow router in plain Python, token by token, and routers whose logits a test writes down directly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.moe.routers import LinearRouter, make_router


def identity_router(num_experts: int, **config: object) -> LinearRouter:
    """A router whose logits are its input plus its bias."""
    settings = {"top_k": 2, "switch_weight": 0.0, **config}
    router = make_router(num_experts, num_experts, RouterConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router


def softmax(row: Sequence[float]) -> list[float]:
    top = max(row)
    exps = [math.exp(x - top) for x in row]
    return [x / sum(exps) for x in exps]


def slow_top_k(logits: Sequence[Sequence[float]], k: int, capacity: int, *, batch: bool) -> tuple[list[list[int]], list[list[float]]]:
    """V-MoE's rule, one claim after the other: softmax, the k best, expert buffers of `capacity` places."""
    num_experts = len(logits[0])
    probs = [softmax(row) for row in logits]
    choice = [sorted(range(num_experts), key=lambda e, row=row: (-row[e], e))[:k] for row in logits]
    ids = [[num_experts] * k for _ in logits]
    weights = [[0.0] * k for _ in logits]
    served = sorted(range(len(logits)), key=lambda t: -max(probs[t])) if batch else range(len(logits))
    free = [capacity] * num_experts
    for j in range(k):
        for t in served:
            expert = choice[t][j]
            if free[expert] > 0:
                free[expert] -= 1
                ids[t][j], weights[t][j] = expert, probs[t][expert]
    return ids, weights


def slow_expert_choice(logits: Sequence[Sequence[float]], capacity: int) -> list[list[float]]:
    """Weight of (token, expert), zero where the expert did not take the token."""
    probs = [softmax(row) for row in logits]
    taken = [[0.0] * len(logits[0]) for _ in logits]
    for e in range(len(logits[0])):
        for t in sorted(range(len(logits)), key=lambda t: -probs[t][e])[:capacity]:
            taken[t][e] = probs[t][e]
    return taken
