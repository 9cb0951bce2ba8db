"""`m2mkd teacher-export`: the teacher's logits for a stretch of the stream, computed once and stored for every later run (replay.py).

    for every micro-batch of the layout, in order of position: producer.answer -> check -> append to the open part
    part full: files on disk and renamed, then its record        all parts there: the manifest

What is random in an image is a function of its slot, so the logits fit as long as plan, augmentation and teacher are those of the
export; their fingerprints are stored. A killed export loses at most the part that was open. Shape letters: B images, V classes.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from m2mkd_ds.data.atomic import AtomicFile, only_writer
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.logs import Progress, logger
from m2mkd_ds.teacher.protocol.wire import Answer, GetBatch
from m2mkd_ds.teacher.server.produce import TeacherParts
from m2mkd_ds.teacher.stored.logit_files import (
    AGAIN,
    CONTENTS,
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    PARTS,
    Contents,
    Manifest,
    Part,
    PartFile,
    Replaced,
    StoredDtype,
    StoreError,
    check_prints,
    check_sums,
    npy_bytes,
    npy_header,
    pair_file,
    part_name,
    read_record,
    to_bytes,
    write_record,
)

PART_ROWS = 65_536
"""Stream positions of a part: 131 MB a pair for 1000 classes in 16 bits, which is also the most that a kill can cost."""
IN_FLIGHT = 3
"""Micro-batches asked for at a time: the producer decodes the next ones while one is computed."""


class LogitsProducer(Protocol):
    """A `Producer`, or whatever answers like one."""

    parts: TeacherParts

    def answer(self, request: GetBatch) -> Answer:
        """The micro-batch of the request."""
        ...


def positions_of_steps(layout: BatchLayout, steps: range) -> range:
    """Stream positions of optimizer steps."""
    return range(layout.origin + steps.start * layout.global_batch, layout.origin + steps.stop * layout.global_batch)


def stored_bytes(positions: range, num_pairs: int, classes: int, dtype: StoredDtype) -> int:
    """What an export takes on disk, but for headers and records: 2.56 GB for an epoch of ImageNet, a pair, in 16 bits."""
    return len(positions) * num_pairs * classes * DTYPES[dtype][0].itemsize


def export_logits(
    producer: LogitsProducer,
    out: Path,
    *,
    layout: BatchLayout,
    pairs: tuple[int, ...],
    positions: range,
    dtype: StoredDtype,
    prints: Mapping[str, str],
    part_rows: int = PART_ROWS,
    show_progress: bool = True,
) -> Manifest:
    """Store the logits of `pairs` for `positions`, in the micro-batches that trainers of `layout` would see.

    Goes on in a folder that holds a part of it already, finished or not: its parts are verified and kept, damaged ones made anew. The
    numbers are fp16 (refused for values beyond its range; holds bf16 exactly in its normal range), bf16, or fp32.
    Raises StoreError, before anything is computed, for a folder of another teacher, data or layout (naming the field and both values),
    for positions that are not whole micro-batches, for too small a disk, or when somebody else writes there; later for outputs that are
    not finite and for images that cannot be read.
    """
    contents = Contents(
        version=FORMAT_VERSION, fingerprints=dict(prints), layout=layout, pairs=pairs, dtype=dtype, classes=producer.parts.data.num_classes,
        start=positions.start,
    )  # fmt: skip
    _check_pairs(producer, pairs)
    _check_positions(layout, positions, part_rows)
    (out / PARTS).mkdir(parents=True, exist_ok=True)
    with only_writer(out, StoreError(f"{out}: another export writes into this folder; wait for it, or end it")):
        _claim(out, contents)
        finished = _finished_parts(out, contents)
        work = list(_cut(finished, positions, part_rows // layout.micro_batch_size * layout.micro_batch_size))
        _announce(out, contents, work, finished)
        done = sum(len(piece) for piece in work if piece in finished)
        parts: list[Part] = []
        requests = (_request(layout, start, pairs) for piece in work if piece not in finished for start in _starts(piece, layout))
        with (
            Progress(sum(map(len, work)), "export", enabled=show_progress, start=done) as bar,
            contextlib.closing(_answers(producer, requests)) as answers,
        ):
            for piece in work:
                parts.append(finished[piece] if piece in finished else _write_part(out, contents, piece, answers, bar))
        manifest = Manifest(contents=contents, parts=tuple(parts))
        write_record(out / MANIFEST, manifest)
    logger.info("%s: logits of positions %d to %d are complete", out, manifest.positions.start, manifest.positions.stop - 1)
    return manifest


def _check_pairs(producer: LogitsProducer, pairs: tuple[int, ...]) -> None:
    known = {pair.index for pair in producer.parts.pairs}
    if not pairs or list(pairs) != sorted(set(pairs)) or not set(pairs) <= known:
        raise StoreError(f"pairs {list(pairs)}: give some of {sorted(known)}, each once, in ascending order")


def _check_positions(layout: BatchLayout, positions: range, part_rows: int) -> None:
    size = layout.micro_batch_size
    if part_rows < size:
        raise StoreError(f"part_rows is {part_rows}; a part holds at least one micro-batch of {size}")
    uneven = (positions.start - layout.origin) % size or len(positions) % size
    if not positions or positions.step != 1 or positions.start < layout.origin or uneven:
        raise StoreError(
            f"positions {positions.start} to {positions.stop}: give at least one, in whole micro-batches of {size} from {layout.origin} on"
        )


def _claim(out: Path, contents: Contents) -> None:
    """Write the contents into a new folder; in one that has some, refuse all that differs. Leftovers of killed exports go."""
    if not (out / CONTENTS).exists():
        if any((out / PARTS).iterdir()) or (out / MANIFEST).exists():
            raise StoreError(f"{out}: holds parts but no {CONTENTS}, so whose logits they are is not known; choose an empty folder")
        write_record(out / CONTENTS, contents)
    found = read_record(Contents, out / CONTENTS, "export into another folder")
    check_prints(contents.fingerprints, found.fingerprints, str(out / CONTENTS))
    for name in ("fingerprints", "version", "layout", "pairs", "dtype", "classes", "start"):
        ours, theirs = getattr(contents, name), getattr(found, name)
        if ours != theirs:
            raise StoreError(
                f"{out / CONTENTS}: {name}: this export has {ours}, the folder was begun with {theirs}; give the same, or choose another "
                "folder"
            )
    for leftover in (*out.glob("*.tmp"), *(out / PARTS).glob("*.tmp")):
        leftover.unlink()


def _finished_parts(out: Path, contents: Contents) -> dict[range, Part]:
    """Parts whose record is there and whose bytes are those that it states; others are named in the log and made anew."""
    finished = {}
    for path in sorted((out / PARTS).glob("*.json")):
        try:
            part = read_record(Part, path, AGAIN)
            if path.stem != part.name or [file.pair for file in part.files] != list(contents.pairs):
                raise StoreError(f"{path}: is the record of another part or of other pairs")
            check_sums(out, contents, part)
        except StoreError as err:
            logger.warning("%s: this part is made anew", err)
            path.unlink()
            continue
        finished[range(part.start, part.stop)] = part
    return finished


def _cut(finished: Mapping[range, Part], positions: range, part_rows: int) -> Iterator[range]:
    """Parts in order until all of `positions` are covered, and as far as finished ones go on: those are kept as they are."""
    by_start = {piece.start: piece for piece in finished}
    at = positions.start
    while at < positions.stop or at in by_start:
        # A new part ends where a finished one begins, so that none is written twice.
        next_finished = min((start for start in by_start if start > at), default=positions.stop)
        piece = by_start.get(at) or range(at, min(at + part_rows, positions.stop, next_finished))
        yield piece
        at = piece.stop


def _announce(out: Path, contents: Contents, work: list[range], finished: Mapping[range, Part]) -> None:
    """Say how large it gets, and refuse a disk that is too small for it."""
    missing = [piece for piece in work if piece not in finished]
    needed = sum(len(contents.pairs) * npy_bytes((len(piece), contents.classes), contents.dtype) for piece in missing)
    free = shutil.disk_usage(out).free
    logger.info(
        "%s: %d pairs x %d positions x %d classes in %s: %.3g GB, of which %.3g GB are to be made (%d of %d parts); %.3g GB are free",
        out, len(contents.pairs), sum(map(len, work)), contents.classes, contents.dtype,
        sum(map(len, work)) * len(contents.pairs) * contents.row_bytes() / 1e9, needed / 1e9, len(missing), len(work), free / 1e9,
    )  # fmt: skip
    if needed > free:
        raise StoreError(
            f"{out}: {needed / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free; "
            "free space, or export fewer steps or pairs or in 16 bits"
        )


def _starts(piece: range, layout: BatchLayout) -> Iterable[int]:
    return range(piece.start, piece.stop, layout.micro_batch_size)


def _request(layout: BatchLayout, start: int, pairs: tuple[int, ...]) -> GetBatch:
    return GetBatch(
        instance="export", plan="export", client="export", layout=layout, start=start, pairs=pairs, payload="logits", wire_dtype="fp32",
        with_teacher=True, attempt=0,
    )  # fmt: skip


def _answers(producer: LogitsProducer, requests: Iterator[GetBatch]) -> Generator[Answer, None, None]:
    """Answers in order, a few asked for ahead; what was begun ends before this does."""
    asked: deque[tuple[GetBatch, Future[Answer]]] = deque()
    pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="export")
    try:
        while True:
            for request in islice(requests, IN_FLIGHT - len(asked)):
                asked.append((request, pool.submit(producer.answer, request)))
            if not asked:
                return
            request, future = asked.popleft()
            answer = future.result()
            assert answer.head.answers(request)
            yield answer
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass
class _OpenFile:
    """A pair's file while it is written."""

    pair: int
    file: BinaryIO
    hash: hashlib._Hash
    size: int = 0

    def write(self, data: bytes | memoryview) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)


