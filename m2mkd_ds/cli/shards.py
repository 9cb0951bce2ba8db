"""`m2mkd shards`, and its action `write`: make webdataset shards. The other actions are in shards_check.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from m2mkd_ds.cli.app import app, out, shards_app
from m2mkd_ds.data.source_options import SourceName, SourceOptions
from m2mkd_ds.logs import setup_logging


@app.command
def shards(action: tyro.conf.Positional[Literal["write", "index", "verify", "info"]], /) -> None:
    """Make, index, check and look at webdataset shards; each action has its own --help.

    Args:
        action: What to do.
    """
    # `main` sends these words to `shards_app`; this entry is what `m2mkd --help` lists.
    shards_app.cli(prog="m2mkd shards", args=[action])


_NOTHING_GIVEN = SourceOptions()


@shards_app.command
def write(
    *,
    source: SourceName,
    out_dir: Annotated[Path, tyro.conf.arg(name="out")],
    samples_per_shard: int = 5000,
    seed: int = 0,
    resize_short: int = 0,
    quality: int | None = None,
    workers: int | None = None,
    options: Annotated[SourceOptions, tyro.conf.arg(name="")] = _NOTHING_GIVEN,
) -> None:
    """Make webdataset shards with an index: OUT/train and OUT/validation. Stopped, the same command goes on where it was.

    digits: scikit-learn's 8x8 digits. fashion_mnist, cifar100: downloaded. icons: drawn from the npm package @iconify/json.
    image_folder: a folder a class. tar: webdataset tars. hf: a Hugging Face dataset. cub: CUB-200-2011.

    ImageNet from class folders, bytes as they are:
      m2mkd shards write --source image_folder --path IMAGENET --out data/in1k

    the same, smaller and faster to decode:
      m2mkd shards write --source image_folder --path IMAGENET --out data/in1k-384 --resize-short 384 --quality 90

    ImageNet in timm's tars, and from the hub:
      m2mkd shards write --source tar --train-tars 'WDS/imagenet1k-train-{0000..1023}.tar'
        --validation-tars 'WDS/imagenet1k-validation-{00..63}.tar' --out data/in1k

      m2mkd shards write --source hf --hf-name ILSVRC/imagenet-1k --out data/in1k

    Args:
        source: What to make shards from. Each takes some of the options below and refuses the others.
        out_dir: Folder to write into.
        samples_per_shard: Images a shard.
        seed: Shuffles the images once and, where the data has no validation part, chooses it.
        resize_short: Images whose shorter side is larger are encoded anew, with a shorter side of so many pixels. 0: all bytes are copied.
        quality: JPEG quality of --resize-short (default 90).
        workers: Processes that write (default: one a processor, at most 8). The shards do not depend on it.
        options: What single sources take.
    """
    from m2mkd_ds.data.errors import ShardError
    from m2mkd_ds.data.shards.processes import default_workers
    from m2mkd_ds.data.sources.registry import make_source

    setup_logging()
    if quality is not None and not resize_short:
        raise ShardError(f"quality is {quality}, but without --resize-short all bytes are copied as they are; give both or leave it out")
    indices = make_source(
        source,
        out_dir,
        options=options,
        seed=seed,
        samples_per_shard=samples_per_shard,
        resize_short=resize_short,
        quality=90 if quality is None else quality,
        workers=default_workers() if workers is None else workers,
    )
    for index in indices:
        out(f"{index.folder}: {index.num_samples} images, {index.num_classes} classes, fingerprint {index.fingerprint[:16]}")
