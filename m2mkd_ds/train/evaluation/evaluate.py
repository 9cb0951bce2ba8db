"""Exact evaluation: every validation image once on any number of ranks, proved by count and checksum in the run itself.

Ranks take samples rank, rank + world, ...: their batches may differ in number and size. That is safe because no collective runs
before the end; models whose forward pass is one (spread experts, ZeRO-3) are run `in_step`, a rank that has no batch left with an empty
one. Shape letters: B images, V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import ImageBatch
from m2mkd_ds.distributed.watch.activity import section
from m2mkd_ds.distributed.world import World, all_reduce_sum, gather_object
from m2mkd_ds.logs import progress
from m2mkd_ds.moe.routing import RoutingStats

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution."""


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927): right near 0 and 1, unlike the normal approximation."""
    if total == 0:
        raise ValueError("no images: an accuracy of nothing has no confidence interval")
    p, z2 = correct / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """95 % interval of acc_first - acc_second on the same images, from the images that only one of them gets right."""
    difference = (only_first - only_second) / total
    variance = ((only_first + only_second) / total - difference**2) / total
    half = Z_95 * math.sqrt(max(variance, 0.0))
    return difference - half, difference + half


@dataclass
class Score:
    """What one model did on the whole validation set (after `reduce`, the same on every rank)."""

    images: int
    top1_correct: int
    top5_correct: int
    loss_sum: float
    predictions_N: Tensor
    """argmax class by sample id, int64."""
    hits_N: Tensor
    """Whether that class is right, by sample id; int64 0 or 1."""
    expert_load: dict[int, Tensor] = field(default_factory=dict)
    """Rows routed to each expert by block, int64 [E]; empty for dense models."""
    entropy_sum: dict[int, float] = field(default_factory=dict)
    """Sum over images of the routing entropy by block, nats."""
    drop_sum: dict[int, float] = field(default_factory=dict)
    """Sum over images of the share of a token's choices that were dropped for capacity, by block."""

    @property
    def top1(self) -> float:
        return self.top1_correct / self.images

    def summary(self) -> dict[str, Any]:
        """Plain numbers for results.json and metrics.jsonl."""
        return {
            "top1": self.top1,
            "top1_ci": list(wilson_interval(self.top1_correct, self.images)),
            "top5": self.top5_correct / self.images,
            "top5_ci": list(wilson_interval(self.top5_correct, self.images)),
            "loss": self.loss_sum / self.images,
            "images": self.images,
        }


Output = tuple[Tensor, Mapping[int, RoutingStats]]
"""Logits [B, V] and the routing statistics by block (empty for dense models)."""


class ValidationBatches(Protocol):
    """One rank's share of the validation images, once: `EvalLoader`, or one that gets them from elsewhere."""

    index: ShardIndex

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[ImageBatch]: ...
    def no_images(self) -> Tensor: ...


class EvaluationAbandoned(Exception):  # noqa: N818  # no error: some rank was asked to stop
    """The evaluation was left half-way, by all ranks."""


@torch.no_grad()
def evaluate(
    prepare: Callable[[Tensor], Any],
    models: Mapping[str, Callable[[Any], Output]],
    loader: ValidationBatches,
    world: World,
    *,
    num_images: int,
    dtype: torch.dtype,
    what: str = "evaluate",
    in_step: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Score]:
    """Score all `models` in one pass over the data.

    `prepare(images)` runs once a batch (for example the meta prefix chain); each model gets its result. `in_step`: every rank
    makes as many forward passes as the one with the most batches. `stop`: whether this process was asked to stop; it then leaves out its
    other batches, and every rank raises EvaluationAbandoned at the end (not with `in_step`: passes are made together or not at all, and
    the evaluation is finished). Raises RuntimeError unless exactly the samples 0..num_images-1 were
    seen, once each, over all ranks, and all ranks mean the same images and labels by these numbers. A damaged image raises SampleError
    on the rank that meets it, and the end of that process ends the job: nobody catches it, and no collective waits for it in vain.
    """
    scores = {name: Score(0, 0, 0, 0.0, *torch.zeros(2, num_images, dtype=torch.int64)) for name in models}
    seen_N = torch.zeros(num_images, dtype=torch.int64)
    checksum = 0
    # Agreed on before the first pass: behind the loop, this collective would meet the passes of ranks that are still in it.
    missing = max(gather_object(len(loader), "number of batches")) - len(loader) if in_step else 0
    left = False
    for number, batch in enumerate(progress(loader, total=len(loader), what=what, enabled=world.rank == 0)):
        with section("forward", may_wait=in_step):
            prepared = prepare(batch.images_BCHW.to(world.device, dtype))
            labels_B = batch.labels_B.to(world.device)
            for name, forward in models.items():
                _add_batch(scores[name], *forward(prepared), labels_B, batch.slot_ids_B)
        seen_N[batch.slot_ids_B] += 1
        checksum += _checksum(loader.index, batch.slot_ids_B.numpy(), batch.labels_B.numpy())
        if left := not in_step and number + 1 < len(loader) and stop():
            break
    for _ in range(missing):
        prepared = prepare(loader.no_images().to(world.device, dtype))
        for forward in models.values():
            forward(prepared)
    if int(all_reduce_sum(torch.tensor(int(left), device=world.device), "agree to leave the evaluation")):
        raise EvaluationAbandoned
    seen_N = _total(seen_N, world)
    if not bool((seen_N == 1).all()):
        wrong = (seen_N != 1).nonzero().flatten()[:5].tolist()
        raise RuntimeError(f"evaluation saw {int(seen_N.sum())} images of {num_images}; samples not seen exactly once: {wrong} ...")
    _same_images(checksum % 2**64, loader.index)
    return {name: _reduce(score, world) for name, score in scores.items()}


