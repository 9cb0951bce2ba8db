"""Facts of the source `tar`: every image of foreign tars comes out once with its label, in another order, with its old key noted."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.data.sources.tars import expand

EXTENSIONS = ("JPEG", "png", "webp", "jpg")


def foreign_tars(folder: Path, prefix: str, tars: int, each: int) -> dict[bytes, int]:
    """Tars of another layout of members; image -> label."""
    folder.mkdir(exist_ok=True)
    made = {}
    random = np.random.default_rng(len(prefix) * 100 + tars)
    for number in range(tars):
        with tarfile.open(folder / f"{prefix}-{number:02d}.tar", "w") as tar:
            for i in range(each):
                image, label = random.bytes(int(random.integers(10, 900))), int(random.integers(0, 5))
                made[image] = label
                key = f"n0{label}/im.{number}_{i}".replace(".", "-")
                for name, data in ((f"{key}.json", b'{"x": 1}'), (f"{key}.{EXTENSIONS[i % 4]}", image), (f"{key}.cls", b"%d" % label)):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return made


def samples_of(index: ShardIndex) -> list[tuple[bytes, int]]:
    return [index.read(i)[:2] for i in range(len(index))]


def test_every_image_comes_out_once_with_its_label(tmp_path: Path) -> None:
    train_made = foreign_tars(tmp_path / "in", "train", 3, 8)
    validation_made = foreign_tars(tmp_path / "in", "val", 1, 6)
    options = SourceOptions(train_tars=f"{tmp_path}/in/train-{{00..02}}.tar", validation_tars=f"{tmp_path}/in/val-*.tar")
    train, validation = make_source("tar", tmp_path / "out", options=options, samples_per_shard=10)
    assert dict(samples_of(train)) == train_made
    assert dict(samples_of(validation)) == validation_made
    assert (len(train), len(validation)) == (24, 6)
    assert train.class_names == ("0", "1", "2", "3", "4")
    assert [image for image, _ in samples_of(train)] != list(train_made)  # in another order
    with tarfile.open(train.folder / "shard-000000.tar") as tar:
        infos = [json.load(tar.extractfile(member)) for member in tar if member.name.endswith(".json")]
    for info in infos:
        number, _, rest = info["original_key"].partition("im-")
        assert info["original_tar"] == f"train-0{rest[0]}.tar"
        assert info["key"].endswith(info["original_key"].replace("/", "_"))
        assert info["label"] == int(number[2])
    assert {row["extension"].decode() for row in train.table} == {"jpeg", "png", "webp", "jpg"}


def test_a_share_is_held_out_where_there_is_no_validation(tmp_path: Path) -> None:
    made = foreign_tars(tmp_path / "in", "all", 2, 50)
    options = SourceOptions(train_tars=str(tmp_path / "in"), validation_share=0.3)
    train, validation = make_source("tar", tmp_path / "out", options=options)
    assert {**dict(samples_of(train)), **dict(samples_of(validation))} == made
    for label in range(5):
        total = sum(other == label for other in made.values())
        assert int((validation.labels_N == label).sum()) == round(0.3 * total)
    again, _ = make_source("tar", tmp_path / "out", options=options)
    assert again.fingerprint == train.fingerprint
    with pytest.raises(ShardError, match="differ in seed, content"):
        make_source("tar", tmp_path / "out", options=options, seed=1)


def test_our_own_shards_keep_their_class_names(tmp_path: Path, digits_folder: Path) -> None:
    options = SourceOptions(train_tars=str(digits_folder / "train"), validation_tars=str(digits_folder / "validation"))
    train, validation = make_source("tar", tmp_path / "out", options=options, seed=3)
    before = ShardIndex.load(digits_folder / "train")
    assert train.class_names == before.class_names
    assert sorted(samples_of(train)) == sorted(samples_of(before))
    assert samples_of(train) != samples_of(before)
    assert len(validation) == len(ShardIndex.load(digits_folder / "validation"))


def test_class_names_come_from_a_file(tmp_path: Path) -> None:
    foreign_tars(tmp_path / "in", "t", 1, 20)
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\neel\n")
    options = SourceOptions(train_tars=str(tmp_path / "in/t-00.tar"), class_names=tmp_path / "names.txt")
    assert make_source("tar", tmp_path / "out", options=options)[0].class_names == ("ant", "bee", "cat", "dog", "eel")
    (tmp_path / "names.txt").write_text("ant\nbee\n")
    with pytest.raises(ShardError, match="names.txt: has 2 class names, but the labels run to 4"):
        make_source("tar", tmp_path / "other", options=options)


def test_patterns_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    foreign_tars(tmp_path / "in", "t", 2, 1)
    assert [path.name for path in expand(f"{tmp_path}/in/t-{{01,00}}.tar", "train_tars")] == ["t-01.tar", "t-00.tar"]
    for pattern, message in (
        (f"{tmp_path}/in/t-{{00..02}}.tar", "t-02.tar is no file"),
        (f"{tmp_path}/in/u*.tar", r"u\*.tar is no file"),
        (f"{tmp_path}/in/{{00", "is no file|not balanced"),
    ):
        with pytest.raises(ShardError, match=message):
            expand(pattern, "train_tars")
    both = SourceOptions(train_tars=str(tmp_path / "in"), validation_tars=str(tmp_path / "in/t-01.tar"))
    with pytest.raises(ShardError, match="t-01.tar: is in train_tars and in validation_tars"):
        make_source("tar", tmp_path / "out", options=both)
    assert not (tmp_path / "out").exists()
