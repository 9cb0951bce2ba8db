"""What DeepSpeed's ZeRO engines hold, moment by moment, while gradients arrive and weights are updated (DeepSpeed 0.19.8, this trainer's
settings: contiguous gradients, reduce-scatter by all-reduce of whole buckets).

    fp32, stage 1      gradients stay where autograd leaves them; after the last one they move through the bucket into the rank's own buffer
    fp32 and bf16, 2   each gradient moves into the bucket as it arrives; a full bucket is reduced, and the rank keeps its own
    bf16, stage 1      another optimizer: whole fp32 gradients are always there, and the bf16 ones until the update is over
    stage 3            weights are cut too, and gathered for their use

Every engine follows the same four calls: hold (once), backward (a micro-batch), reduce (once a step), update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from m2mkd_ds.planner.ledger import Ledger
from m2mkd_ds.planner.partition import Partition
from m2mkd_ds.planner.step_trace import StepTrace

FP32 = 4
ALL_REDUCE_BYTES = 500_000_000 * FP32
"""Most that DeepSpeed's bf16 optimizer reduces at once."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """What an engine's memory follows from, besides the module."""

    stage: int
    precision: str
    """fp32 or bf16."""
    bucket: int
    """reduce_bucket_size, in elements."""
    overlap: bool
    """overlap_comm: two buckets."""
    zero: dict[str, Any]
    """The block zero_optimization of the engine's file."""
    is_gpu: bool
    """On a GPU AdamW is one fused kernel and collectives write in place; on a CPU both make copies."""

    @property
    def element(self) -> int:
        """Bytes of a weight in the forward pass."""
        return 2 if self.precision == "bf16" else FP32


class Engine:
    """ZeRO-1 in fp32; the others change what differs."""

    def __init__(self, settings: EngineSettings, part: Partition, ledger: Ledger, name: str) -> None:
        self.settings, self.part, self.ledger, self.name = settings, part, ledger, name
        self.own_grads = 0
        """Gradients that are kept for the update, in the ledger."""
        self.raw_grads = 0
        """Gradients where autograd put them, in the ledger."""
        self.buckets = 0
        """Bytes of the buckets, in the ledger."""

    def hold(self) -> None:
        """What is there for the whole phase."""
        self.ledger.add("weights", self.settings.element * self.part.padded)
        self.ledger.add("masters", FP32 * self.part.part)
        self.ledger.add("moments", 2 * FP32 * self.part.part)

    def backward(self, trace: StepTrace, *, is_first: bool, is_last: bool) -> None:
        """Forward and backward pass of the first, the last, or (with accumulation) another micro-batch of a step."""
        ledger = self.ledger
        ledger.mark(f"{self.name}: forward", activations=trace.forward_peak)
        for number, arrival in enumerate(trace.arrivals):
            ledger.mark(f"{self.name}: backward", activations=arrival.peak - arrival.grad_bytes, gradients=arrival.grad_bytes)
            if not number:
                self._open_buckets()
            if is_first:  # later ones are added to the first
                self._keep_raw(arrival.grad_bytes)
        ledger.mark(f"{self.name}: end of backward", activations=trace.end_peak)
        if is_last:
            self._reduce_all()

    def update(self) -> None:
        """The optimizer step."""
        ledger, scratch = self.ledger, 0 if self.settings.is_gpu else 2
        for number, row in enumerate(self.part.rows):
            size = FP32 * row.part
            last = number + 1 == len(self.part.rows)
            copies = self._copies_own(number)
            ledger.mark(f"{self.name}: gradients of the update", temporary=copies * size)
            if last:
                ledger.add("gradients", -self.own_grads)
                self.own_grads = 0
            ledger.mark(f"{self.name}: AdamW", temporary=(copies + scratch) * size)
        self._gather()

    def _copies_own(self, row: int) -> int:
        """Copies of a row's gradients that the update makes: one flat one."""
        return 1

    def _gather(self) -> None:
        """Updated weights to all ranks: gloo fills a buffer of its own first."""
        if not self.settings.is_gpu:
            sizes = [self.settings.element * row.padded for row in self.part.rows if row.ranks > 1]
            self.ledger.mark(f"{self.name}: gathering weights", temporary=max(sizes, default=0))

    def _open_buckets(self) -> None:
        if not self.buckets:
            self.buckets = self.settings.bucket * self.settings.element * (2 if self.settings.overlap else 1)
            self.ledger.add("buffers", self.buckets)

    def _close_buckets(self) -> None:
        self.ledger.add("buffers", -self.buckets)
        self.buckets = 0

    def _keep_own(self) -> None:
        """The buffer for the rank's own gradients is made at the first bucket that holds one."""
        if not self.own_grads:
            self.own_grads = self.settings.element * sum(self.part.numels[name] for name in self.part.own)
            self.ledger.add("gradients", self.own_grads)

    def _flat_copy(self, names: list[str]) -> int:
        """Bytes of the copy that a bucket's reduction makes: of the dense or of the experts' part, whichever is larger; none where the
        bucket is one piece because nobody else has a part in it."""
        if self.part.ranks == 1:
            return 0
        sizes = [sum(self.part.numels[n] for n in names if (n in self.part.spread) == spread) for spread in (False, True)]
        return max(sizes) * self.settings.element

    def _keep_raw(self, num_bytes: int) -> None:
        self.raw_grads += num_bytes
        self.ledger.add("gradients", num_bytes)

    def _reduce_all(self) -> None:
        """Stage 1: all gradients, row by row, through the bucket."""
        filled: list[str] = []
        for name in [name for row in self.part.rows for name in row.names]:
            numel = self.part.numels[name]
            if filled and self._elements(filled) + numel > self.settings.bucket:
                self._flush(filled)
                filled = []
            filled.append(name)
            if numel <= self.settings.bucket:
                self._keep_raw(-self.settings.element * numel)  # a view of the bucket from now on
        self._flush(filled)
        self._keep_raw(-self.raw_grads)
        self._close_buckets()

    def _elements(self, names: list[str]) -> int:
        return sum(self.part.numels[name] for name in names)

    def _flush(self, names: list[str]) -> None:
        self.ledger.mark(f"{self.name}: reducing gradients", temporary=self._flat_copy(names))
        if any(name in self.part.own for name in names):
            self._keep_own()
            self.ledger.mark(f"{self.name}: reducing gradients")


