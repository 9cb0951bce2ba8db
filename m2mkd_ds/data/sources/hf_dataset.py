"""Source `hf`: a Hugging Face dataset: a folder written by `save_to_disk`, a folder of parquet files, or a name on the hub.

Encoded images are passed through as they lie in the dataset (JPEG, PNG, WebP; any other format is written as PNG, pixel for pixel).
Needs the package `datasets`, which never runs code of a dataset.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_ds.data.decode import UNDECODABLE
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.samples import ImageSource, ImageSplit, Sample, stratified_split

logger = logging.getLogger("m2mkd_ds")

VALIDATION_SHARE = 0.1
VALIDATION_SPLITS = ("validation", "val", "valid", "test")
"""Tried in this order."""


class HfImages:
    """Rows of a `datasets.Dataset` whose image column is not decoded; keys are SPLIT-<row>."""

    def __init__(self, dataset: Any, image: str, label: str, prefix: str, rows: np.ndarray) -> None:
        self._dataset, self._image, self._label, self._prefix, self._rows = dataset, image, label, prefix, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Sample:
        row = self._dataset[int(self._rows[number])]
        image, extension = _encoded(row[self._image], self.name_of(number))
        return Sample(image, extension, int(row[self._label]), f"{self._prefix}-{self._rows[number]:08d}")

    def name_of(self, number: int) -> str:
        return f"row {self._rows[number]} of split {self._prefix}"

    def subset(self, numbers: np.ndarray) -> HfImages:
        # The dataset is mapped from its files; only their names travel to another process.
        return HfImages(self._dataset, self._image, self._label, self._prefix, self._rows[numbers])


def hf_dataset(options: SourceOptions, seed: int = 0) -> ImageSource:
    """The dataset of `options`. Raises ShardError when `datasets` is missing, and for a dataset without such columns or splits."""
    splits, name = _load(options)
    validation_name = next((split for split in VALIDATION_SPLITS if split in splits), "")
    if "train" not in splits:
        raise ShardError(f"{name}: has splits {', '.join(splits)}; train is needed")
    image = _column(splits["train"], options.hf_image_column, "Image", "hf_image_column", name)
    label = _column(splits["train"], options.hf_label_column, "ClassLabel", "hf_label_column", name)
    class_names = tuple(splits["train"].features[label].names)
    parts = {split: _undecoded(splits[split], image, label, name) for split in filter(None, ("train", validation_name))}
    labels = {split: _labels(dataset, label, len(class_names), f"{name}, split {split}") for split, dataset in parts.items()}
    if validation_name:
        if options.validation_share is not None:
            raise ShardError(f"validation_share is {options.validation_share}, but {name} has a split {validation_name}; leave it out")
        logger.info("%s: validation is its split %s", name, validation_name)
        pairs = [(split, np.arange(len(dataset)), "") for split, dataset in parts.items()]
    else:
        share = options.validation_share or VALIDATION_SHARE
        logger.info("%s: has no validation split, %g of each class is held out", name, share)
        pairs = [("train", ids, f" split {share} seed {seed}") for ids in stratified_split(labels["train"], share, seed)]
    train, validation = (
        ImageSplit(HfImages(parts[split], image, label, split, rows), f"{parts[split]._fingerprint}{how}") for split, rows, how in pairs
    )
    return ImageSource(f"hf:{name}", splits["train"].info.license or "unknown", class_names, train, validation)


def _load(options: SourceOptions) -> tuple[Mapping[str, Any], str]:
    """(datasets by split, name)."""
    try:
        import datasets
    except ImportError as err:
        raise ShardError(f"source hf needs the package datasets ({err}); install it with `pip install 'm2mkd_ds[datasets]'`") from err
    if options.hf_name is not None:
        try:
            loaded = datasets.load_dataset(options.hf_name, options.hf_config, cache_dir=str(options.cache))
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as err:
            advice = "check the name, the network, and HF_TOKEN for a gated dataset"
            raise ShardError(f"--hf-name {options.hf_name}: cannot be loaded ({type(err).__name__}: {err}); {advice}") from err
        return loaded, options.hf_name
    path = options.path
    assert path is not None, "check_options asks for one of them"
    if not path.is_dir():
        raise ShardError(f"{path}: no such folder; hf needs one written by save_to_disk, one of parquet files, or --hf-name")
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path)), path.name
    if (path / "state.json").is_file():
        return {"train": datasets.load_from_disk(str(path))}, path.name
    if not any(path.rglob("*.parquet")):
        raise ShardError(f"{path}: holds neither a dataset written by save_to_disk nor parquet files")
    return datasets.load_dataset(str(path), options.hf_config, cache_dir=str(options.cache)), path.name


def _column(dataset: Any, given: str | None, kind: str, option: str, name: str) -> str:
    """The column that was named, or the only one of this type."""
    found = [column for column, feature in dataset.features.items() if type(feature).__name__ == kind]
    if given is not None:
        if given not in found:
            raise ShardError(f"{option} is {given!r}; columns of type {kind} in {name} are {', '.join(found) or 'none'}")
        return given
    if len(found) != 1:
        names = ", ".join(found) or "none"
        raise ShardError(f"{name} has {len(found)} columns of type {kind} ({names}); name one with --{option.replace('_', '-')}")
    return found[0]


def _undecoded(dataset: Any, image: str, label: str, name: str) -> Any:
    """The two columns that matter, images as bytes or paths."""
    import datasets

    if image not in dataset.features or label not in dataset.features:
        raise ShardError(f"{name}: a split lacks {image} or {label}; all splits need the same columns")
    return dataset.select_columns([image, label]).cast_column(image, datasets.Image(decode=False))


def _labels(dataset: Any, label: str, num_classes: int, where: str) -> np.ndarray:
    """int64 [N]. Raises ShardError for rows without a class: the test split of a benchmark often hides them with -1."""
    values = dataset.select_columns([label])[:][label]
    bad = next((row for row, value in enumerate(values) if value is None or not 0 <= value < num_classes), None)
    if bad is not None:
        raise ShardError(f"{where}: row {bad} has label {values[bad]}; there are {num_classes} classes, and every row needs one of them")
    return np.array(values, dtype=np.int64)


def _encoded(entry: Mapping[str, Any] | None, where: str) -> tuple[bytes, str]:
    """(bytes, extension) by what the bytes are, not by what a file name says."""
    if entry is None or (entry["bytes"] is None and not entry["path"]):
        raise ShardError(f"{where}: has no image; remove the row")
    data = entry["bytes"] if entry["bytes"] is not None else Path(entry["path"]).read_bytes()
    if data[:3] == b"\xff\xd8\xff":
        return data, "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return data, "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data, "webp"
    file = io.BytesIO()
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.save(file, format="PNG")
    except UNDECODABLE as err:
        raise ShardError(f"{where}: not an image that can be decoded ({err}); remove the row") from err
    return file.getvalue(), "png"
