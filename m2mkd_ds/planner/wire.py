"""Bytes that a rank sends in one optimizer step, and the time that the links need for them.

    all-reduce of n ranks, ring     2 (n-1)/n of the tensor             this trainer's gradients, ZeRO-1 and ZeRO-2 alike
    all-gather, reduce-scatter      (n-1)/n                             updated weights; ZeRO-3's weights and gradients
    all-to-all of P ranks           (P-1)/P of the rows                 twice forward, twice backward, in every block with spread experts

ZeRO-1 reduces once a step, ZeRO-2 and ZeRO-3 after every micro-batch. A ring passes the border of a host once, so its slowest link is the
host's network, for every rank's bytes; an all-to-all that leaves the host shares it among the host's ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_ds.planner.partition import Partition
from m2mkd_ds.planner.rank_memory import Layout
from m2mkd_ds.planner.run_cluster import RunCluster


@dataclass(frozen=True, kw_only=True)
class Wire:
    """Of one rank and optimizer step, in bytes."""

    gradients: float
    weights: float
    """Gathered after the step; with ZeRO-3 before their use."""
    exchange: float
    """Rows to experts on other ranks and back."""
    teacher: float
    """Received from a teacher server."""
    network_s: float
    """Seconds that the links need for all of it, one thing after the other."""

    @property
    def total(self) -> float:
        return self.gradients + self.weights + self.exchange + self.teacher


def wire(parts: Sequence[Partition], layout: Layout, cluster: RunCluster, *, exchanged_numbers: float, teacher_image_bytes: float) -> Wire:
    """`exchanged_numbers`: elements of rows that one image has in all blocks with spread experts, one way, own ones included."""
    element = 2 if layout.precision == "bf16" else 4
    reduced = 4 if layout.zero.get("communication_data_type", "fp32") == "fp32" else 2
    gradients = weights = 0.0
    for row in (row for part in parts for row in part.rows):
        share = (row.ranks - 1) / row.ranks
        if layout.stage == 3:
            gradients += share * reduced * row.numel * layout.accumulation
            weights += 2 * share * element * row.numel * layout.accumulation
        else:
            gradients += 2 * share * reduced * row.numel * (layout.accumulation if layout.stage == 2 else 1)
            weights += share * element * row.numel
    images = layout.micro_batch_size * layout.accumulation
    exchange = 4 * exchanged_numbers * images * element * (layout.ep_size - 1) / layout.ep_size
    teacher = teacher_image_bytes * images
    network = cluster.network_gbps * 1e9 / 8
    inside = cluster.gpu_bandwidth * 1e9
    ring_s = (gradients + weights) / (min(inside, network) if cluster.nodes > 1 else inside)
    return Wire(
        gradients=gradients, weights=weights, exchange=exchange, teacher=teacher,
        network_s=ring_s + _exchange_s(exchange, layout, cluster) + teacher * cluster.gpus_per_node / network,
    )  # fmt: skip


def _exchange_s(exchange: float, layout: Layout, cluster: RunCluster) -> float:
    inside = cluster.gpu_bandwidth * 1e9
    if layout.ep_size <= cluster.gpus_per_node:  # the ranks of a group are neighbours
        return exchange / inside
    leaving = (layout.ep_size - cluster.gpus_per_node) / (layout.ep_size - 1)
    out_s = exchange * leaving * cluster.gpus_per_node / (cluster.network_gbps * 1e9 / 8)
    return max(out_s, exchange * (1 - leaving) / inside)
