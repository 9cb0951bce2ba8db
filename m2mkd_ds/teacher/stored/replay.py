"""feed=replay: teacher logits from the files of `m2mkd teacher-export`, everything else from the trainer's own shards and prefix.

    slots -> rows of the stored positions        base feed (loader and prefix, no teacher modules) -> images, hidden states, targets

With fp32 files made in the trainer's own micro-batches, training is bit for bit that of the colocated feed.
Shape letters: B images, V classes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.config import AugmentConfig
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.teacher.protocol.handshake import DECODING
from m2mkd_ds.teacher.stored.export import positions_of_steps
from m2mkd_ds.teacher.stored.logit_files import DTYPES, StoreError, check_prints, check_sums, covering, read_manifest, read_rows


class LogitsStore:
    """A finished folder of logits; it has the teacher's logits for the slots of a plan. Safe to call from several threads.

    Raises StoreError when the folder is unfinished or damaged, or (naming the field and both values) when it was not made with what
    `expected_prints` says. Bytes are compared with their checksums when a part is first needed, the next part in the background.
    """

    def __init__(self, folder: Path, expected_prints: Mapping[str, str]) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.contents, self._parts = self.manifest.contents, self.manifest.parts
        check_prints(_of_images_and_weights(expected_prints, self.contents.fingerprints, folder), self.contents.fingerprints, str(folder))
        self._sums: dict[int, Future[None]] = {}
        self._lock = threading.Lock()
        self._checker = ThreadPoolExecutor(1, thread_name_prefix="checksums")

    def check_run(self, layout: BatchLayout, augment: AugmentConfig, pairs: Sequence[int], total_steps: int, start_step: int = 0) -> None:
        """Refuse, before anything is trained, a run from `start_step` to `total_steps` that these logits do not fit or do not suffice for.

        Raises StoreError.
        """
        self.check_pairs(pairs)
        note = self.check_layout(layout, augment)
        positions = positions_of_steps(layout, range(start_step, total_steps))
        self.check_covers(positions.stop, first=positions.start, global_batch=layout.global_batch)
        if note:
            logger.info("%s", note)

    def check_pairs(self, pairs: Sequence[int]) -> None:
        """Raises StoreError for pairs that were not exported."""
        missing = sorted(set(pairs) - set(self.contents.pairs))
        if missing:
            raise StoreError(
                f"{self.folder}: pairs {missing} are trained and the folder holds pairs {list(self.contents.pairs)}; train "
                "those (--pair), or export all pairs into another folder"
            )

    def check_covers(self, total_positions: int, *, first: int = 0, global_batch: int = 1) -> None:
        """Raises StoreError unless all stream positions from `first` to before `total_positions` are stored."""
        stored = self.manifest.positions
        if first < stored.start or total_positions > stored.stop:
            steps = -(-(total_positions - stored.start) // global_batch)
            have = max(stored.stop - stored.start, 0) // global_batch
            raise StoreError(
                f"{self.folder} holds logits of stream positions {stored.start} to {stored.stop - 1} ({have} steps of {global_batch}), and "
                f"the phase trains on {first} to {total_positions - 1}: run `m2mkd teacher-export` for {steps} steps, into the same folder "
                "(it goes on where it ended), or train for fewer"
            )

    def check_layout(self, layout: BatchLayout, augment: AugmentConfig) -> str:
        """Raises StoreError where another layout means other images; gives a sentence where it means other rounding, else nothing."""
        ours, stored = layout, self.contents.layout
        same_steps = (ours.global_batch, ours.origin) == (stored.global_batch, stored.origin)
        why = ""
        if augment.repeats_as_deit and ours != stored:
            why = "data.augment.repeat_mode=deit gives every layout an order of its own"
        elif augment.mixes and not same_steps:
            why = "mixup and cutmix draw by optimizer step, so the global batch and its first position must be the same"
        elif augment.mixes and augment.mix_group == 0 and ours.micro_batch_size != stored.micro_batch_size:
            why = "data.augment.mix_group=0 mixes within a micro-batch"
        if why:
            raise StoreError(
                f"{self.folder}: layout: this run has {_told(ours)}, the logits were made for {_told(stored)}, and images depend on it "
                f"({why}); train with the same, or export for this one"
            )
        if ours.micro_batch_size == stored.micro_batch_size:
            return ""
        return (
            f"{self.folder}: the logits were made in micro-batches of {stored.micro_batch_size} and are used in micro-batches of "
            f"{ours.micro_batch_size}: the same images, equal to a colocated teacher's up to rounding, not bit for bit"
        )

    def logits(self, request: BatchRequest) -> dict[int, Tensor]:
        """Logits [B, V] by pair in the stored dtype. Raises StoreError for positions that are not stored and for damaged files."""
        return {pair: self.rows(pair, request.slots) for pair in request.pairs}

    def rows(self, pair: int, positions: range) -> Tensor:
        """Logits [B, V] of consecutive positions."""
        self.check_pairs((pair,))
        self.check_covers(positions.stop, first=positions.start)
        found = []
        for number, inside in covering(self._parts, positions):
            self._verified(number)
            found.append(read_rows(self.folder, self.contents, self._parts[number], pair, inside))
        return found[0] if len(found) == 1 else torch.cat(found)

    def replaced(self, positions: range) -> dict[int, int]:
        """Position -> sample that stood in for a damaged one when the logits were made."""
        return {
            one.position: one.substitute
            for number, inside in covering(self._parts, positions)
            for one in self._parts[number].replaced
            if one.position in inside
        }

    def metrics(self) -> dict[str, float]:
        """None of its own."""
        return {}

    def close(self) -> None:
        """End the thread; a file that it reads is read to its end."""
        self._checker.shutdown(cancel_futures=True)

    def _verified(self, number: int) -> None:
        """Wait until a part's checksums were compared, and begin with the next part's. Raises StoreError naming a damaged file."""
        with self._lock:
            for n in (number, number + 1):
                if n < len(self._parts) and n not in self._sums:
                    self._sums[n] = self._checker.submit(check_sums, self.folder, self.contents, self._parts[n])
        self._sums[number].result()


class ReplayFeed:
    """A TeacherFeed: `base` decodes and runs the prefix and is never asked for a teacher; logits are read from `store`.

    What goes wrong in the middle of training (a damaged file, an image that was readable for one side only) comes as `TeacherBatch.lost`,
    which stops all ranks at the same step with the reason.
    """

    def __init__(self, base: TeacherFeed, store: LogitsStore, *, device: torch.device, dtype: torch.dtype) -> None:
        self._base, self._store = base, store
        self._device, self._dtype = device, dtype

    def batch(self, request: BatchRequest) -> TeacherBatch:
        """The batch of `base` with the stored logits."""
        batch = self._base.batch(replace(request, with_teacher=False))
        if not request.with_teacher:
            return batch
        began = time.monotonic()
        try:
            logits = self._store.logits(request)
            problem = "" if batch.lost else self._other_images(batch, request.slots)
        except StoreError as err:
            zeros_BV = torch.zeros(len(request.slots), self._store.contents.classes, dtype=DTYPES[self._store.contents.dtype][0])
            logits, problem = dict.fromkeys(request.pairs, zeros_BV), str(err)
        fed = _with_logits(batch, logits, began, device=self._device, dtype=self._dtype)
        return replace(fed, lost=fed.lost or problem)

    def metrics(self) -> dict[str, float]:
        """Those of the base."""
        return self._base.metrics()

    def close(self) -> None:
        """Close both."""
        self._store.close()
        self._base.close()

    def _other_images(self, batch: TeacherBatch, slots: range) -> str:
        """Why the logits are not those of these images: a damaged image had another substitute at the time of the export."""
        ours, theirs = {bad.position: bad.substitute for bad in batch.bad}, self._store.replaced(slots)
        for position in sorted(ours.keys() | theirs.keys()):
            if ours.get(position) != theirs.get(position):
                return (
                    f"{self._store.folder}: stream position {position}: the image was {_stood_in(theirs.get(position))} when the logits "
                    f"were made, and is {_stood_in(ours.get(position))} now; repair the shards and export again"
                )
        return ""


def _of_images_and_weights(expected: Mapping[str, str], stored: Mapping[str, str], folder: Path) -> dict[str, str]:
    """What must be equal: all but versions of packages that make no pixels; those are logged where they differ."""
    free = [name for name in expected if name.startswith("version.") and name not in DECODING]
    for name in free:
        if stored.get(name) != expected[name]:
            logger.warning("%s: %s: this run has %s, the logits were made with %s", folder, name, expected[name], stored.get(name))
    return {name: value for name, value in expected.items() if name not in free}


def _told(layout: BatchLayout) -> str:
    text = f"{layout.micro_batch_size} images x {layout.accumulation} micro-steps x {layout.world} ranks"
    return text + (f" from position {layout.origin}" if layout.origin else "")


def _stood_in(substitute: int | None) -> str:
    return "readable" if substitute is None else f"damaged and replaced by sample {substitute}"


def _with_logits(batch: TeacherBatch, logits: dict[int, Tensor], began: float, *, device: torch.device, dtype: torch.dtype) -> TeacherBatch:
    """`batch` with logits by pair on `device`; the time since `began` (monotonic) counts as waited for."""
    moved = {i: logits_BV.to(device, dtype, non_blocking=True) for i, logits_BV in logits.items()}
    return replace(batch, teacher_logits=moved, wait_s=batch.wait_s + time.monotonic() - began)
