"""Weights and JSON files: whole or not there, equal content in equal bytes, slices, full disks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from m2mkd_ds.checkpoint.store import (
    StoreError,
    file_sha256,
    read_json,
    read_metadata,
    read_weights,
    save_weights,
    weight_shapes,
    write_json_atomic,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in which no file can hold 64 KiB: a tiny file system where we may mount one, else a limit on file sizes."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True).returncode == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def some_weights() -> dict[str, torch.Tensor]:
    return {
        "blocks.10.norm1.weight": torch.tensor([1.5, -0.0, math.inf, math.nan]),
        "blocks.2.moe.router.weight": torch.arange(6).reshape(2, 3).to(torch.bfloat16),
        "blocks.2.mlp.fc1.weight": torch.arange(12.0).reshape(3, 4),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 3),
    }


def test_round_trip_is_exact_in_bits_dtype_and_shape(tmp_path: Path) -> None:
    path, weights = tmp_path / "w.safetensors", some_weights()
    digest = save_weights(path, weights, {"recipe": "tiny", "commit": "abc"})
    back = read_weights(path)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert back[name].dtype == tensor.dtype and back[name].shape == tensor.shape
        assert torch.equal(back[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
    assert read_metadata(path) == {"recipe": "tiny", "commit": "abc"}
    assert weight_shapes(path)["blocks.2.mlp.fc1.weight"] == (3, 4) and weight_shapes(path)["steps"] == ()
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    assert [item.name for item in tmp_path.iterdir()] == ["w.safetensors"]


def test_equal_content_has_equal_bytes_in_another_process_and_order(tmp_path: Path) -> None:
    metadata = {str(i): "x" * i for i in range(8)}
    digest = save_weights(tmp_path / "a", {"b": torch.ones(3), "a": torch.zeros(2)}, metadata)
    code = (
        "import sys, torch; from m2mkd_ds.checkpoint.store import save_weights; m = {str(i): 'x' * i for i in reversed(range(8))};"
        "print(save_weights(sys.argv[1], {'a': torch.zeros(2), 'b': torch.ones(3)}, m))"
    )
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digest


def test_views_strides_and_shared_storage_are_stored_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_weights(tmp_path / "w", {"row": base[1], "turned": base.T, "same": base, "again": base, "spread": torch.ones(1).expand(5)})
    back = read_weights(tmp_path / "w")
    assert back["row"].tolist() == [4.0, 5.0, 6.0, 7.0] and back["turned"].tolist() == base.T.tolist()
    assert torch.equal(back["same"], base) and torch.equal(back["again"], base) and back["spread"].tolist() == [1.0] * 5


def test_a_new_file_takes_the_place_of_the_old_one_at_once(tmp_path: Path) -> None:
    path, record = tmp_path / "w", tmp_path / "r"
    save_weights(path, {"a": torch.zeros(1000)})
    write_json_atomic(record, {"old": 1})
    # Who has the old file open keeps all of it: the new one was renamed over it, not written into it.
    with path.open("rb") as weights, record.open("rb") as text:
        before = path.read_bytes(), record.read_bytes()
        save_weights(path, {"a": torch.ones(1000)})
        write_json_atomic(record, {"new": 2})
        assert (weights.read(), text.read()) == before
    assert read_weights(path)["a"].sum() == 1000 and read_json(record) == {"new": 2}


def test_slices_read_only_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_weights(path, {"big": torch.zeros(1 << 20), "small": torch.arange(3.0)})
    # The header says where `big` lies; with its bytes cut out of the disk (a hole) `small` still reads.
    raw = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", raw[:8])
    begin, end = json.loads(raw[8 : 8 + header_bytes])["big"]["data_offsets"]
    start = 8 + header_bytes
    path.write_bytes(raw[: start + begin] + b"\xff" * (end - begin) + raw[start + end :])
    assert read_weights(path, ["small"])["small"].tolist() == [0.0, 1.0, 2.0]
    assert list(read_weights(path, ["small"])) == ["small"] and read_weights(path, []) == {}


def test_wrong_name_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(StoreError, match=r"w\.safetensors: no such weights file"):
        read_weights(path)
    save_weights(path, {"blocks.0.norm1.weight": torch.zeros(1000)})
    with pytest.raises(StoreError, match=r"no tensor blocks\.0\.norm.weight and 1 more; the nearest of its 1 names is blocks\.0\.norm1"):
        read_weights(path, ["blocks.0.norm.weight", "head.bias"])
    path.write_bytes(path.read_bytes()[:2000])
    for read in (read_weights, weight_shapes, read_metadata):
        with pytest.raises(StoreError, match=r"w\.safetensors: damaged"):
            read(path)
    path.write_bytes(b"\x80\x04 not weights at all")
    with pytest.raises(StoreError, match="damaged or not a safetensors file"):
        read_weights(path)


def test_file_rights_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        save_weights(tmp_path / "w", {"a": torch.zeros(1)})
        write_json_atomic(tmp_path / "j", {})
    finally:
        os.umask(old)
    assert (tmp_path / "w").stat().st_mode & 0o777 == (tmp_path / "j").stat().st_mode & 0o777 == 0o640


def test_full_disk_keeps_the_old_file_and_leaves_nothing_else(small_disk: Path) -> None:
    path, record = small_disk / "w.safetensors", small_disk / "r.json"
    save_weights(path, {"a": torch.arange(10.0)})
    write_json_atomic(record, {"step": 1})
    with pytest.raises(StoreError, match=r"w\.safetensors: not written .*(No space left|too large)"):
        save_weights(path, {"a": torch.zeros(1 << 16)})
    with pytest.raises(StoreError, match=r"r\.json: not written .*(No space left|too large)"):
        write_json_atomic(record, {"text": "x" * (1 << 18)})
    with pytest.raises(StoreError, match="not written"):
        save_weights(small_disk / "new.safetensors", {"a": torch.zeros(1 << 16)})
    assert read_weights(path)["a"].tolist() == list(range(10)) and read_json(record) == {"step": 1}
    assert sorted(item.name for item in small_disk.iterdir()) == ["r.json", "w.safetensors"]


def test_json_round_trip_and_its_errors(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json_atomic(path, {"b": [1, 2.5, None, "ä"], "a": {}})
    assert read_json(path) == {"b": [1, 2.5, None, "ä"], "a": {}} and path.read_text(encoding="utf-8").endswith("}\n")
    with pytest.raises(StoreError, match=r"r\.json: not written, because JSON cannot hold it"):
        write_json_atomic(path, {"loss": math.nan})
    with pytest.raises(StoreError, match="not JSON serializable"):
        write_json_atomic(path, {"path": tmp_path})
    assert read_json(path)["b"][0] == 1
    path.write_text('{"b": [1,')
    with pytest.raises(StoreError, match=r"r\.json: damaged, not JSON \(.*\)$"):  # nobody said what helps: no advice
        read_json(path)
    with pytest.raises(StoreError, match=r"r\.json: damaged, not JSON \(.*\); export it again$"):
        read_json(path, if_damaged="export it again")
    with pytest.raises(StoreError, match=r"none\.json: cannot be read"):
        read_json(tmp_path / "none.json")
    with pytest.raises(StoreError, match="not written"):
        write_json_atomic(tmp_path / "no" / "folder.json", {})
