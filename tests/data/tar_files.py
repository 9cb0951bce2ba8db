"""Small tar files and images for the tests of shards."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def make_tar(path: Path, members: Iterable[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of plain files, written by Python's tarfile."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def image_file(number: int, kind: str = "JPEG", size: tuple[int, int] = (20, 14)) -> bytes:
    """An encoded image of random blocks, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def image_members(numbers: Sequence[int], extension: str = "jpg") -> list[tuple[str, bytes]]:
    """Samples `n<number>` with label number % 3."""
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension]
    return [
        member
        for number in numbers
        for member in ((f"n{number:03d}.{extension}", image_file(number, kind)), (f"n{number:03d}.cls", str(number % 3).encode()))
    ]
