"""`m2mkd shards`, and its action `write`: make webdataset shards. The other actions are in shards_check.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import app, out, shards_app
from m2mkd_ds.logs import setup_logging


@app.command
def shards(action: tyro.conf.Positional[Literal["write", "index", "verify", "info"]], /) -> None:
    """Make, index, check and look at webdataset shards; each action has its own --help.

    Args:
        action: What to do.
    """
    # `main` sends these words to `shards_app`; this entry is what `m2mkd --help` lists.
    shards_app.cli(prog="m2mkd shards", args=[action])


@shards_app.command
def write(
    *,
    source: Literal["digits", "fashion_mnist", "image_folder"],
    out_dir: Annotated[Path, tyro.conf.arg(name="out")],
    path: Path | None = None,
    cache: Path | None = None,
) -> None:
    """Make webdataset shards with an index: OUT/train and OUT/validation; complete folders are kept.

    Args:
        source: digits (scikit-learn), fashion_mnist, or image_folder (needs --path).
        out_dir: Folder to write into.
        path: For image_folder: the folder of class folders; for fashion_mnist: a local copy of its .gz files.
        cache: Where downloaded originals are kept (default OUT/download).
    """
    from m2mkd_ds.data.sources import make_source

    setup_logging()
    for index in make_source(source, out_dir, path=path, cache=cache):
        out(f"{index.folder}: {index.num_samples} images, {index.num_classes} classes, fingerprint {index.fingerprint[:16]}")
