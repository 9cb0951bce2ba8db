"""Routing statistics -> numbers for metrics.jsonl. Reading them waits for the GPU, so call it at log steps only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from m2mkd_ds.moe.routing import RoutingStats


def merge_stats(parts: Sequence[RoutingStats]) -> RoutingStats:
    """Statistics of one layer over several batches (or ranks): sums, means weighted by the number of choices, largest logit.

    Raises ValueError for an empty sequence.
    """
    if not parts:
        raise ValueError("merge_stats: no statistics to merge")
    load_E = torch.stack([p.load_E for p in parts]).sum(dim=0)
    importance_E = torch.stack([p.importance_E for p in parts]).sum(dim=0)
    # The number of choices stands for the number of tokens: every token has the same K (expert choice: up to the rounding of C).
    choices_P = torch.stack([p.load_E.sum() for p in parts]).float()
    shares_P = choices_P / choices_P.sum().clamp_min(1)
    entropy, drop_rate, uncovered = (
        (torch.stack([getattr(p, name) for p in parts]) * shares_P).sum() for name in ("entropy", "drop_rate", "uncovered")
    )
    return RoutingStats(load_E, importance_E, entropy, torch.stack([p.max_logit for p in parts]).max(), drop_rate, uncovered)


def summarise(stats: Mapping[int, RoutingStats]) -> dict[str, float | list[float]]:
    """Metrics per block number: `moe/{block}/load` (share of the choices an expert got, before drops; sums to 1), `dead` (experts
    that nobody chose), `max_over_mean` (1 is balanced, E is collapsed), `entropy` (nats), `drop_rate` (share of the choices dropped
    for capacity) and `uncovered` (share of the tokens without any expert)."""
    metrics: dict[str, float | list[float]] = {}
    for block, s in sorted(stats.items()):
        counts = [int(n) for n in s.load_E.tolist()]
        total = max(sum(counts), 1)
        metrics |= load_metrics(block, [n / total for n in counts])
        for name in ("entropy", "drop_rate", "uncovered"):
            metrics[f"moe/{block}/{name}"] = float(getattr(s, name))
    return metrics


def load_metrics(block: int, load_E: list[float]) -> dict[str, float | list[float]]:
    """What follows from the shares of the choices that the experts of one block got."""
    return {
        f"moe/{block}/load": load_E,
        f"moe/{block}/dead": float(load_E.count(0.0)),
        f"moe/{block}/max_over_mean": max(load_E) * len(load_E),
    }
