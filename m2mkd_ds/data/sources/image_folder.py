"""Source `image_folder`: a folder a class, as torchvision's ImageFolder and ImageNet have it. Bytes are passed through."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.sources.samples import FileImages, ImageSource, ImageSplit, stat_hash, stratified_split

logger = logging.getLogger("m2mkd_ds")

VALIDATION_SHARE = 0.1
LAYOUT = "image_folder needs ROOT/CLASS/*.jpg or ROOT/train/CLASS/*.jpg"

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def image_folder(root: Path, seed: int = 0, *, share: float | None = None) -> ImageSource:
    """ROOT/train/CLASS/*.jpg|png|webp with ROOT/val or ROOT/validation beside it; without one, a tenth (`share`) is held out.

    `content` covers names, sizes and times of the files, not their bytes. Raises ShardError for other layouts and other files.
    """
    train = root / "train"
    validation = next((root / name for name in ("validation", "val") if (root / name).is_dir()), None)
    if train.is_dir() and validation is not None:
        if share is not None:
            raise ShardError(f"validation_share is {share}, but {validation} is there; leave the option out or rename the folder")
        class_names = _class_folders(train)
        if _class_folders(validation) != class_names:
            raise ShardError(f"{validation} and {train} hold different class folders; both need the same names")
        parts = [_split(folder, _list_files(folder, class_names)) for folder in (train, validation)]
    else:
        if train.is_dir():
            others = sorted(path.name for path in root.iterdir() if path.is_dir() and path != train and not path.name.startswith("."))
            if others:
                raise ShardError(f"{root}: holds train and {', '.join(others)}; call the validation part val, or move the others away")
            root = train
        class_names = _class_folders(root)
        files = _list_files(root, class_names)
        labels_N = np.array([label for _, label in files], dtype=np.int64)
        ids = stratified_split(labels_N, share or VALIDATION_SHARE, seed)
        parts = [_split(root, [files[i] for i in part]) for part in ids]
    return ImageSource(f"image_folder:{root.name}", "unknown", class_names, parts[0], parts[1])


def _split(root: Path, files: Sequence[tuple[str, int]]) -> ImageSplit:
    return ImageSplit(FileImages(root, files), stat_hash(root, files))


def _class_folders(root: Path) -> tuple[str, ...]:
    if not root.is_dir():
        raise ShardError(f"{root}: no such folder; {LAYOUT}")
    folders = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    hidden = [name for name in folders if name.startswith(".")]
    if hidden:
        logger.warning("%s: hidden folders are no classes: %s", root, ", ".join(hidden))
    names = tuple(name for name in folders if name not in hidden)
    if not names:
        raise ShardError(f"{root}: holds no class folders; {LAYOUT}")
    return names


def _list_files(root: Path, class_names: Sequence[str]) -> list[tuple[str, int]]:
    """All image files, in a fixed order. Files of other kinds are refused, because leaving them out would go unseen."""
    files = []
    for label, name in enumerate(class_names):
        for path in sorted((root / name).rglob("*")):
            if path.is_file():
                if path.suffix.lower() not in _SUFFIXES:
                    raise ShardError(f"{path}: not one of {', '.join(_SUFFIXES)}; remove it or convert it")
                files.append((path.relative_to(root).as_posix(), label))
    return files
