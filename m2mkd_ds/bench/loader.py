"""`m2mkd bench loader`: every reader that was asked for over the same shards, in one process and in turn. Returns text, writes files.

options -> shards of photos -> rounds (each reader once, order shuffled) -> resuming in a large index -> rows -> table, JSON, plot
"""

from __future__ import annotations

import random
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.bench.environment import describe
from m2mkd_ds.bench.loader_measure import Pass, measure_pass
from m2mkd_ds.bench.loader_options import LoaderBench, Reader
from m2mkd_ds.bench.loader_output import SCHEMA, render, write_files
from m2mkd_ds.bench.loader_photos import photo_jpegs, photo_shards
from m2mkd_ds.bench.loader_readers import NOTES, ONE_PROCESS, OURS, Source, data_config, opener
from m2mkd_ds.bench.loader_resume import resume_seconds, synthetic_index
from m2mkd_ds.bench.loader_rows import PEERS, LoaderRow, Range, make_row, verdicts
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.remote.addresses import is_remote, redact
from m2mkd_ds.logs import Progress

PACKAGES = ("torch", "torchvision", "timm", "webdataset", "simplejpeg", "pillow", "numpy")


def run_loader(options: LoaderBench) -> str:
    """Measure, write what `--out` asks for, and return the tables. Raises ValueError for shards that cannot be measured."""
    options.check()
    command, options = options.command(), options.resolved()
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="m2mkd-bench-") as folder:
        bench = _Bench(options, Path(folder))
        rows = bench.run()
        shards = bench.describe_shards()
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "device": "cpu",
        "shards": shards,
        "environment": describe(torch.device("cpu"), PACKAGES),
        "wall_s": round(time.perf_counter() - started, 1),
        "rows": [row.to_json() for row in rows],
        "verdicts": [asdict(verdict) for verdict in verdicts(rows)],
    }
    text = render(result, rows)
    if options.out is not None:
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, rows, options.out))
    return text


@dataclass(frozen=True)
class _Case:
    """What one row measures."""

    recipe: str
    reader: Reader
    workers: int


class _Bench:
    """One run in a temporary folder."""

    def __init__(self, options: LoaderBench, folder: Path) -> None:
        self.options, self.folder = options, folder
        if options.shards is None:
            index = photo_shards(folder / "photos", options.images, options.seed)
        else:
            index = ShardIndex.load(options.shards)
        self.source = Source(index, options.batch, _whole_batches(index, options.batch), options.seed)

    def run(self) -> list[LoaderRow]:
        o = self.options
        cases = self._cases()
        absent = {case: reason for case in cases if (reason := self._absent(case))}
        todo = [case for case in cases if case not in absent]
        resumed = [case for case in todo if o.resume_images and case.reader in OURS and case.recipe == "crop"]
        passes: dict[_Case, list[Pass]] = defaultdict(list)
        resumes: dict[_Case, list[float]] = defaultdict(list)
        shuffler = random.Random(o.seed)
        with Progress(o.repeats * (len(todo) + len(resumed)), "bench loader") as bar:
            if resumed:
                jpegs = photo_jpegs(o.batch, o.seed)
                synthetic_index(
                    self.folder / "synthetic", jpegs, num_images=o.resume_images, num_shards=o.resume_shards, seed=o.seed
                )  # fmt: skip
            for _ in range(o.repeats):
                for case in shuffler.sample(todo, len(todo)):
                    data = data_config(o, self.source.index, case.recipe, case.reader)
                    passes[case].append(measure_pass(opener(case.reader, self.source, data, case.workers)))
                    bar.advance(note=f"{case.reader} {case.workers}")
                for case in shuffler.sample(resumed, len(resumed)):
                    resumes[case].append(self._resume(case))
                    bar.advance(note=f"resume {case.reader} {case.workers}")
        return [self._row(case, absent.get(case, ""), passes, resumes) for case in cases]

    def _cases(self) -> list[_Case]:
        recipes = ("crop", "randaugment") if self.options.augment else ("crop",)
        readers = [reader for reader in self.options.readers if reader not in ONE_PROCESS]
        # The limits depend neither on workers nor on the recipe.
        limits = [_Case("crop", reader, 0) for reader in self.options.readers if reader in ONE_PROCESS]
        each = [(recipe, workers) for recipe in recipes for workers in sorted(self.options.workers)]
        return limits + [_Case(recipe, reader, workers) for recipe, workers in each for reader in readers]

    def _absent(self, case: _Case) -> str:
        num_shards = len(self.source.index.shards)
        if case.reader in PEERS and case.workers > num_shards:
            return f"{num_shards} shards cannot be dealt to {case.workers} workers: it deals whole shards"
        return ""

    def _resume(self, case: _Case) -> float:
        o = self.options
        data = data_config(o, self.source.index, case.recipe, case.reader)
        return resume_seconds(self.folder / "synthetic", data, batch=o.batch, workers=case.workers, seed=o.seed)

    def _row(self, case: _Case, reason: str, passes: dict[_Case, list[Pass]], resumes: dict[_Case, list[float]]) -> LoaderRow:
        if reason:
            return LoaderRow(case.recipe, case.reader, case.workers, available=False, reason=reason)
        limits = [one.images / one.cpu_s for one in passes.get(_Case("crop", "decode_limit", 0), [])]
        limit = Range.of(limits).median if limits else None
        return make_row(case.recipe, case.reader, case.workers, NOTES[case.reader], passes[case], resumes.get(case, []), limit)

    def describe_shards(self) -> dict[str, Any]:
        """What was read, for the result."""
        index, sizes = self.source.index, self.source.index.table["size"]
        return {
            "num_images": index.num_samples,
            "num_shards": len(index.shards),
            "image_bytes": {"median": int(sorted(sizes)[len(sizes) // 2]), "min": int(sizes.min()), "max": int(sizes.max())},
            "source": index.source,
            "fingerprint": index.fingerprint,
        }


def _whole_batches(index: ShardIndex, batch: int) -> int:
    """Images that make whole batches. Raises ValueError for shards that the peers cannot open, and for too few images."""
    if is_remote(index.base) or index.shard_folder.resolve() != index.folder.resolve():
        raise ValueError(f"--shards is {index.folder}, whose shards lie at {redact(index.base)}; copy them to this machine first")
    if index.num_samples < batch:
        raise ValueError(f"--shards has {index.num_samples} images, and --batch is {batch}; give a smaller batch")
    return index.num_samples // batch * batch
