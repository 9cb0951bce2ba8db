"""What a server decodes from, and the batches of the layouts that its clients use: in its workers, or in the server itself."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.batches import EvalBatches, TrainBatches
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.data_config import check_mixing

MAX_LAYOUTS = 4
"""Layouts that are kept ready; each holds up to two epochs' orders."""


@dataclass(frozen=True)
class Stream:
    """What micro-batches are made from."""

    index: ShardIndex
    data: DataConfig
    seed: int
    slack_s: float = 60.0
    """What a micro-batch may take beyond the time that its shards may take; the start of a process counts, too."""
    evaluation: bool = False
    """Validation images in the batches of an evaluation, instead of augmented ones in those of training."""

    @property
    def timeout_s(self) -> float:
        """How long one micro-batch may take: reads have a deadline of their own, and come first."""
        return 2 * self.data.io_deadline_s + self.slack_s

    def image_bytes(self, count: int) -> int:
        """Bytes of decoded images: uint8 with decode=fast, else fp32."""
        return count * 3 * self.data.image_size**2 * (1 if self.data.decode == "fast" else 4)


class LayoutBatches:
    """Batches of the layouts that were used last. Not thread-safe."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._made: OrderedDict[BatchLayout, TrainBatches | EvalBatches] = OrderedDict()

    def of(self, layout: BatchLayout) -> TrainBatches | EvalBatches:
        """Raises ValueError for a layout that this stream cannot have."""
        batches = self._made.get(layout)
        if batches is None:
            batches = self._made[layout] = self._make(layout)
            if len(self._made) > MAX_LAYOUTS:
                self._made.popitem(last=False)
        self._made.move_to_end(layout)
        return batches

    def _make(self, layout: BatchLayout) -> TrainBatches | EvalBatches:
        stream = self._stream
        if stream.evaluation:
            return EvalBatches(stream.index, stream.data, batch_size=layout.micro_batch_size, rank=0, world=layout.world)
        batches = TrainBatches(stream.index, stream.data, seed=stream.seed, layout=layout, rank=0)
        batches.mixer.check(layout.micro_batch_size)
        check_mixing(stream.data.augment, layout.micro_batch_size, layout.world)
        return batches
