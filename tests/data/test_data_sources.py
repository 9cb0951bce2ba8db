"""Facts of the sources: digits pixel for pixel, stratified splits, IDX parsing, the order of places for Fashion-MNIST."""

from __future__ import annotations

import gzip
import io
import json
import logging
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.sources import fashion_mnist as fm
from m2mkd_ds.data.sources.registry import digits, encode_png, image_folder, make_source, stratified_split


def test_digits_are_scikit_learns_images(digits_folder: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    seen = []
    for name in ("train", "validation"):
        index = ShardIndex.load(digits_folder / name)
        assert index.license == "BSD-3-Clause"
        for number in range(len(index)):
            data, label, key = index.read(number)
            row = int(key.removeprefix("digit-"))
            seen.append(row)
            image = Image.open(io.BytesIO(data))
            assert (image.mode, image.size) == ("L", (8, 8))
            # 0..16 became 0..255: dividing by 255/16 = 15.9375 and rounding gives the number back.
            assert np.array_equal(np.rint(np.array(image) / 15.9375), bunch.images[row])
            assert label == bunch.target[row]
    assert sorted(seen) == list(range(1797))


@given(labels=st.lists(st.integers(0, 5), max_size=80), share=st.floats(0, 1), seed=st.integers(0, 99))
def test_split_is_stratified_disjoint_and_fixed(labels: list[int], share: float, seed: int) -> None:
    labels_N = np.array(labels, dtype=np.int64)
    train, validation = stratified_split(labels_N, share, seed)
    assert sorted([*train.tolist(), *validation.tolist()]) == list(range(len(labels)))
    for label in set(labels):
        count = labels.count(label)
        # A class of two or more is never left out of the validation part.
        expected = round(share * count) or (1 if count > 1 and share > 0 else 0)
        assert int((labels_N[validation] == label).sum()) == expected
    again = stratified_split(labels_N, share, seed)
    assert np.array_equal(train, again[0])


def test_split_depends_on_the_seed() -> None:
    labels_N = np.zeros(100, dtype=np.int64)
    assert not np.array_equal(stratified_split(labels_N, 0.2, 0)[1], stratified_split(labels_N, 0.2, 1)[1])
    assert digits(0).validation.content != digits(1).validation.content


def test_idx_by_hand() -> None:
    # 2 images of 1x3: magic 00 00 08 (bytes) 03 (dimensions), sizes 2, 1, 3, then 6 values.
    data = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4, 5, 6])
    assert fm.parse_idx(data, "x").tolist() == [[[1, 2, 3]], [[4, 5, 6]]]
    with pytest.raises(ShardError, match=r"x: has 21 bytes, its head promises shape \[2, 1, 3\]"):
        fm.parse_idx(data[:-1], "x")
    with pytest.raises(ShardError, match="begins with 00000d03; an IDX file of bytes begins with 000008"):
        fm.parse_idx(b"\0\0\x0d\x03" + data[4:], "x")
    with pytest.raises(ShardError, match="damaged"):
        fm.parse_idx(data[:9], "x")


def fake_copy(folder: Path) -> None:
    """Four files of the right names and shapes with other pixels."""
    folder.mkdir()
    for name, shape in fm.SHAPES.items():
        head = struct.pack(f">4B{len(shape)}i", 0, 0, 8, len(shape), *shape)
        (folder / f"{name}.gz").write_bytes(gzip.compress(head + bytes(int(np.prod(shape))), 1))


def test_files_that_are_not_fashion_mnist_are_refused(tmp_path: Path) -> None:
    fake_copy(tmp_path / "fake")
    with pytest.raises(ShardError, match="train-images-idx3-ubyte.gz: shape .*, sha256 .*; this is not Fashion-MNIST's"):
        fm.fashion_mnist_arrays(tmp_path / "cache", local=tmp_path / "fake")
    (tmp_path / "fake" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b\x08")
    with pytest.raises(ShardError, match="not a complete gzip file"):
        fm.fashion_mnist_arrays(tmp_path / "cache", local=tmp_path / "fake")


def test_a_named_folder_must_have_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardError, match=r"\(from path\) lacks train-images-idx3-ubyte.gz"):
        fm.fashion_mnist_arrays(tmp_path / "cache", local=tmp_path)
    monkeypatch.setenv(fm.ENVIRONMENT_VARIABLE, str(tmp_path))
    with pytest.raises(ShardError, match=r"\(from M2MKD_FASHION_MNIST\) lacks"):
        fm.fashion_mnist_arrays(tmp_path / "cache")


