"""Facts of CIFAR-100 and CUB: pixels, labels and the authors' splits from tiny files of the same form; other files are refused."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.sources import cifar100
from m2mkd_ds.data.sources.registry import encode_png, make_source


def cifar_archive(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"cifar-100-binary/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def record(coarse: int, fine: int, red: int) -> bytes:
    """Red plane of one value, green counts the rows, blue the columns."""
    rows, columns = np.meshgrid(np.arange(32), np.arange(32), indexing="ij")
    planes = [np.full((32, 32), red), rows, columns]
    return bytes([coarse, fine]) + b"".join(plane.astype(np.uint8).tobytes() for plane in planes)


NAMES = b"apple\nbee\ncan\n"
FILES = {"train.bin": record(1, 2, 10) + record(0, 1, 20) + record(9, 0, 30), "test.bin": record(5, 1, 40), "fine_label_names.txt": NAMES}


def test_cifar_records_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = cifar_archive(tmp_path / cifar100.ARCHIVE, FILES)
    monkeypatch.setattr(cifar100, "MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    train, validation = make_source("cifar100", tmp_path / "out", path=tmp_path)
    assert train.class_names == ("apple", "bee", "can")
    found = {}
    for number in range(3):
        data, label, key = train.read(number)
        pixels_HWC = np.asarray(Image.open(io.BytesIO(data)))
        assert pixels_HWC.shape == (32, 32, 3)
        assert pixels_HWC[7, 21].tolist() == [pixels_HWC[0, 0, 0], 7, 21]
        found[key] = (label, int(pixels_HWC[0, 0, 0]))
    assert found == {"train-000000": (2, 10), "train-000001": (1, 20), "train-000002": (0, 30)}
    assert validation.read(0)[1:] == (1, "test-000000")


def test_another_file_than_cifar_is_refused(tmp_path: Path) -> None:
    cifar_archive(tmp_path / cifar100.ARCHIVE, FILES)
    with pytest.raises(ShardError, match="its md5 is .*, expected 03b5dce01913d631647c71ecec9e9cb8"):
        make_source("cifar100", tmp_path / "out", path=tmp_path / cifar100.ARCHIVE)
    with pytest.raises(ShardError, match="out: no such file; cifar100 needs cifar-100-binary.tar.gz, .*the python one is a pickle"):
        make_source("cifar100", tmp_path / "out", path=tmp_path / "out")
    for files, message in (
        ({**FILES, "test.bin": record(0, 0, 0)[:-1]}, "test.bin has 3073 bytes, which is not a multiple of a record's 3074"),
        ({**FILES, "test.bin": record(0, 3, 0)}, "test.bin has label 3, but there are 3 class names"),
        ({"train.bin": b""}, "lacks test.bin, fine_label_names.txt"),
    ):
        with pytest.raises(ShardError, match=message):
            cifar100.read_cifar100(cifar_archive(tmp_path / "x.tar.gz", files))


def cub_folder(root: Path) -> dict[str, bytes]:
    """Three images of two classes; image 2 is for testing. Returns path -> bytes."""
    images = {
        "001.Black_footed_Albatross/a_0001.jpg": b"\xff\xd8one",
        "002.Laysan_Albatross/b_0002.jpg": b"\xff\xd8two",
        "002.Laysan_Albatross/b_0003.jpg": b"\xff\xd8three",
    }
    for name, data in images.items():
        (root / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / name).write_bytes(data)
    (root / "images.txt").write_text("".join(f"{i + 1} {name}\n" for i, name in enumerate(images)))
    (root / "image_class_labels.txt").write_text("1 1\n2 2\n3 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (root / "classes.txt").write_text("1 001.Black_footed_Albatross\n2 002.Laysan_Albatross\n")
    return images


def read_all(index: ShardIndex) -> list[tuple[bytes, int]]:
    return sorted(index.read(i)[:2] for i in range(len(index)))


def test_cub_folder_and_archive_give_the_authors_split(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    cub_folder(root)
    (root / "README").write_text("not needed")
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as tar:
        tar.add(root, "CUB_200_2011")
        tar.add(root / "README", "attributes.txt")
    for number, path in enumerate((root, tmp_path, tmp_path / "CUB_200_2011.tgz")):
        train, test = make_source("cub", tmp_path / f"out{number}", path=path)
        assert read_all(train) == [(b"\xff\xd8one", 0), (b"\xff\xd8three", 1)]
        assert read_all(test) == [(b"\xff\xd8two", 1)]
        assert train.class_names == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert not list((tmp_path / "out2").rglob("README"))


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("image_class_labels.txt", "1 1\n2 2\n", "image_class_labels.txt and images.txt have different image ids"),
        ("image_class_labels.txt", "1 1\n2 2\n3 3\n", "every label of image_class_labels.txt must be among them"),
        ("classes.txt", "1 a\n3 b\n", "classes must be numbered 1, 2"),
        ("images.txt", "1 001.Black_footed_Albatross/a_0001.jpg\n2 x\n3 y\n", "images/y: no such image, but images.txt lists it"),
        ("images.txt", "1 ../../secret.jpg\n2 x\n3 y\n", "secret.jpg: no such image"),
        ("train_test_split.txt", "1 1\n2\n3 1\n", "has a line '2'; expected an id and a value"),
    ],
)
def test_cub_tables_that_do_not_fit_are_refused(tmp_path: Path, file: str, text: str, message: str) -> None:
    cub_folder(tmp_path / "cub")
    (tmp_path / "secret.jpg").write_bytes(b"s")
    (tmp_path / "cub" / file).write_text(text)
    with pytest.raises(ShardError, match=message):
        make_source("cub", tmp_path / "out", path=tmp_path / "cub")
    (tmp_path / "cub" / file).unlink()
    with pytest.raises(ShardError, match=f"lacks {file}"):
        make_source("cub", tmp_path / "out", path=tmp_path / "cub")


def test_webp_files_are_taken_from_folders(tmp_path: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "WEBP")
    for part in ("train", "val"):
        (tmp_path / "set" / part / "a").mkdir(parents=True)
        (tmp_path / "set" / part / "a" / "x.WEBP").write_bytes(file.getvalue())
        (tmp_path / "set" / part / "a" / "y.png").write_bytes(encode_png(np.zeros((4, 4), np.uint8)))
    train, _ = make_source("image_folder", tmp_path / "out", path=tmp_path / "set")
    assert sorted(row["extension"].decode() for row in train.table) == ["png", "webp"]
    assert file.getvalue() in [train.read(i)[0] for i in range(2)]
