"""Facts of verify, info and the contact sheet: the right sample is named for each damage, and numbers are those of the data."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex, write_index
from m2mkd_ds.data.shards.contact_sheet import CAPTION, GAP, TILE, contact_sheet, sheet_samples, write_contact_sheet
from m2mkd_ds.data.shards.foreign import IndexRequest, index_shards
from m2mkd_ds.data.shards.scan import ShardFault
from m2mkd_ds.data.shards.summary import summarize, summary_json, summary_text
from m2mkd_ds.data.shards.verify import ShardReport, image_fault, verify_shards
from tests.data.tar_files import image_file, image_members, make_tar


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two indexed shards of 4 and 3 samples, n000 to n006; label number % 3."""
    shards = tmp_path / "shards"
    shards.mkdir()
    make_tar(shards / "a.tar", image_members(range(4)))
    make_tar(shards / "b.tar", image_members(range(4, 7), "png"))
    index_shards(IndexRequest(shards=(str(shards),)), workers=1)
    return shards


def faults_of(folder: Path, **options: Any) -> list[ShardFault]:
    return [fault for report in verify_shards(folder, workers=1, **options) for fault in report.faults]


def short(faults: list[ShardFault]) -> list[tuple[str, str, str, int | None]]:
    return [(fault.kind, fault.shard, fault.key, fault.sample) for fault in faults]


def change(path: Path, member: str, edit: Callable[[bytearray, tarfile.TarInfo], object]) -> None:
    """Edit the bytes of a shard where tarfile says that a member lies."""
    with tarfile.open(path) as tar:
        info = tar.getmember(member)
    data = bytearray(path.read_bytes())
    edit(data, info)
    path.write_bytes(data)


def flip(place: int) -> Callable[[bytearray, tarfile.TarInfo], object]:
    def edit(data: bytearray, info: tarfile.TarInfo) -> None:
        data[info.offset_data + place] ^= 1

    return edit


def flip_header(data: bytearray, info: tarfile.TarInfo) -> None:
    data[info.offset + 3] ^= 1


def test_sound_shards_have_no_faults_in_one_process_and_in_two(folder: Path) -> None:
    for workers in (1, 2):
        reports = verify_shards(folder, workers=workers)
        assert [(report.shard, report.num_samples, report.faults) for report in reports] == [("a.tar", 4, ()), ("b.tar", 3, ())]
        assert [report.num_bytes for report in reports] == [(folder / name).stat().st_size for name in ("a.tar", "b.tar")]