def test_every_place_is_tried_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    # No network for torchvision (a mirror that nobody listens at), no apt-get for Debian's package.
    from torchvision.datasets import FashionMNIST

    monkeypatch.delenv(fm.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(fm, "DEBIAN_FOLDER", tmp_path / "not-installed")
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "m2mkd_ds"), pytest.raises(ShardError) as caught:
        fm.fashion_mnist_arrays(tmp_path / "cache")
    message = str(caught.value)
    for part in ("not-installed: not there", "torchvision's download: Error downloading", "no apt-get here", fm.ENVIRONMENT_VARIABLE):
        assert part in message
    assert "torchvision's download failed" in caplog.text
    assert "Debian package dataset-fashion-mnist failed" in caplog.text


def make_class_folders(root: Path, classes: dict[str, int]) -> None:
    for number, (name, count) in enumerate(classes.items()):
        (root / name / "deep").mkdir(parents=True)
        for i in range(count):
            target = root / name / ("deep" if i % 2 else "") / f"im.v{i}.png"
            target.write_bytes(encode_png(np.full((4, 4), 10 * number + i, np.uint8)))


def test_image_folder_passes_bytes_through(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "set" / "train", {"ant": 3, "bee": 2})
    make_class_folders(tmp_path / "set" / "val", {"ant": 1, "bee": 1})
    train, validation = make_source("image_folder", tmp_path / "out", path=tmp_path / "set")
    assert (len(train), len(validation), train.class_names) == (5, 2, ("ant", "bee"))
    found = sorted((label, data) for data, label, _ in (train.read(i) for i in range(5)))
    expected = [
        (number, path.read_bytes()) for number, name in enumerate(("ant", "bee")) for path in (tmp_path / "set/train" / name).rglob("*.png")
    ]
    assert found == sorted(expected)


def test_image_folder_without_split_holds_out_a_tenth_of_each_class(tmp_path: Path) -> None:
    make_class_folders(tmp_path / "set", {"ant": 20, "bee": 10})
    source = image_folder(tmp_path / "set")
    assert [sample.label for sample in source.validation.samples] == [0, 0, 1]
    assert len(source.train.samples) == 27


def test_image_folder_refuses_what_it_cannot_take(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such folder"):
        image_folder(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="holds no class folders"):
        image_folder(tmp_path / "empty")
    make_class_folders(tmp_path / "set", {"ant": 2})
    (tmp_path / "set" / "ant" / "notes.txt").write_text("x")
    with pytest.raises(ShardError, match=r"notes.txt: not one of .jpg, .jpeg, .png, .webp"):
        image_folder(tmp_path / "set")


def test_unknown_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"data source 'mnist': allowed is digits \| fashion_mnist \| cifar100 \| cub \| icons"):
        make_source("mnist", tmp_path)
    with pytest.raises(ShardError, match="data source image_folder: needs --path"):
        make_source("image_folder", tmp_path)


def class_folders(root: Path, images_a_class: int) -> None:
    for name in ("ant", "bee"):
        (root / name).mkdir(parents=True)
        for number in range(images_a_class):
            (root / name / f"{number}.png").write_bytes(encode_png(np.full((4, 4), number, dtype=np.uint8)))


def test_a_train_folder_without_validation_is_shared_out_and_is_no_class(tmp_path: Path) -> None:
    class_folders(tmp_path / "train", 4)
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    source = image_folder(tmp_path)
    assert source.class_names == ("ant", "bee")
    # A tenth of four images would be none: one of each class is held out.
    assert (len(source.train.samples), len(source.validation.samples)) == (6, 2)
    (tmp_path / "test").mkdir()
    with pytest.raises(ShardError, match="holds train and test; call the validation part val"):
        image_folder(tmp_path)


def test_an_empty_validation_part_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", 1)
    with pytest.raises(ShardError, match="2 training and 0 validation images"):
        make_source("image_folder", tmp_path / "out", path=tmp_path / "in")


def test_the_list_for_timm_follows_the_shards_that_are_there(tmp_path: Path) -> None:
    class_folders(tmp_path / "in", 5)
    make_source("image_folder", tmp_path / "out", path=tmp_path / "in", samples_per_shard=8)
    for part in ("train", "validation"):
        shutil.rmtree(tmp_path / "out" / part)
    make_source("image_folder", tmp_path / "out", path=tmp_path / "in", samples_per_shard=3)
    splits = json.loads((tmp_path / "out" / "_info.json").read_text())["splits"]
    assert splits["train"]["shard_lengths"] == [3, 3, 2] and splits["validation"]["shard_lengths"] == [2]
