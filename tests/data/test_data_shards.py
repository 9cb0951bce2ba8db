"""Facts of shards and index: deterministic, readable by plain webdataset, damaged folders refused by name."""

from __future__ import annotations

import io
import json
import pickle
import resource
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shard_files import MAX_OPEN_SHARDS
from m2mkd_ds.data.shards.scan import scan_shard
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.samples import Sample

Samples = list[tuple[bytes, str, int, str]]


def some_samples(count: int) -> Samples:
    """Not images: writer and index do not look inside."""
    random = np.random.default_rng(count)
    return [
        (random.bytes(int(random.integers(0, 2000))), ("jpg", "png")[i % 2], int(random.integers(0, 3)), f"dir/k{i:04d}")
        for i in range(count)
    ]


def write(samples: Samples, out: Path, per_shard: int = 7, seed: int = 0, content: str = "c") -> ShardIndex:
    names = ("cat", "dog", "eel")
    return write_shards(
        samples,
        out,
        total=len(samples),
        class_names=names,
        source="test",
        license="MIT",
        samples_per_shard=per_shard,
        seed=seed,
        content=content,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete folder of 20 samples in 3 shards, free to be damaged."""
    write(some_samples(20), tmp_path / "shards")
    return tmp_path / "shards"


def test_plain_webdataset_reads_the_same_samples_in_the_same_order(folder: Path) -> None:
    index = ShardIndex.load(folder)
    urls = [str(folder / shard.name) for shard in index.shards]
    theirs = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(theirs) == len(index) == 20
    for number, sample in enumerate(theirs):
        image, label, key = index.read(number)
        assert key == sample["__key__"]
        assert image == sample.get("jpg", sample.get("png"))
        assert label == int(sample["cls"]) == index.labels_N[number] == json.loads(sample["json"])["label"]
    assert {key: (image, label) for image, label, key in (index.read(i) for i in range(20))} == {
        key: (image, label) for image, _, label, key in some_samples(20)
    }


def test_equal_input_gives_equal_bytes_and_the_seed_shuffles(tmp_path: Path) -> None:
    first, again, other = (write(some_samples(30), tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    # The lists for other readers call the set by its folder's name; these say what is in it.
    for path in sorted([*first.folder.glob("*.tar"), *first.folder.glob("index.*")]):
        assert path.read_bytes() == (again.folder / path.name).read_bytes(), path.name
    keys = [[index.read(i)[2] for i in range(30)] for index in (first, other)]
    assert sorted(keys[0]) == sorted(keys[1])
    assert keys[0] != keys[1]
    assert keys[0] != sorted(keys[0])


def test_shard_sizes_and_counts(tmp_path: Path) -> None:
    index = write(some_samples(20), tmp_path / "x", per_shard=7)
    assert [shard.num_samples for shard in index.shards] == [7, 7, 6]
    assert (index.num_samples, index.num_classes, index.class_names) == (20, 3, ("cat", "dog", "eel"))
    assert (index.source, index.license) == ("test", "MIT")
    assert sorted(path.name for path in index.folder.iterdir()) == [
        "_info.json",
        "index.json",
        "index.npy",
        "shard-000000.tar",
        "shard-000001.tar",
        "shard-000002.tar",
        "wids.json",
    ]
    assert len(write([], tmp_path / "empty")) == 0


def test_complete_folder_is_kept_and_another_request_is_refused(folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    write(some_samples(20), folder)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ShardError, match="differ in samples_per_shard, seed; remove the folder"):
        write(some_samples(20), folder, per_shard=8, seed=4)
    with pytest.raises(ShardError, match="differ in content; remove"):
        write(some_samples(20), folder, content="other")


def test_unfinished_folder_is_written_anew(folder: Path) -> None:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    request = json.loads(whole["index.json"])["request"]
    for begun_for in (request, {**request, "seed": 5}):  # kept and gone on with; begun anew
        (folder / "index.json").unlink()
        (folder / "writing.json").write_text(json.dumps(begun_for, indent=1, sort_keys=True))
        (folder / "shard-000000.tar").write_bytes(whole["shard-000000.tar"][:3000])
        (folder / "shard-000001.tar").write_bytes(whole["shard-000002.tar"])  # whole, with 6 samples instead of 7
        (folder / "shard-000001.tar.77.tmp").write_bytes(b"half")
        (folder / "shard-000009.tar").write_bytes(b"stale")
        write(some_samples(20), folder)
        assert whole == {path.name: path.read_bytes() for path in folder.iterdir()}


def damage_truncate(folder: Path) -> None:
    path = folder / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1000])


def damage_edit(folder: Path) -> None:
    path = folder / "index.json"
    path.write_text(path.read_text().replace("eel", "eal"))


def damage_table(folder: Path) -> None:
    path = folder / "index.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (damage_truncate, r"shard-000001.tar: has \d+ bytes, the index says \d+; it is truncated"),
    (damage_edit, "does not match its fingerprint"),
    (damage_table, "index.npy: its sha256 is not the one in index.json"),
    (lambda folder: (folder / "shard-000002.tar").unlink(), r"shard-000002.tar: shard is missing \(3 are indexed\)"),
    (lambda folder: (folder / "index.npy").unlink(), "index.npy: no such file, but index.json is there"),
    (lambda folder: (folder / "index.json").unlink(), "holds no complete shards"),
    (lambda folder: (folder / "index.json").write_text("{"), "not JSON"),
    (lambda folder: (folder / "index.json").write_text('{"format": "x"}'), "lacks class_names"),
    (lambda folder: (folder / "index.json").write_text("[]"), "lacks format"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_folder_is_refused_when_loaded(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    ShardIndex.load(folder)
    damage(folder)
    with pytest.raises(ShardError, match=message):
        ShardIndex.load(folder)


def test_flipped_byte_is_found_when_the_sample_is_read(folder: Path) -> None:
    index = ShardIndex.load(folder)
    samples = {key: image for image, _, _, key in some_samples(20)}
    number = next(i for i in range(20) if len(index.read(i)[0]) > 100)
    key = index.read(number)[2]
    path = next(p for p in sorted(folder.glob("*.tar")) if samples[key] in p.read_bytes())
    data = bytearray(path.read_bytes())
    data[data.index(samples[key]) + 50] ^= 1
    path.write_bytes(data)
    with pytest.raises(SampleError, match=f"{path.name}, key {key}, sample {number}: the shard holds other bytes than were indexed"):
        ShardIndex.load(folder).read(number)
    with pytest.raises(IndexError, match="samples 0 to 19"):
        index.read(20)


def test_index_travels_by_path_and_notices_other_data(folder: Path) -> None:
    index = ShardIndex.load(folder)
    index.read(3)
    message = pickle.dumps(index)
    assert len(message) < 1000
    assert pickle.loads(message).read(3) == index.read(3)
    shutil.rmtree(folder)
    write(some_samples(20), folder, seed=9)
    with pytest.raises(ShardError, match="the shards were rewritten"):
        pickle.loads(message)


def test_threads_read_right_while_open_shards_are_evicted(tmp_path: Path) -> None:
    samples = some_samples(MAX_OPEN_SHARDS + 40)
    index = write(samples, tmp_path / "many", per_shard=1)
    expected = {key: image for image, _, _, key in samples}
    wrong: list[str] = []

    def read_all(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(len(index)):
            image, _, key = index.read(int(number))
            if image != expected[key]:
                wrong.append(key)

    threads = [threading.Thread(target=read_all, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(index.files._open) == MAX_OPEN_SHARDS


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((b"", "png", 0, "k0000.x"), "the key must be unique"),
        ((b"", "png", 0, "dir/k0001"), "the key must be unique"),
        ((b"", "gif", 0, "new"), "extension is 'gif'; allowed is jpg, jpeg, png, webp"),
        ((b"", "png", 3, "new"), "label is 3; there are 3 classes"),
    ],
)
def test_bad_samples_are_refused_and_leave_no_complete_folder(tmp_path: Path, bad: tuple[bytes, str, int, str], message: str) -> None:
    with pytest.raises(ShardError, match=message):
        write([*some_samples(5), bad], tmp_path / "x")
    # writing.json says what was begun, so that the folder is known to be ours.
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["writing.json"]


def test_total_must_be_the_number_of_samples(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="total is 6, but there are 5 samples"):
        write_shards(some_samples(5), tmp_path / "x", total=6, class_names=("a",), source="s", license="MIT")


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_scan_reads_foreign_shards_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    make_tar(path, [("a/n01.JPEG", b"xyz"), ("a/n01.cls", b"7\n"), ("a/n02.cls", b"1"), ("a/n02.png", b"")])
    record, rows = scan_shard(path)
    assert record.num_samples == 2
    # The first header takes 512 bytes. crc32(b"xyz") is 0xeb8eba67 (any CRC-32 calculator).
    assert rows[0] == (512, 3, 7, 0xEB8EBA67, "a/n01", "jpeg")
    assert rows[1][1:] == (0, 1, 0, "a/n02", "png")
    broken: list[tuple[list[tuple[str, bytes]], str]] = [
        ([("a.png", b"1")], r"sample a has members \['png'\]; needed are cls"),
        ([("a.png", b"1"), ("a.jpg", b"1"), ("a.cls", b"1")], "one of jpg, jpeg, png"),
        ([("a.png", b"1"), ("a.cls", b"x")], "its label b'x' is not a number"),
        ([("a.png", b"1"), ("a.cls", b"1"), ("b.cls", b"1"), ("b.png", b""), ("a.png", b"1"), ("a.cls", b"1")], "key a comes twice"),
    ]
    for members, message in broken:
        make_tar(path, members)
        with pytest.raises(ShardError, match=message):
            scan_shard(path)
    make_tar(path, [("a.cls", b"1"), ("a.png", b"1" * 5000)])
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ShardError, match="not a complete tar file"):
        scan_shard(path)


def test_full_disk_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    # A file-size limit fails in write(2) just as a full disk does.
    samples: Samples = [(b"\0" * 50_000, "png", 0, f"k{i}") for i in range(10)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(OSError, match="nothing was left under this name"):
            write(samples, tmp_path / "x", per_shard=10)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["writing.json"]


def test_atomic_file_keeps_the_old_file_when_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), AtomicFile(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    with AtomicFile(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_samples_are_named_tuples_too(tmp_path: Path) -> None:
    index = write([Sample(b"x", "png", 1, "k")], tmp_path / "x")
    assert index.read(0) == (b"x", 1, "k")