class Stage2(Engine):
    """ZeRO-2."""

    @property
    def _is_compact(self) -> bool:
        """bf16: the rank's own gradients are one fp32 row."""
        return self.settings.precision == "bf16"

    def backward(self, trace: StepTrace, *, is_first: bool, is_last: bool) -> None:
        """Each gradient goes into the bucket as it arrives."""
        ledger, bucket = self.ledger, self.settings.bucket
        before = 0 if self._is_compact else self.own_grads
        self.own_grads -= before
        ledger.mark(f"{self.name}: forward", activations=trace.forward_peak)
        filled: list[str] = []
        for number, arrival in enumerate(trace.arrivals):
            ledger.mark(f"{self.name}: backward", activations=arrival.peak - arrival.grad_bytes, gradients=arrival.grad_bytes)
            if not number:
                self._open_buckets()
            with ledger.held("activations", arrival.left), ledger.held("gradients", arrival.grad_bytes):
                ledger.mark(f"{self.name}: backward")
                if filled and self._elements(filled) + self.part.numels[arrival.name] > bucket:
                    self._flush(filled)
                    filled = []
            filled.append(arrival.name)
            if self.part.numels[arrival.name] > bucket:
                self._keep_raw(arrival.grad_bytes)  # does not fit, and is reduced where it lies
        with ledger.held("activations", trace.end_peak):
            self._flush(filled)
        self._close_buckets()
        if before:  # the sum of both micro-batches goes into the older buffer
            ledger.add("gradients", -self.own_grads)
            self.own_grads = before

    def _flush(self, names: list[str]) -> None:
        super()._flush(names)
        self._keep_raw(-self.raw_grads)

    def _keep_own(self) -> None:
        if not self._is_compact:
            super()._keep_own()
        elif not self.own_grads:
            self.own_grads = FP32 * self.part.part
            self.ledger.add("gradients", self.own_grads)

    def _flat_copy(self, names: list[str]) -> int:
        copy = super()._flat_copy(names) if not self._is_compact else self._elements(names) * self.settings.element
        return copy + (self._elements(names) * FP32 if self._is_compact else 0)  # reduced in fp32

    def _copies_own(self, row: int) -> int:
        return 0 if self._is_compact else 1


