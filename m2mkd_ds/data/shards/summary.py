"""What a folder of shards holds, in numbers: `m2mkd shards info`."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image

from m2mkd_ds.data.decode import UNDECODABLE
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.order import permutation
from m2mkd_ds.data.remote.addresses import redact

SIZES_SAMPLED = 256
"""Images whose headers are opened to learn their sizes."""


@dataclass(frozen=True)
class ShardSummary:
    """Numbers of one index."""

    folder: str
    num_samples: int
    num_classes: int
    num_shards: int
    num_bytes: int
    samples_by_class: dict[str, int]
    """By class name; a name that several classes share has its number added."""
    samples_by_extension: dict[str, int]
    shard_samples: tuple[int, int]
    """Smallest and largest number of samples a shard."""
    width: tuple[int, int, int]
    """Smallest, median and largest of the sampled images, in pixels."""
    height: tuple[int, int, int]
    modes: dict[str, int]
    """Pillow's colour modes of the sampled images."""
    num_sized: int
    num_unreadable: int
    """Sampled images that could not be opened."""
    bytes_median: int
    """Of an image file."""
    source: str
    license: str
    fingerprint: str
    base: str


def summarize(index: ShardIndex, *, seed: int = 0, num_sized: int = SIZES_SAMPLED) -> ShardSummary:
    """Count the index and open the headers of up to `num_sized` images, chosen by `seed`."""
    counts = np.bincount(index.labels_N, minlength=index.num_classes).tolist()
    repeated = {name for name, times in Counter(index.class_names).items() if times > 1}
    names = [f"{name} ({number})" if name in repeated else name for number, name in enumerate(index.class_names)]
    widths, heights, modes, unreadable = _sizes(index, permutation(seed, 0, index.num_samples)[:num_sized].tolist())
    extensions = Counter(extension.decode() for extension in index.table["extension"].tolist())
    return ShardSummary(
        folder=str(index.folder),
        num_samples=index.num_samples,
        num_classes=index.num_classes,
        num_shards=len(index.shards),
        num_bytes=sum(shard.bytes for shard in index.shards),
        samples_by_class=dict(zip(names, counts, strict=True)),
        samples_by_extension=dict(sorted(extensions.items())),
        shard_samples=(min(index.shard_sizes, default=0), max(index.shard_sizes, default=0)),
        width=_spread(widths),
        height=_spread(heights),
        modes=dict(sorted(modes.items())),
        num_sized=len(widths),
        num_unreadable=unreadable,
        bytes_median=int(np.median(index.table["size"])) if index.num_samples else 0,
        source=index.source,
        license=index.license,
        fingerprint=index.fingerprint,
        base="" if index.base == str(index.folder) else redact(index.base),
    )


def _sizes(index: ShardIndex, samples: list[int]) -> tuple[list[int], list[int], Counter[str], int]:
    widths, heights, modes, unreadable = [], [], Counter[str](), 0
    for sample in samples:
        try:
            image = Image.open(io.BytesIO(index.read(sample)[0]))
        except UNDECODABLE:
            unreadable += 1
            continue
        widths.append(image.width)
        heights.append(image.height)
        modes[image.mode] += 1
    return widths, heights, modes, unreadable


def _spread(numbers: list[int]) -> tuple[int, int, int]:
    return (min(numbers), int(np.median(numbers)), max(numbers)) if numbers else (0, 0, 0)


def summary_text(summary: ShardSummary, *, all_classes: bool = False) -> str:
    """The summary for people; `all_classes` adds a line a class."""
    by_class = summary.samples_by_class
    counts = sorted(by_class.values())
    spread = _spread(counts)
    empty = sum(count == 0 for count in counts)
    width, height = summary.width, summary.height
    lines = [
        f"{summary.folder}: {summary.num_samples} images, {summary.num_classes} classes, fingerprint {summary.fingerprint[:16]}",
        f"shards       {summary.num_shards}, {summary.num_bytes / 1e6:,.1f} MB, "
        f"{summary.shard_samples[0]} to {summary.shard_samples[1]} images each",
        f"a class      {spread[0]} to {spread[2]} images, median {spread[1]}" + (f"; {empty} classes are empty" if empty else ""),
        f"image files  {', '.join(f'{count} {name}' for name, count in summary.samples_by_extension.items()) or 'none'}; "
        f"median {summary.bytes_median / 1e3:.1f} kB",
        f"pixels       {width[0]}x{height[0]} to {width[2]}x{height[2]}, median {width[1]}x{height[1]}; "
        f"modes {', '.join(f'{mode} {count}' for mode, count in summary.modes.items()) or 'none'} ({summary.num_sized} sampled)",
        f"source       {summary.source}; licence {summary.license}",
    ]
    if summary.num_unreadable:
        lines.append(f"damaged      {summary.num_unreadable} of the sampled images cannot be opened; run `m2mkd shards verify`")
    if summary.base:
        lines.append(f"base         {summary.base}")
    if all_classes:
        width_of_name = max(map(len, by_class), default=0)
        lines += [f"  {name:{width_of_name}}  {count}" for name, count in by_class.items()]
    return "\n".join(lines)


def summary_json(summary: ShardSummary) -> str:
    """The summary for programs: one JSON object."""
    return json.dumps(asdict(summary), indent=1, ensure_ascii=False)