def _checksum(index: ShardIndex, ids_B: np.ndarray, labels_B: np.ndarray) -> int:
    """Sum modulo 2^64 of a hash of (sample number, crc32 of the image's bytes, label): the same in any order, over any number of ranks."""
    words_B = index.table["crc32"][ids_B].astype(np.uint64) << np.uint64(32) | labels_B.astype(np.uint64)
    # A step of splitmix64 (Vigna) for each word: neighbouring numbers give unrelated hashes.
    return int(np.add.reduce(_mixed(_mixed(ids_B.astype(np.uint64)) ^ words_B), dtype=np.uint64))


def _mixed(words_B: np.ndarray) -> np.ndarray:
    words_B = words_B + np.uint64(0x9E3779B97F4A7C15)
    words_B = (words_B ^ (words_B >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words_B = (words_B ^ (words_B >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words_B ^ (words_B >> np.uint64(31))


def _same_images(checksum: int, index: ShardIndex) -> None:
    """What all ranks have seen, against what the index of each of them says. `ShardIndex.read` has checked the bytes by their crc32."""
    expected = _checksum(index, np.arange(index.num_samples), index.labels_N)
    parts = gather_object((checksum, expected), "checksum of images")
    total = sum(part for part, _ in parts) % 2**64
    wrong = [rank for rank, (_, theirs) in enumerate(parts) if theirs != total]
    if wrong:
        raise RuntimeError(
            f"evaluation saw every sample once, but other images or labels than the index says (checksum {total:016x}; the index of rank "
            f"{wrong[0]} gives {parts[wrong[0]][1]:016x}); do all ranks read the same copy of {index.folder}?"
        )


def _add_batch(score: Score, logits_BV: Tensor, stats: Mapping[int, RoutingStats], labels_B: Tensor, ids_B: Tensor) -> None:
    logits_BV = logits_BV.float()
    top5_B5 = logits_BV.topk(min(5, logits_BV.shape[1]), dim=1).indices
    hit_B5 = top5_B5 == labels_B[:, None]
    score.images += labels_B.numel()
    score.top1_correct += int(hit_B5[:, 0].sum())
    score.top5_correct += int(hit_B5.any(dim=1).sum())
    score.loss_sum += float(F.cross_entropy(logits_BV, labels_B, reduction="sum"))
    score.predictions_N[ids_B] = top5_B5[:, 0].cpu()
    score.hits_N[ids_B] = hit_B5[:, 0].long().cpu()
    for block, layer in stats.items():
        score.expert_load[block] = score.expert_load.get(block, 0) + layer.load_E.cpu()
        score.entropy_sum[block] = score.entropy_sum.get(block, 0.0) + float(layer.entropy) * labels_B.numel()
        score.drop_sum[block] = score.drop_sum.get(block, 0.0) + float(layer.drop_rate) * labels_B.numel()


def _total(tensor: Tensor, world: World) -> Tensor:
    """Sum over ranks, by way of the rank's device (NCCL knows no CPU tensors)."""
    return all_reduce_sum(tensor.to(world.device), "sum of scores").cpu()


def _reduce(score: Score, world: World) -> Score:
    """Add up the ranks' shares."""
    images, top1, top5 = _total(torch.tensor([score.images, score.top1_correct, score.top5_correct]), world).tolist()
    loss = float(_total(torch.tensor(score.loss_sum, dtype=torch.float64), world))
    # A rank without a batch has no statistics: the layers' names and sizes are agreed on first.
    layers = {block: num for rank in gather_object({b: t.numel() for b, t in score.expert_load.items()}) for block, num in rank.items()}
    load, entropy, drops = {}, {}, {}
    for block, num_experts in sorted(layers.items()):
        load[block] = _total(score.expert_load.get(block, torch.zeros(num_experts, dtype=torch.int64)), world)
        sums = torch.tensor([score.entropy_sum.get(block, 0.0), score.drop_sum.get(block, 0.0)], dtype=torch.float64)
        entropy[block], drops[block] = _total(sums, world).tolist()
    predictions_N, hits_N = _total(score.predictions_N, world), _total(score.hits_N, world)
    return Score(images, top1, top5, loss, predictions_N, hits_N, load, entropy, drops)
