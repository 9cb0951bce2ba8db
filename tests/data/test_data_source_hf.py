"""Facts of the source `hf`: bytes of a Hugging Face dataset are passed through, columns and splits are found, from disk and parquet."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.source_options import SourceOptions
from m2mkd_ds.data.sources.registry import SOURCES, make_source

NAMES = ("ant", "bee", "cat")
FORMATS = ("JPEG", "PNG", "WEBP")


def encoded(number: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(file, kind)
    return file.getvalue()


def rows(start: int, count: int) -> list[tuple[bytes, int]]:
    return [(encoded(start + i, FORMATS[i % 3]), (start + i) % 3) for i in range(count)]


def as_dataset(pairs: list[tuple[bytes, int]], **more: Any) -> Any:
    import datasets

    columns: dict[str, Any] = {"picture": [{"bytes": image, "path": None} for image, _ in pairs], "kind": [label for _, label in pairs]}
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=list(NAMES))}
    for name, (values, feature) in more.items():
        columns[name], features[name] = values, feature
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def samples_of(index: Any) -> list[tuple[bytes, int]]:
    return sorted(index.read(i)[:2] for i in range(len(index)))


def test_a_saved_dataset_keeps_its_bytes_and_its_splits(tmp_path: Path) -> None:
    import datasets

    train_rows, test_rows = rows(0, 12), rows(100, 5)
    datasets.DatasetDict({"train": as_dataset(train_rows), "test": as_dataset(test_rows)}).save_to_disk(str(tmp_path / "saved"))
    train, validation = make_source("hf", tmp_path / "out", path=tmp_path / "saved", samples_per_shard=5)
    assert samples_of(train) == sorted(train_rows)
    assert samples_of(validation) == sorted(test_rows)
    assert train.class_names == validation.class_names == NAMES
    assert sorted(row["extension"].decode() for row in train.table) == ["jpg"] * 4 + ["png"] * 4 + ["webp"] * 4
    again, _ = make_source("hf", tmp_path / "out", path=tmp_path / "saved", samples_per_shard=5)
    assert again.fingerprint == train.fingerprint


def test_samples_travel_to_another_process(tmp_path: Path) -> None:
    made = rows(0, 30)
    as_dataset(made).save_to_disk(str(tmp_path / "saved"))
    source = SOURCES["hf"](SourceOptions(path=tmp_path / "saved", cache=tmp_path), 0)
    message = pickle.dumps(source.train.samples.subset(np.array([4, 1])))
    assert len(message) < 10_000  # the files' names, not the images
    part = pickle.loads(message)
    assert [part[i] for i in range(2)] == [source.train.samples[4], source.train.samples[1]]


def test_parquet_files_give_the_same(tmp_path: Path) -> None:
    train_rows, validation_rows = rows(0, 9), rows(50, 4)
    (tmp_path / "pq").mkdir()
    as_dataset(train_rows).to_parquet(str(tmp_path / "pq" / "train-00000-of-00001.parquet"))
    as_dataset(validation_rows).to_parquet(str(tmp_path / "pq" / "validation-00000-of-00001.parquet"))
    train, validation = make_source("hf", tmp_path / "out", path=tmp_path / "pq")
    assert (samples_of(train), samples_of(validation)) == (sorted(train_rows), sorted(validation_rows))
    assert (tmp_path / "out" / "download").is_dir()  # not the user's cache


def test_a_dataset_without_splits_is_split_by_class(tmp_path: Path) -> None:
    made = rows(0, 60)
    as_dataset(made).save_to_disk(str(tmp_path / "saved"))
    options = SourceOptions(path=tmp_path / "saved", validation_share=0.25)
    train, validation = make_source("hf", tmp_path / "out", options=options)
    assert sorted(samples_of(train) + samples_of(validation)) == sorted(made)
    assert np.bincount(validation.labels_N).tolist() == [5, 5, 5]  # a quarter of 20


def test_columns_are_named_where_there_are_several(tmp_path: Path) -> None:
    import datasets

    made = rows(0, 10)
    others = [{"bytes": encoded(200, "PNG"), "path": None}] * 10
    more = {"thumbnail": (others, datasets.Image()), "group": ([0] * 10, datasets.ClassLabel(names=["all"]))}
    as_dataset(made, **more).save_to_disk(str(tmp_path / "saved"))
    for given, message in (
        ({}, r"has 2 columns of type Image \(picture, thumbnail\); name one with --hf-image-column"),
        ({"hf_image_column": "picture"}, r"has 2 columns of type ClassLabel \(kind, group\); name one with --hf-label-column"),
        ({"hf_image_column": "kind"}, "hf_image_column is 'kind'; columns of type Image in saved are picture, thumbnail"),
    ):
        with pytest.raises(ShardError, match=message):
            make_source("hf", tmp_path / "out", options=SourceOptions(path=tmp_path / "saved", **given))
    options = SourceOptions(path=tmp_path / "saved", hf_image_column="picture", hf_label_column="kind")
    train, validation = make_source("hf", tmp_path / "out", options=options)
    assert sorted(samples_of(train) + samples_of(validation)) == sorted(made)


def test_other_formats_become_png_and_hidden_labels_are_refused(tmp_path: Path) -> None:
    pixels_HWC = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "BMP")
    as_dataset([(file.getvalue(), 1)] * 20).save_to_disk(str(tmp_path / "bmp"))
    train, _ = make_source("hf", tmp_path / "a", path=tmp_path / "bmp")
    image = Image.open(io.BytesIO(train.read(0)[0]))
    assert image.format == "PNG"
    assert np.array_equal(np.asarray(image), pixels_HWC)
    as_dataset([(encoded(1, "PNG"), -1)] * 20).save_to_disk(str(tmp_path / "hidden"))
    with pytest.raises(ShardError, match="hidden, split train: row 0 has label -1; there are 3 classes"):
        make_source("hf", tmp_path / "b", path=tmp_path / "hidden")


def test_folders_that_are_no_dataset_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="none: no such folder"):
        make_source("hf", tmp_path / "out", path=tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="neither a dataset written by save_to_disk nor parquet files"):
        make_source("hf", tmp_path / "out", path=tmp_path / "empty")
    with pytest.raises(ShardError, match="needs one of --path and --hf-name"):
        make_source("hf", tmp_path / "out")
