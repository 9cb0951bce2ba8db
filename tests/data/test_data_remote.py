"""Facts of data sets that lie elsewhere: the index is fetched once and checked, and training sees the very same batches."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import ImageBatch, TrainLoader, check_data
from m2mkd_ds.data.shard_files import Access
from tests.data.faulty_server import FaultyServer, flipped, redirect, serving, slow, stall, status

AUGMENT = AugmentConfig(crop_scale=(0.5, 1.0), auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.5, mixup=0.8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


@pytest.fixture
def server(digits_folder: Path) -> Iterator[FaultyServer]:
    with serving(digits_folder) as server:
        yield server


def copied(digits_folder: Path, tmp_path: Path) -> Path:
    """The training folder, to be changed."""
    return shutil.copytree(digits_folder / "train", tmp_path / "copy" / "train")


def set_base(folder: Path, base: str) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base": base}))


def batches(train: str, *, num_workers: int = 0, cache_dir: str = "") -> list[ImageBatch]:
    data = DataConfig(
        train=train, num_classes=10, image_size=16, num_workers=num_workers, augment=AUGMENT, cache_dir=cache_dir, io_deadline_s=20.0
    )  # fmt: skip
    index = ShardIndex.load(data.train, Access.from_config(data))
    return list(TrainLoader(index, data, seed=5, micro_batch_size=8, accumulation=1, rank=0, world=1, start_step=0, total_steps=6))


@pytest.fixture(scope="module")
def local_batches(digits_folder: Path) -> list[ImageBatch]:
    return batches(str(digits_folder / "train"))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cached", [False, True], ids=["ranges", "cache"])
def test_batches_over_http_are_those_of_the_local_folder(
    server: FaultyServer, local_batches: list[ImageBatch], tmp_path: Path, num_workers: int, cached: bool
) -> None:
    remote = batches(f"{server.url}/train", num_workers=num_workers, cache_dir=str(tmp_path / "c") if cached else "")
    assert len(remote) == len(local_batches) == 6
    for ours, theirs in zip(remote, local_batches, strict=True):
        for field in (field for field in dataclasses.fields(ImageBatch) if field.name != "wait_s"):
            left, right = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right
    # The index was fetched by the main process only.
    assert (server.asked("index.json"), server.asked("index.npy")) == (1, 1)
    if cached:
        num_shards = len(list((server.folder / "train").glob("*.tar")))
        fetched = [path for path, headers in server.requests if path.endswith(".tar") and "Range" not in headers]
        assert len(fetched) == len(set(fetched)) <= num_shards
        assert len(set(fetched)) > 1


def test_every_sample_is_the_same_over_http(server: FaultyServer, digits_train: ShardIndex) -> None:
    remote = ShardIndex.load(f"{server.url}/train")
    assert remote.fingerprint == digits_train.fingerprint
    assert remote.class_names == digits_train.class_names
    for sample in np.linspace(0, len(digits_train) - 1, 40).astype(int):
        assert remote.read(int(sample)) == digits_train.read(int(sample))
    assert remote.describe(0).startswith(f"shard {server.url}/train/shard-000000.tar, key ")


def test_loading_asks_for_the_index_once_and_for_one_shard(server: FaultyServer) -> None:
    ShardIndex.load(f"{server.url}/train")
    assert [path.rpartition("/")[2] for path, _ in server.requests] == ["index.json", "index.npy", "shard-000000.tar"]
    ShardIndex.load(f"{server.url}/train")  # index.json may have changed, the table of the same index has not
    assert [path.rpartition("/")[2] for path, _ in server.requests[3:]] == ["index.json", "shard-000000.tar"]


def test_another_process_loads_from_the_copy(server: FaultyServer) -> None:
    index = ShardIndex.load(f"{server.url}/train")
    travels = pickle.dumps(index)
    assert len(travels) < 1000
    server.requests.clear()
    again = pickle.loads(travels)
    assert server.requests == []
    assert again.read(3) == index.read(3)
    shutil.rmtree(index.folder)
    assert pickle.loads(travels).read(3) == index.read(3)  # a cleared cache folder is filled again


def test_a_changed_source_is_seen_by_the_next_process(digits_folder: Path, tmp_path: Path) -> None:
    folder = copied(digits_folder, tmp_path)
    with serving(folder) as server:
        index = ShardIndex.load(server.url)
        travels = pickle.dumps(index)
        shutil.rmtree(index.folder)
        for name in ("index.json", "index.npy"):
            shutil.copy(digits_folder / "validation" / name, folder / name)
        shutil.copy(digits_folder / "validation" / "shard-000000.tar", folder)
        with pytest.raises(ShardError, match="the run began with"):
            pickle.loads(travels)


def test_a_table_that_arrives_damaged_is_fetched_again(server: FaultyServer) -> None:
    server.only, server.faults = "index.npy", [flipped(1000)]
    assert len(ShardIndex.load(f"{server.url}/train")) > 1000
    assert server.asked("index.npy") == 2


def test_a_local_copy_of_the_table_that_was_damaged_is_fetched_again(server: FaultyServer) -> None:
    index = ShardIndex.load(f"{server.url}/train")
    table = index.folder / "index.npy"
    good = table.read_bytes()
    table.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    again = ShardIndex.load(f"{server.url}/train")
    assert again.read(3) == index.read(3)
    assert table.read_bytes() == good
    assert server.asked("index.npy") == 2


def test_a_cached_shard_that_was_damaged_on_this_disk_is_fetched_again(server: FaultyServer, tmp_path: Path) -> None:
    url, access = f"{server.url}/train", Access(cache_dir=str(tmp_path / "c"), deadline_s=20.0)
    first = ShardIndex.load(url, access).read(0)
    (copy,) = (tmp_path / "c" / "shards").rglob("*.tar")
    good = copy.read_bytes()
    copy.write_bytes(bytes(len(good)))
    server.requests.clear()
    index = ShardIndex.load(url, access)
    assert index.read(0) == first
    assert copy.read_bytes() == good
    assert server.asked("shard-000000.tar") == 2  # the look at its size, and the shard
    # Once only: what is damaged again and again is the disk.
    copy.write_bytes(bytes(len(good)))
    with pytest.raises(SampleError, match="crc32 differs") as caught:
        index.read(0)
    assert caught.value.kind == "checksum"
    assert server.asked("shard-000000.tar") == 2


def test_a_table_that_stays_damaged_is_an_error_and_not_kept(server: FaultyServer, tmp_path: Path) -> None:
    server.only, server.always = "index.npy", flipped(1000)
    with pytest.raises(ShardError, match=r"index\.npy: other bytes came .* twice"):
        ShardIndex.load(f"{server.url}/train")
    assert [path.name for path in (tmp_path / "xdg").rglob("*") if path.is_file()] == ["lock"]


def test_no_index_is_a_clear_error(server: FaultyServer, digits_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"nowhere/index\.json: HTTP 404"):
        ShardIndex.load(f"{server.url}/nowhere")
    folder = tmp_path / "odd"
    folder.mkdir()
    with serving(folder) as odd:
        (folder / "index.json").write_text("<html>log in first</html>")
        with pytest.raises(ShardError, match="is not JSON but begins with b'<html>"):
            ShardIndex.load(odd.url)
        (folder / "index.json").write_text('{"fingerprint": "../../x", "table_sha256": "y"}')
        with pytest.raises(ShardError, match="has no fingerprint, so it is no index"):
            ShardIndex.load(odd.url)
        (folder / "index.json").write_text("[]")
        with pytest.raises(ShardError, match="has no fingerprint"):
            ShardIndex.load(odd.url)


def test_a_slow_index_is_waited_for_and_a_silent_one_is_not(server: FaultyServer) -> None:
    server.faults = [slow(0.5)]
    ShardIndex.load(f"{server.url}/train", Access(deadline_s=8.0))
    server.only, server.always = "index.json", stall(2.0, 10)
    with pytest.raises(SampleError, match=r"index\.json: .*given up") as caught:
        ShardIndex.load(f"{server.url}/train", Access(deadline_s=0.6))
    assert caught.value.kind == "io"


def test_a_server_without_range_needs_a_cache(server: FaultyServer, tmp_path: Path, digits_train: ShardIndex) -> None:
    server.ranges = False
    with pytest.raises(ShardError, match=r"shard-000000\.tar: the server ignores Range .* set data\.cache_dir"):
        ShardIndex.load(f"{server.url}/train")
    cached = ShardIndex.load(f"{server.url}/train", Access(cache_dir=str(tmp_path / "c")))
    assert cached.read(7) == digits_train.read(7)


def test_a_shard_of_another_size_is_seen(digits_folder: Path, tmp_path: Path) -> None:
    folder = copied(digits_folder, tmp_path)
    with serving(folder) as server:
        with (folder / "shard-000001.tar").open("ab") as file:
            file.write(bytes(512))
        index = ShardIndex.load(server.url)  # the first is right
        late = int(np.flatnonzero(index.table["shard"] == 1)[0])
        with pytest.raises(ShardError, match=r"shard-000001\.tar: has \d+ bytes, the index says"):
            index.read(late)
        with (folder / "shard-000000.tar").open("ab") as file:
            file.write(bytes(512))
        with pytest.raises(ShardError, match=r"shard-000000\.tar: has \d+ bytes, the index says"):
            ShardIndex.load(server.url)


def test_a_local_index_of_shards_elsewhere(server: FaultyServer, digits_folder: Path, tmp_path: Path, digits_train: ShardIndex) -> None:
    folder = tmp_path / "index only"
    folder.mkdir()
    for name in ("index.json", "index.npy"):
        shutil.copy(digits_folder / "train" / name, folder)
    for base, access in [
        (f"{server.url}/train", Access()),
        (str(digits_folder / "train"), Access()),
        (f"file://{digits_folder}/train", Access()),
        (f"pipe:cat {digits_folder}/train", Access(allow_pipe=True, cache_dir=str(tmp_path / "c"))),
    ]:
        set_base(folder, base)
        index = ShardIndex.load(folder, access)
        assert index.read(11) == digits_train.read(11)
        assert pickle.loads(pickle.dumps(index)).read(12) == digits_train.read(12)
    with pytest.raises(ShardError, match="set data.allow_pipe"):
        ShardIndex.load(folder)


def test_an_index_from_elsewhere_cannot_name_local_files(digits_folder: Path, tmp_path: Path) -> None:
    folder = copied(digits_folder, tmp_path)
    set_base(folder, str(digits_folder / "train"))
    with serving(folder) as server, pytest.raises(ShardError, match="may not name a folder or a command of this machine"):
        ShardIndex.load(server.url)


def test_an_index_from_elsewhere_cannot_send_the_token_elsewhere(
    server: FaultyServer, digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("M2MKD_HTTP_TOKEN", "s3cr3t")
    folder = copied(digits_folder, tmp_path)
    set_base(folder, f"{server.url}/train")
    with serving(folder) as named:
        ShardIndex.load(named.url).read(0)
        assert {headers.get("Authorization") for _, headers in named.requests} == {"Bearer s3cr3t"}
    assert {headers.get("Authorization") for _, headers in server.requests} == {None}
    # The same address named by the user's own index gets it.
    server.requests.clear()
    ShardIndex.load(folder).read(0)
    assert {headers.get("Authorization") for _, headers in server.requests} == {"Bearer s3cr3t"}
    texts = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"s3cr3t" in text for text in texts)


def test_check_data_reads_addresses(server: FaultyServer) -> None:
    data = DataConfig(train=f"{server.url}/train", validation=f"{server.url}/validation", num_classes=10, io_deadline_s=5.0)
    train, validation = check_data(data)
    assert train.num_classes == validation.num_classes == 10
    assert len(train) > len(validation)


def test_a_sample_that_cannot_be_had_is_an_io_fault(server: FaultyServer) -> None:
    index = ShardIndex.load(f"{server.url}/train", Access(deadline_s=0.6))
    server.always = status(503)
    with pytest.raises(SampleError, match=r"shard-000000\.tar: HTTP 503") as caught:
        index.read(0)
    assert caught.value.kind == "io"
    server.always = redirect("file:///etc")
    with pytest.raises(ShardError, match="no http address"):
        index.read(0)
