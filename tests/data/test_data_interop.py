"""Facts of the lists for other programs: timm, webdataset and wids read what we write, and get the same samples."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_wds import ReaderWds

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.foreign import IndexRequest, index_shards
from m2mkd_ds.data.shards.interop import class_list, parse_info, write_interop
from m2mkd_ds.data.shards.write import write_shards
from tests.data.tar_files import image_file, image_members, make_tar


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/train and ROOT/validation as `shards write` leaves them, and the lists of `write_interop`."""
    folder = tmp_path_factory.mktemp("root")
    for name, numbers in (("train", range(11)), ("validation", range(20, 25))):
        samples = [(image_file(n, "PNG" if n % 2 else "JPEG"), "png" if n % 2 else "jpg", n % 3, f"k{n}") for n in numbers]
        write_shards(
            samples, folder / name, total=len(samples), class_names=("a", "b", "c"), source="t", license="MIT", samples_per_shard=4
        )
    write_interop(folder)
    return folder


def pixels_and_labels(pairs: Iterable[tuple[Image.Image, int]]) -> list[tuple[bytes, int]]:
    return sorted((np.asarray(image.convert("RGB")).tobytes(), int(label)) for image, label in pairs)


def ours(folder: Path) -> list[tuple[bytes, int]]:
    index = ShardIndex.load(folder)
    read = [index.read(number) for number in range(len(index))]
    return pixels_and_labels((Image.open(io.BytesIO(image)), label) for image, label, _ in read)


@pytest.mark.parametrize(("split", "count"), [("train", 11), ("validation", 5)])
def test_timm_reads_a_root_with_both_splits(root: Path, split: str, count: int) -> None:
    dataset = create_dataset("wds/any", root=str(root), split=split)
    assert len(dataset) == count
    assert pixels_and_labels(dataset) == ours(root / split)
    alone = ReaderWds(str(root / split), split=split)
    assert len(alone) == count and pixels_and_labels(alone) == ours(root / split)


def test_timm_reads_foreign_shards_through_an_index_that_lies_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in" / "s.tar", [*image_members(range(4)), *image_members(range(4, 7), "webp")])
    index_shards(IndexRequest(shards=(str(tmp_path / "in"),), out=tmp_path / "deep" / "index"), workers=1)
    reader = ReaderWds(str(tmp_path / "deep" / "index"), split="index")
    assert len(reader) == 7 and pixels_and_labels(reader) == ours(tmp_path / "deep" / "index")
    # The same through the list of a root above it.
    write_interop(tmp_path / "deep")
    assert pixels_and_labels(ReaderWds(str(tmp_path / "deep"), split="index")) == ours(tmp_path / "deep" / "index")


def test_timm_takes_the_label_from_the_field_that_the_index_took_it_from(tmp_path: Path) -> None:
    members = [(f"k{n}.{end}", data) for n in range(3) for end, data in (("jpg", image_file(n)), ("json", b'{"fine": %d}' % (n + 5)))]
    make_tar(tmp_path / "s.tar", members)
    index_shards(IndexRequest(shards=(str(tmp_path),), label_field="fine"), workers=1)
    assert [label for _, label in ReaderWds(str(tmp_path), split=tmp_path.name)] == [5, 6, 7]


def test_webdataset_reads_the_shards_that_wids_json_lists(root: Path) -> None:
    tree = json.loads((root / "train" / "wids.json").read_text())
    index = ShardIndex.load(root / "train")
    # The form that the wids package documents: these two fields, and url and nsamples of every shard.
    assert (tree["__kind__"], tree["wids_version"], tree["name"]) == ("wids-shard-index-v1", 1, "train")
    for shard in tree["shardlist"]:
        path = root / "train" / shard["url"]
        assert path.stat().st_size == shard["filesize"]
        assert len(list(webdataset.WebDataset([str(path)], shardshuffle=False))) == shard["nsamples"]
    urls = [str(root / "train" / shard["url"]) for shard in tree["shardlist"]]
    theirs = {(sample["__key__"], int(sample["cls"])) for sample in webdataset.WebDataset(urls, shardshuffle=False)}
    assert theirs == {(key, label) for _, label, key in (index.read(n) for n in range(11))} and len(theirs) == 11


def test_an_empty_shard_is_not_listed_for_wids(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [])
    make_tar(tmp_path / "b.tar", image_members(range(2)))
    index_shards(IndexRequest(shards=(str(tmp_path),)), workers=1)
    assert [shard["url"] for shard in json.loads((tmp_path / "wids.json").read_text())["shardlist"]] == ["b.tar"]
    assert len(ReaderWds(str(tmp_path), split=tmp_path.name)) == 2


def test_our_own_info_json_is_read_back(root: Path, tmp_path: Path) -> None:
    """Shards that travel with `_info.json` alone: the class names come along, and the splits."""
    for name in ("train", "validation"):
        (tmp_path / name).mkdir()
        for path in (root / name).glob("*.tar"):
            (tmp_path / name / path.name).write_bytes(path.read_bytes())
    (tmp_path / "_info.json").write_bytes((root / "_info.json").read_bytes())
    index = index_shards(IndexRequest(shards=(str(tmp_path),), split="train", out=tmp_path / "i"), workers=1)
    assert index.class_names == ("a", "b", "c") and index.shard_sizes == (4, 4, 3)
    info = parse_info("x", (root / "_info.json").read_bytes())
    assert {name: sum(split.num_samples_by_name.values()) for name, split in info.splits.items()} == {"train": 11, "validation": 5}


def test_a_list_that_somebody_else_made_is_left_alone(tmp_path: Path) -> None:
    make_tar(tmp_path / "s.tar", image_members(range(2)))
    theirs = '{"splits": {}, "note": "mine"}'
    (tmp_path / "_info.json").write_text(theirs)
    (tmp_path / "wids.json").write_text("not json")
    index_shards(IndexRequest(shards=(str(tmp_path),)), workers=1)
    assert (tmp_path / "_info.json").read_text() == theirs and (tmp_path / "wids.json").read_text() == "not json"
    assert write_interop(tmp_path) == []


def test_lists_are_renewed_and_wrong_places_are_told(root: Path, tmp_path: Path) -> None:
    before = (root / "_info.json").read_bytes()
    (root / "_info.json").write_text('{"made_by": "m2mkd_ds"}')
    assert root / "_info.json" in write_interop(root)
    assert (root / "_info.json").read_bytes() == before
    with pytest.raises(ShardError, match="neither it nor its subfolders hold index.json"):
        write_interop(tmp_path)


def test_jpeg_members_are_named_because_timm_would_skip_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_tar(tmp_path / "s.tar", image_members(range(2), "jpeg"))
    with caplog.at_level("WARNING", logger="m2mkd_ds"):
        index_shards(IndexRequest(shards=(str(tmp_path),)), workers=1)
    assert "input_key='jpg;png;webp;jpeg'" in caplog.text
    split = tmp_path.name
    assert list(ReaderWds(str(tmp_path), split=split)) == []
    assert len(list(ReaderWds(str(tmp_path), split=split, input_key="jpg;png;webp;jpeg"))) == 2


def test_class_lists() -> None:
    assert class_list(["x", "y"], "f") == ("x", "y")
    assert class_list({"1": "y", "0": "x"}, "f") == ("x", "y")
    for tree, message in (
        ({"1": "y", "2": "x"}, "f: class numbers must be 0 to 1; see 0, 2"),
        ([1], "list of strings"),
        ("ab", "list of strings"),
    ):
        with pytest.raises(ShardError, match=message):
            class_list(tree, "f")
