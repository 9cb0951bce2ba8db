"""Source `icons` (Icons-K): pictures of the K icon names that most icon sets have, to tell apart across the hands that drew them.

Steps: 1. permissively licensed sets of @iconify/json, still drawings only; 2. the K classes; 3. drawn on white; 4. copies and near-copies
across sets removed, because sets borrow from one another; 5. whole sets are held out, so validation asks about drawings by designers
that training has not seen. The licences of the sets are written beside the shards: some of them ask that the author be named.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.order import permutation
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.icon_sets import PACKAGE, Icon, IconSet, choose, find_package, read_sets
from m2mkd_ds.data.sources.near_duplicates import distinct
from m2mkd_ds.data.sources.samples import ImageSource, ImageSplit, ListSamples, Sample, encode_png
from m2mkd_ds.logs import progress

logger = logging.getLogger("m2mkd_ds")

NUM_CLASSES = 100
IMAGE_SIZE = 64
VALIDATION_SHARE = 0.2
SPLIT_ATTEMPTS = 100
LICENCES_NAME = "LICENCES.json"


def icons(options: SourceOptions, seed: int = 0) -> ImageSource:
    """Icons-K from `options.path` or the npm registry. Raises ShardError when resvg_py is missing or no split has all classes twice."""
    assert options.cache is not None, "make_source fills it in"
    draw = _renderer(options.image_size or IMAGE_SIZE)
    sets = list(read_sets(find_package(options.path, options.cache)))
    class_names, chosen = choose(sets, options.num_classes or NUM_CLASSES)
    chosen, images_NHWC = _drawn(chosen, draw)
    kept = distinct(images_NHWC, [icon.prefix for icon in chosen])
    logger.info("icons: %d of %d are left without copies and near-copies", len(kept), len(chosen))
    chosen, images_NHWC = [chosen[i] for i in kept], images_NHWC[kept]
    held_out = hold_out_sets(chosen, len(class_names), options.validation_share or VALIDATION_SHARE, seed)
    samples = [_sample(icon, pixels) for icon, pixels in zip(chosen, images_NHWC, strict=True)]
    content = hashlib.sha256(b"".join(_digest(sample) for sample in samples)).hexdigest()

    def split(is_validation: bool) -> ImageSplit:
        part = [sample for icon, sample in zip(chosen, samples, strict=True) if (icon.prefix in held_out) == is_validation]
        return ImageSplit(ListSamples(part), f"{content} held out {' '.join(sorted(held_out))}")

    used = Counter(icon.prefix for icon in chosen)
    licences = sorted({icon_set.licence for icon_set in sets if icon_set.prefix in used})
    documents = {LICENCES_NAME: _licences(sets, used, held_out)}
    licence = f"by icon set, see {LICENCES_NAME}: {', '.join(licences)}"
    return ImageSource(f"icons-{len(class_names)}", licence, class_names, split(False), split(True), documents)


def hold_out_sets(chosen: Sequence[Icon], num_classes: int, share: float, seed: int) -> frozenset[str]:
    """Prefixes of round(share * sets) sets, at least one, such that both parts have every class: the seed's first such choice.

    Raises ShardError when there is none among a hundred.
    """
    prefixes = sorted({icon.prefix for icon in chosen})
    count = max(1, round(share * len(prefixes)))
    for attempt in range(SPLIT_ATTEMPTS):
        held_out = frozenset(prefixes[i] for i in permutation(seed, attempt, len(prefixes))[:count])
        parts = {(icon.label, icon.prefix in held_out) for icon in chosen}
        if len(parts) == 2 * num_classes:
            return held_out
    raise ShardError(
        f"icons: no {count} of {len(prefixes)} icon sets were found that leave all {num_classes} classes in both parts; "
        "ask for fewer classes (--num-classes) or another --validation-share"
    )


def _renderer(size: int) -> Callable[[str], np.ndarray]:
    """SVG document -> uint8 RGB [size, size, 3] on white."""
    if not 8 <= size <= 1024:
        raise ShardError(f"image_size is {size}; icons can be drawn with 8 to 1024 pixels a side")
    try:
        import resvg_py
    except ImportError as err:
        raise ShardError(f"source icons needs the package resvg_py ({err}); install it with `pip install 'm2mkd_ds[icons]'`") from err

    def draw(svg: str) -> np.ndarray:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, background="white", skip_system_fonts=True)
        return np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGB"))

    return draw


def _drawn(chosen: Sequence[Icon], draw: Callable[[str], np.ndarray]) -> tuple[list[Icon], np.ndarray]:
    """The icons that can be drawn and show something, and their pictures uint8 [N, H, W, 3]. Others are counted and named in the log."""
    kept, images, failed, blank = [], [], [], []
    for icon in progress(chosen, total=len(chosen), what="drawing icons"):
        try:
            pixels_HWC = draw(icon.svg)
        except ValueError:
            failed.append(f"{icon.prefix}:{icon.name}")
            continue
        if (pixels_HWC == pixels_HWC[0, 0]).all():
            blank.append(f"{icon.prefix}:{icon.name}")
            continue
        kept.append(icon)
        images.append(pixels_HWC)
    for names, what in ((failed, "cannot be drawn"), (blank, "show nothing")):
        if names:
            logger.warning("icons: %d %s and are left out: %s", len(names), what, ", ".join(names[:20]))
    if not kept:
        raise ShardError(f"icons: none of {len(chosen)} icons can be drawn; fetch {PACKAGE} again")
    return kept, np.stack(images)


def _sample(icon: Icon, pixels_HWC: np.ndarray) -> Sample:
    key = f"{icon.prefix}/{icon.name}"[:90]
    return Sample(encode_png(pixels_HWC), "png", icon.label, key, {"icon_set": icon.prefix, "icon": icon.name})


def _digest(sample: Sample) -> bytes:
    return hashlib.sha256(f"{sample.key} {sample.label} ".encode() + sample.image).digest()


def _licences(sets: Sequence[IconSet], used: Counter[str], held_out: frozenset[str]) -> str:
    """Who drew what under which licence."""
    rows = [
        {
            "set": icon_set.prefix, "name": icon_set.name, "author": icon_set.author, "licence": icon_set.licence,
            "licence_url": icon_set.licence_url, "icons": used[icon_set.prefix],
            "part": "validation" if icon_set.prefix in held_out else "train",
        }
        for icon_set in sets
        if icon_set.prefix in used
    ]  # fmt: skip
    note = f"Small pictures drawn from the SVG files of {PACKAGE}. The CC-BY licences ask that the authors be named."
    return json.dumps({"note": note, "sets": rows}, indent=1, ensure_ascii=False) + "\n"
