"""The default feed: decode, prefix chain and teacher modules in the trainer's own process, each once a batch for all pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.data.shard_files import IoCounts, LocalFiles
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch


class ColocatedFeed:
    """Answers requests from a loader and frozen modules held here.

    For whole-model phases (no pairs to teach) give pair 0 only: its "hidden state" is the image, and no meta stage runs.
    """

    def __init__(
        self,
        loader: TrainLoader,
        pairs: tuple[TeachingPair, ...],
        meta: FrozenMeta,
        teacher_modules: Mapping[int, nn.Module],
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._loader = loader
        self._batches: Iterator[ImageBatch] = iter(loader)
        self._pairs = {pair.index: pair for pair in pairs}
        self._meta = meta
        self._teachers = {i: freeze(module) for i, module in teacher_modules.items()}
        self._device, self._dtype = device, dtype
        self._told = IoCounts()

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The next batch of the stream; raises RuntimeError when it is not the one that the trainer's plan names."""
        images = next(self._batches)
        got = images.slot_ids_B
        if list(got.tolist()) != list(request.slots):
            raise RuntimeError(
                f"step {request.step}, micro-step {request.micro_step}: the trainer expects slots {request.slots}, "
                f"the loader gave {got[:4].tolist()}...; trainer and loader were started at different positions"
            )
        pairs = [self._pairs[i] for i in request.pairs]
        pixels_BCHW = images.images_BCHW.to(self._device, self._dtype, non_blocking=True)
        hidden = self._meta.hidden_states(pixels_BCHW, pairs)
        logits = {}
        if request.with_teacher:
            logits = {p.index: teacher_logits(self._meta, p, self._teachers[p.index], hidden[p.index]) for p in pairs}
        return TeacherBatch(
            hidden=hidden,
            teacher_logits=logits,
            targets_BV=images.targets_BV.to(self._device, non_blocking=True),
            slot_ids_B=images.slot_ids_B,
            bad=images.bad,
            lost="" if images.lost is None else str(images.lost),
            wait_s=images.wait_s,
            fallbacks=images.fallbacks,
        )

    def metrics(self) -> dict[str, float]:
        """Where shards lie elsewhere: reads that found them in the cache, shards fetched, and bytes that came."""
        if isinstance(self._loader.index.files, LocalFiles):
            return {}
        counts = self._loader.io_counts()
        new, self._told = counts.plus(self._told, -1), counts
        return {"data/cache_hits": float(new.hits), "data/cache_misses": float(new.misses), "data/cache_bytes": float(new.bytes_fetched)}

    def close(self) -> None:
        """Stop the loader's workers."""
        self._loader.close()