@pytest.mark.parametrize("number", [4, 5, 6])
def test_a_flipped_byte_is_found_in_its_sample(folder: Path, number: int) -> None:
    size = len(image_file(number, "PNG"))
    for place in (0, size // 2, size - 1):
        change(folder / "b.tar", f"n{number:03d}.png", flip(place))
        found = faults_of(folder)
        assert short(found) == [("checksum", "b.tar", "", None), ("checksum", "b.tar", f"n{number:03d}", number)]
        assert "crc32 differs" in found[1].message and ("cannot decode" in found[1].message) == (place < size - 1)
        with pytest.raises(SampleError, match="crc32 differs"):
            ShardIndex.load(folder).read(number)
        change(folder / "b.tar", f"n{number:03d}.png", flip(place))
    assert faults_of(folder) == []


def test_a_changed_label_is_told_with_both_numbers(folder: Path) -> None:
    change(folder / "a.tar", "n002.cls", lambda data, info: data.__setitem__(info.offset_data, ord("7")))
    found = faults_of(folder)
    assert short(found) == [("checksum", "a.tar", "", None), ("bad_label", "a.tar", "n002", 2)]
    assert "the shard says label 7, the index 2" in found[1].message
    change(folder / "a.tar", "n002.cls", lambda data, info: data.__setitem__(info.offset_data, ord("x")))
    assert short(faults_of(folder))[1:] == [("bad_label", "a.tar", "n002", 2)]


def test_samples_behind_a_damaged_header_are_still_read_at_their_places(folder: Path) -> None:
    change(folder / "a.tar", "n003.jpg", flip(5))
    change(folder / "a.tar", "n001.jpg", flip_header)
    assert short(faults_of(folder)) == [
        ("checksum", "a.tar", "", None), ("damaged_tar", "a.tar", "", None), ("checksum", "a.tar", "n003", 3),
    ]  # fmt: skip


def test_a_cut_shard_names_every_lost_sample(folder: Path) -> None:
    path = folder / "a.tar"
    with tarfile.open(path) as tar:
        cut = tar.getmember("n002.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:cut])
    found = faults_of(folder)
    assert short(found) == [
        ("checksum", "a.tar", "", None), ("truncated", "a.tar", "n002", None),
        ("truncated", "a.tar", "n002", 2), ("truncated", "a.tar", "n003", 3),
    ]  # fmt: skip
    assert f"100 of {len(image_file(2))} bytes are there" in found[2].message
    with pytest.raises(ShardError, match="it is truncated or changed"):
        ShardIndex.load(folder)


def test_a_missing_shard_and_a_replaced_one_are_told(folder: Path) -> None:
    (folder / "a.tar").unlink()
    make_tar(folder / "b.tar", [*image_members(range(4, 6), "png"), *image_members(range(8, 10), "png")])
    found = faults_of(folder)
    assert short(found) == [
        ("io", "a.tar", "", None), ("checksum", "b.tar", "", None), ("checksum", "b.tar", "n006", 6),
        ("bad_label", "b.tar", "n006", 6), ("checksum", "b.tar", "n006", 6), ("checksum", "b.tar", "", None),
    ]  # fmt: skip
    assert "it is not there" in found[0].message and "the shard calls it n008" in found[4].message
    assert "1 samples are not in the index" in found[5].message


def test_images_that_were_indexed_broken_are_undecodable_unless_decoding_is_off(tmp_path: Path) -> None:
    half = image_file(1)[:-200]
    members = [
        ("png_named.jpg", image_file(0, "PNG")), ("png_named.cls", b"0"), ("half.jpg", half), ("half.cls", b"1"),
        ("text.png", b"no image"), ("text.cls", b"2"), ("fine.webp", image_file(3, "WEBP")), ("fine.cls", b"0"),
    ]  # fmt: skip
    make_tar(tmp_path / "s.tar", members)
    index_shards(IndexRequest(shards=(str(tmp_path),)), workers=1)
    assert short(faults_of(tmp_path)) == [("undecodable", "s.tar", "half", 1), ("undecodable", "s.tar", "text", 2)]
    assert faults_of(tmp_path, decode=False) == []
    assert "truncated" in image_fault(half) and image_fault(image_file(0, "PNG")) == "" and image_fault(b"").startswith("cannot decode")


def test_samples_that_were_left_out_are_no_news(tmp_path: Path) -> None:
    make_tar(tmp_path / "s.tar", [*image_members(range(3)), ("bad.jpg", b"x"), *image_members(range(1))])
    index_shards(IndexRequest(shards=(str(tmp_path),), allow_bad=2), workers=1)
    assert faults_of(tmp_path) == []


def test_an_index_that_says_another_label_than_the_shard_is_found(folder: Path) -> None:
    """The sums of shards and index agree, and the index is wrong all the same."""
    index = ShardIndex.load(folder)
    table = index.table.copy()
    table["label"][5] = 0
    write_index(folder, index.shards, table, class_names=index.class_names, source="", license="", request=index.request)
    assert short(faults_of(folder)) == [("bad_label", "b.tar", "n005", 5)]


def test_the_summary_counts_what_is_there(folder: Path) -> None:
    index = ShardIndex.load(folder)
    summary = summarize(index)
    assert (summary.num_samples, summary.num_shards, summary.num_classes, summary.shard_samples) == (7, 2, 3, (3, 4))
    # Labels 0 1 2 0 and 1 2 0.
    assert summary.samples_by_class == {"0": 3, "1": 2, "2": 2}
    assert summary.samples_by_extension == {"jpg": 4, "png": 3}
    assert (summary.width, summary.height, summary.modes) == ((20, 20, 20), (14, 14, 14), {"RGB": 7})
    assert summary.num_bytes == sum(path.stat().st_size for path in folder.glob("*.tar"))
    text = summary_text(summary, all_classes=True)
    assert text.splitlines()[0] == f"{folder}: 7 images, 3 classes, fingerprint {index.fingerprint[:16]}"
    assert "a class      2 to 3 images, median 2" in text and text.endswith("  0  3\n  1  2\n  2  2")
    assert json.loads(summary_json(summary))["samples_by_class"] == {"0": 3, "1": 2, "2": 2}


def test_classes_that_share_a_name_are_counted_apart_and_empty_ones_told(tmp_path: Path) -> None:
    make_tar(tmp_path / "s.tar", [*image_members(range(2)), ("x.jpg", b"damaged"), ("x.cls", b"2")])
    index_shards(IndexRequest(shards=(str(tmp_path),), class_names=("crane", "kite", "crane", "owl")), workers=1)
    summary = summarize(ShardIndex.load(tmp_path))
    assert summary.samples_by_class == {"crane (0)": 1, "kite": 1, "crane (2)": 1, "owl": 0}
    assert "1 classes are empty" in summary_text(summary) and "1 of the sampled images cannot be opened" in summary_text(summary)


def test_an_index_without_samples_has_a_summary_and_a_sheet(tmp_path: Path) -> None:
    make_tar(tmp_path / "s.tar", [])
    index_shards(IndexRequest(shards=(str(tmp_path),)), workers=1)
    index = ShardIndex.load(tmp_path)
    assert "0 images, 0 classes" in summary_text(summarize(index), all_classes=True)
    assert contact_sheet(index, columns=2).size == (2 * (TILE + GAP) + GAP, TILE + CAPTION + 2 * GAP)
    assert verify_shards(tmp_path, workers=1) == [ShardReport("s.tar", 0, 10240, ())]


def test_the_sheet_shows_every_class_first_and_is_the_same_for_a_seed(digits_train: ShardIndex, tmp_path: Path) -> None:
    labels = digits_train.labels_N[sheet_samples(digits_train, 25, 0)]
    # 25 of 10 classes: two of each, and five classes once more.
    assert sorted(np.bincount(labels, minlength=10).tolist()) == [2] * 5 + [3] * 5 and labels.tolist() == sorted(labels)
    write_contact_sheet(digits_train, tmp_path / "new" / "s.png", columns=5, rows=5, seed=3)
    first = (tmp_path / "new" / "s.png").read_bytes()
    write_contact_sheet(digits_train, tmp_path / "again.png", columns=5, rows=5, seed=3)
    write_contact_sheet(digits_train, tmp_path / "other.png", columns=5, rows=5, seed=4)
    assert first == (tmp_path / "again.png").read_bytes() != (tmp_path / "other.png").read_bytes()
    sheet = Image.open(io.BytesIO(first))
    assert sheet.size == (5 * (TILE + GAP) + GAP, 5 * (TILE + CAPTION + GAP) + GAP)
    # The first tile is the first chosen digit, every pixel enlarged to 12 x 12.
    sample = sheet_samples(digits_train, 25, 3)[0]
    digit = np.asarray(Image.open(io.BytesIO(digits_train.read(sample)[0])))
    tile = np.asarray(sheet)[GAP : GAP + TILE, GAP : GAP + TILE, 0]
    assert (tile == np.kron(digit, np.ones((12, 12), dtype=np.uint8))).all()
    with pytest.raises(ShardError, match=r"end it in \.png"):
        write_contact_sheet(digits_train, tmp_path / "s.jpg")
    with pytest.raises(ShardError, match="at least 1"):
        contact_sheet(digits_train, columns=0)


def test_a_damaged_image_is_a_red_cross_and_large_ones_fit(tmp_path: Path) -> None:
    members = [("big.png", image_file(0, "PNG", (300, 150))), ("big.cls", b"0"), ("bad.png", b"x"), ("bad.cls", b"1")]
    make_tar(tmp_path / "s.tar", members)
    index_shards(IndexRequest(shards=(str(tmp_path),), class_names=("a very long class name indeed", "größe 漢")), workers=1)
    sheet = np.asarray(contact_sheet(ShardIndex.load(tmp_path), columns=2))
    assert sheet[GAP, GAP].tolist() == [255, 255, 255] and sheet[GAP + TILE // 2, GAP + 1].tolist() != [255, 255, 255]
    left = GAP + TILE + GAP
    assert sheet[GAP + TILE // 2, left + TILE // 2].tolist() == [200, 60, 60]
