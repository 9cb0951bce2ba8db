"""The names of the sources that shards are made from, what each takes, and the options as fields. Loads no library.

The functions behind the names are in `sources.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from m2mkd_ds.data.errors import ShardError

SourceName = Literal["digits", "fashion_mnist", "cifar100", "cub", "icons", "image_folder", "tar", "hf"]


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What a source may be told. None: not given; a source refuses options that it has no use for."""

    path: Path | None = None
    """Where the originals lie. image_folder: ROOT/train/CLASS/* with ROOT/val, or ROOT/CLASS/*. hf: a folder written by
    `save_to_disk`, or one of parquet files. cub: CUB_200_2011 or its .tgz. fashion_mnist: the folder of its .gz files. cifar100:
    cifar-100-binary.tar.gz. icons: the npm package @iconify/json, unpacked or .tgz. The last three are downloaded when it is left out."""
    cache: Path | None = None
    """Where downloaded or unpacked originals are kept; default OUT/download."""
    train_tars: str | None = None
    """tar: a webdataset tar, a folder of them, or a pattern with braces and stars, in quotes: 'DIR/train-{0000..1023}.tar'."""
    validation_tars: str | None = None
    """tar: the same for validation; left out, a share of the training tars is held out."""
    class_names: Path | None = None
    """tar: text file with a class name a line, in the order of the labels; default: those of index.json beside the tars, else numbers."""
    validation_share: float | None = None
    """image_folder, tar, hf: share of each class that is held out where the data has no validation part (default 0.1). icons: share of
    the icon sets (default 0.2)."""
    hf_name: str | None = None
    """hf: name of a dataset on the Hugging Face hub, instead of --path."""
    hf_config: str | None = None
    """hf: which of the dataset's configurations."""
    hf_image_column: str | None = None
    """hf: column of images; default the only one of type Image."""
    hf_label_column: str | None = None
    """hf: column of labels; default the only one of type ClassLabel."""
    num_classes: int | None = None
    """icons: how many of the most widely drawn names are classes (default 100)."""
    image_size: int | None = None
    """icons: side of the drawn images in pixels (default 64)."""


@dataclass(frozen=True)
class SourceUse:
    """What one source takes."""

    summary: str
    options: tuple[str, ...]
    needs: tuple[tuple[str, ...], ...] = ()
    """For each group, exactly one of the options must be given."""


SOURCE_USES: dict[SourceName, SourceUse] = {
    "digits": SourceUse("scikit-learn's 1,797 digits of 8x8, 10 classes; nothing to download", ()),
    "fashion_mnist": SourceUse("70,000 grey images of 28x28, 10 classes", ("path", "cache")),
    "cifar100": SourceUse("60,000 colour images of 32x32, 100 classes", ("path", "cache")),
    "cub": SourceUse("CUB-200-2011: 11,788 photos of 200 kinds of birds", ("path", "cache"), (("path",),)),
    "icons": SourceUse(
        "pictures of the most widely drawn icon names, split by icon set",
        ("path", "cache", "num_classes", "image_size", "validation_share"),
    ),
    "image_folder": SourceUse("a folder a class: ImageNet's layout", ("path", "validation_share"), (("path",),)),
    "tar": SourceUse(
        "webdataset tars of somebody else, shuffled anew", ("train_tars", "validation_tars", "class_names", "validation_share"),
        (("train_tars",),),
    ),
    "hf": SourceUse(
        "a Hugging Face dataset", ("path", "hf_name", "hf_config", "hf_image_column", "hf_label_column", "validation_share", "cache"),
        (("path", "hf_name"),),
    ),
}  # fmt: skip


def check_options(name: str, options: SourceOptions) -> SourceName:
    """Refuse an unknown source, options that it has no use for, and missing ones. Raises ShardError with one sentence."""
    known = next((known for known in SOURCE_USES if known == name), None)
    if known is None:
        raise ShardError(f"data source {name!r}: allowed is {' | '.join(SOURCE_USES)}")
    use = SOURCE_USES[known]
    given = [field.name for field in fields(options) if getattr(options, field.name) is not None]
    foreign = [option for option in given if option not in use.options]
    if foreign:
        takes = f"it takes {_flags(use.options)}" if use.options else "it takes no options of its own"
        raise ShardError(f"data source {name}: has no use for {_flags(foreign)}; {takes}")
    for group in use.needs:
        if sum(option in given for option in group) != 1:
            what = f"one of {_flags(group, ' and ')}" if len(group) > 1 else _flags(group)
            raise ShardError(f"data source {name}: needs {what}; see `m2mkd shards write --help`")
    share = options.validation_share
    if share is not None and not 0 < share < 1:
        raise ShardError(f"validation_share is {share}; it must lie between 0 and 1")
    return known


def _flags(options: tuple[str, ...] | list[str], between: str = ", ") -> str:
    return between.join(f"--{option.replace('_', '-')}" for option in options)