class Bf16Stage1(Engine):
    """DeepSpeed's BF16_Optimizer."""

    def hold(self) -> None:
        """As stage 1, and the gradients."""
        super().hold()
        self.ledger.add("gradients", FP32 * self.part.padded)

    def backward(self, trace: StepTrace, *, is_first: bool, is_last: bool) -> None:
        """The bf16 gradients are turned to fp32 and added behind the backward pass, one by one, and stay until the update is over."""
        self.ledger.mark(f"{self.name}: forward", activations=trace.forward_peak)
        for arrival in trace.arrivals:
            self.ledger.mark(f"{self.name}: backward", activations=arrival.peak - arrival.grad_bytes, gradients=arrival.grad_bytes)
            if is_first:
                self._keep_raw(arrival.grad_bytes)
        largest = max(arrival.grad_bytes for arrival in trace.arrivals)
        self.ledger.mark(f"{self.name}: adding a gradient", temporary=2 * largest)
        self.ledger.mark(f"{self.name}: end of backward", activations=trace.end_peak)
        if is_last:
            for spread in (False, True):
                sizes = [FP32 * row.padded for row in self.part.rows if (row.names[0] in self.part.spread) == spread]
                copy = min(sum(sizes), ALL_REDUCE_BYTES) if len(sizes) > 1 else 0
                self.ledger.mark(f"{self.name}: reducing gradients", temporary=copy)

    def update(self) -> None:
        """As stage 1; the bf16 gradients go at its end."""
        super().update()
        self._keep_raw(-self.raw_grads)

    def _copies_own(self, row: int) -> int:
        return 0


class Stage3(Engine):
    """ZeRO-3. Not followed gradient by gradient: an estimate from the settings, above all of how many gathered weights stay."""

    def hold(self) -> None:
        """Parts of weights and gradients, and the bucket, which is never given back."""
        element, part = self.settings.element, self.part.part
        small = sum(n for n in self.part.numels.values() if n < self.settings.zero.get("stage3_param_persistence_threshold", 100_000))
        self.ledger.add("weights", element * (part + small))
        self.ledger.add("masters", FP32 * part)
        self.ledger.add("moments", 2 * FP32 * part)
        self.ledger.add("gradients", element * part)
        self.ledger.add("buffers", element * self.settings.bucket)

    def backward(self, trace: StepTrace, *, is_first: bool, is_last: bool) -> None:
        """Weights that are used again within stage3_max_reuse_distance stay gathered, up to stage3_max_live_parameters."""
        zero, element = self.settings.zero, self.settings.element
        whole = sum(self.part.numels.values())
        live = min(whole, zero.get("stage3_max_live_parameters", 10**9), zero.get("stage3_max_reuse_distance", 10**9))
        with self.ledger.held("buffers", element * live):
            self.ledger.mark(f"{self.name}: forward", activations=trace.forward_peak)
            for arrival in trace.arrivals:
                self.ledger.mark(f"{self.name}: backward", activations=arrival.peak, temporary=FP32 * min(whole, self.settings.bucket))

    def _gather(self) -> None:
        """Weights are gathered when they are used."""


def make_engine(settings: EngineSettings, part: Partition, ledger: Ledger, name: str) -> Engine:
    """The engine of a stage and precision."""
    if settings.stage == 3:
        return Stage3(settings, part, ledger, name)
    if settings.stage == 2:
        return Stage2(settings, part, ledger, name)
    return (Bf16Stage1 if settings.precision == "bf16" else Engine)(settings, part, ledger, name)