def _write_part(out: Path, contents: Contents, piece: range, answers: Iterator[Answer], bar: Progress) -> Part:
    """Fill the files of a part, then its record."""
    replaced: list[Replaced] = []
    with contextlib.ExitStack() as stack:
        opened = []
        for pair in contents.pairs:
            file = stack.enter_context(AtomicFile(pair_file(out, part_name(piece), pair)))
            opened.append(_OpenFile(pair, file, hashlib.sha256()))
            opened[-1].write(npy_header((len(piece), contents.classes), contents.dtype))
        for answer in islice(answers, len(piece) // contents.layout.micro_batch_size):
            if answer.head.lost:
                raise StoreError(f"positions from {answer.head.start}: no images can be read ({answer.head.lost})")
            replaced += [Replaced(position=bad.position, substitute=bad.substitute) for bad in answer.head.bad]
            for one in opened:
                one.write(to_bytes(_checked(answer, one.pair, contents)))
            bar.advance(contents.layout.micro_batch_size)
    files = tuple(PartFile(pair=one.pair, bytes=one.size, sha256=one.hash.hexdigest()) for one in opened)
    part = Part(start=piece.start, stop=piece.stop, files=files, replaced=tuple(replaced))
    write_record(out / PARTS / f"{part.name}.json", part)
    return part


def _checked(answer: Answer, pair: int, contents: Contents) -> Tensor:
    """Logits [B, V] in the dtype to be stored. Raises StoreError naming the slots whose numbers are not finite in it."""
    logits_BV = answer.tensors[f"logits.{pair}"]
    assert logits_BV.shape == (contents.layout.micro_batch_size, contents.classes)
    stored_BV = logits_BV.to(DTYPES[contents.dtype][0])
    bad_B = ~torch.isfinite(stored_BV).all(dim=1)
    if bad_B.any():
        slots = [answer.head.start + int(i) for i in bad_B.nonzero()[:8]]
        largest = float(logits_BV.float().abs().nan_to_num(nan=float("inf")).max())
        told = f"the largest is {largest:.3g}, beyond fp16; use dtype bf16 or fp32" if largest < float("inf") else "the teacher is broken"
        raise StoreError(f"pair {pair}, slots {slots}: logits are not finite in {contents.dtype}: {told}")
    return stored_BV
