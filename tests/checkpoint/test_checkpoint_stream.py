"""Safetensors files by pieces, against the safetensors package and hashlib."""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2mkd_ds.checkpoint.state.rank_files import RankFiles
from m2mkd_ds.checkpoint.state.safetensors_stream import TensorFile, file_order, info_of, write_stream
from m2mkd_ds.checkpoint.store import StoreError, save_weights
from tests.checkpoint.checkpoint_maker import Bomb

TYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


def tensors() -> dict[str, Tensor]:
    """Every type, a scalar, an empty tensor, odd sizes, names that need escaping."""
    made = {f"w{9 - i}": (torch.arange(6) % 2 + 1).view(2, 3).to(dtype) for i, dtype in enumerate(TYPES)}
    return made | {'quote"d.ü': torch.tensor(2.5), "empty": torch.zeros(0, 3), "odd": torch.ones(5, dtype=torch.uint8)}


def written(path: Path, held: dict[str, Tensor], piece: int) -> object:
    infos = {name: info_of(value) for name, value in held.items()}
    runs = (run for name in file_order(infos) for run in held[name].flatten().split(piece) if run.numel())
    return write_stream(path, infos, runs, json.dumps({"step": "3"}))


@pytest.mark.parametrize("piece", [1, 4, 100])
def test_a_stream_gives_the_bytes_of_the_safetensors_package(tmp_path: Path, piece: int) -> None:
    digest = save_weights(tmp_path / "whole.safetensors", tensors(), {"step": "3"})
    record = written(tmp_path / "stream.safetensors", tensors(), piece)
    data = (tmp_path / "stream.safetensors").read_bytes()
    assert data == (tmp_path / "whole.safetensors").read_bytes()
    assert record == (len(data), hashlib.sha256(data).hexdigest()) == (len(data), digest)


def test_runs_of_elements_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    written(tmp_path / "a.safetensors", tensors(), 100)
    file, whole = TensorFile(tmp_path / "a.safetensors"), load_file(tmp_path / "a.safetensors")
    for name, value in whole.items():
        assert torch.equal(file.read(name), value) and file.tensors[name] == (value.dtype, value.shape)
    assert torch.equal(file.read_run("w8", 2, 3), whole["w8"].flatten()[2:5])
    with pytest.raises(StoreError, match=r"w8 has 6 elements, and \[4, 7\) was asked for"):
        file.read_run("w8", 4, 3)


def test_pieces_that_do_not_fit_the_header_are_refused(tmp_path: Path) -> None:
    infos = {"w": info_of(torch.zeros(4))}
    for number, (runs, message) in enumerate(
        [
            ([torch.zeros(3)], "was to get 1 more elements"),
            ([torch.zeros(5)], "was to get 4 more elements"),
            ([torch.zeros(4), torch.zeros(1)], "more elements came"),
            ([torch.zeros(4, dtype=torch.int32)], "4 more elements of torch.float32, and other ones came"),
        ]
    ):
        with pytest.raises(StoreError, match=message):
            write_stream(tmp_path / f"{number}.safetensors", infos, runs, "{}")
    write_stream(tmp_path / "good.safetensors", infos, [torch.zeros(4)], "{}")
    with pytest.raises(FileExistsError):
        write_stream(tmp_path / "good.safetensors", infos, [torch.zeros(4)], "{}")


def test_a_file_cut_short_at_any_place_is_refused_or_read_right(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    written(path, {"w": torch.arange(20.0)}, 100)
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(StoreError, match="a.safetensors: damaged or not a safetensors file"):
            TensorFile(path)
    path.write_bytes(data)
    file = TensorFile(path)
    path.write_bytes(data[:-4])  # it shrinks while somebody reads it
    with pytest.raises(StoreError, match="it ends before its last tensor does"):
        file.read("w")


@pytest.mark.parametrize("writer", ["pickle", "torch"])
@pytest.mark.parametrize("name", ["engine_rank_00000.safetensors", "engine_rank_00000.pt"])
def test_a_pickle_in_a_checkpoint_is_never_unpickled(tmp_path: Path, writer: str, name: str) -> None:
    canary, folder = tmp_path / "canary", tmp_path / "step-00000007"
    folder.mkdir()
    if writer == "pickle":
        (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    else:
        torch.save({"format": 2, "x": Bomb(canary)}, folder / name)
    with pytest.raises(StoreError, match="damaged or not a safetensors file" if name.endswith(".safetensors") else "of format 2"):
        RankFiles(folder)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))  # the bomb is live
    assert canary.exists()
