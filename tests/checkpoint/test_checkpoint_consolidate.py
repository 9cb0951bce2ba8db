"""A checkpoint as one canonical file, or as shards with an index, read back by the safetensors package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from m2mkd_ds.checkpoint.state.consolidate import consolidate, parse_bytes
from m2mkd_ds.checkpoint.store import StoreError, read_metadata, save_weights
from tests.checkpoint.checkpoint_maker import KINDS, State, make_checkpoint, make_state

SHARED = {"blocks.0.moe.router.balance_bias": torch.arange(4.0), "calls": torch.tensor(9)}
CLUSTERS = [(1, 1, 1), (2, 2, 2), (1, 3, 3)]


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return set(left) == set(right) and all(torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left)


def wanted(state: State, what: str) -> dict[str, Tensor]:
    if what != "all":
        return state["ema" if what == "ema" else "master"] | SHARED
    beside = {f"{kind}/{name}": value for kind in KINDS[1:] for name, value in state[kind].items()}
    return state["master"] | SHARED | beside | {"scalar/step": torch.tensor(7.0)}


@pytest.mark.parametrize("what", ["weights", "ema", "all"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_one_file_holds_the_whole_tensors_under_their_own_names(tmp_path: Path, cluster: tuple[int, int, int], what: str) -> None:
    state = make_state()
    folder = make_checkpoint(tmp_path / "step-00000007", state, ep_size=cluster[0], data_size=cluster[1], zero_stage=cluster[2])
    done = consolidate(folder, tmp_path / "out.safetensors", what=what)  # type: ignore[arg-type]
    assert same(load_file(tmp_path / "out.safetensors"), wanted(state, what))
    assert done.files == (tmp_path / "out.safetensors",) and done.step == 7 and done.tensors == len(wanted(state, what))
    metadata = read_metadata(tmp_path / "out.safetensors")
    assert metadata["step"] == "7" and metadata["what"] == what and json.loads(metadata["record"])["fingerprint"] == "f"
    # The same tensors and metadata, written whole by the other writer: the same bytes.
    save_weights(tmp_path / "whole.safetensors", wanted(state, what), metadata)
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_shards_stay_under_the_limit_and_the_index_knows_where_all_is(tmp_path: Path) -> None:
    state = make_state()
    folder = make_checkpoint(tmp_path / "step-00000007", state, ep_size=2, data_size=1)
    # The largest tensor has 4 * 7 * 5 elements, 560 bytes; a limit of 400 gives it a shard of its own.
    done = consolidate(folder, tmp_path / "out.safetensors", what="all", max_shard_bytes=400)
    index = json.loads((tmp_path / "out.safetensors.index.json").read_text())
    assert done.files[-1].name == "out.safetensors.index.json" and index["metadata"] == {"total_size": done.bytes}
    count = len(done.files) - 1
    assert [f.name for f in done.files[:-1]] == [f"out-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] and count > 4
    joined: dict[str, Tensor] = {}
    for file in done.files[:-1]:
        shard = load_file(file)
        assert not set(shard) & set(joined) and all(index["weight_map"][name] == file.name for name in shard)
        assert sum(value.nbytes for value in shard.values()) <= 400 or len(shard) == 1
        joined |= shard
    assert same(joined, wanted(state, "all"))
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["step-00000007", *(f.name for f in done.files)])


def test_shards_are_filled_in_the_order_of_the_module(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=1)
    done = consolidate(folder, tmp_path / "out.safetensors", max_shard_bytes=400)
    # Bytes: cls_token 20 + qkv 300 | up_proj 560, alone | up_proj_bias 112 + router 80 + head 60 + 12 + balance_bias 16 + calls 8 = 288.
    assert [sum(value.nbytes for value in load_file(file).values()) for file in done.files[:-1]] == [320, 560, 288]


def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=1)
    with pytest.raises(StoreError, match="must end in .safetensors"):
        consolidate(folder, tmp_path / "out.pt")
    with pytest.raises(StoreError, match="there is no folder .*nowhere; make it"):
        consolidate(folder, tmp_path / "nowhere" / "out.safetensors")
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(StoreError, match="there.safetensors: exists already"):
        consolidate(folder, tmp_path / "there.safetensors")
    (tmp_path / "x.safetensors.index.json").write_text("mine")
    with pytest.raises(StoreError, match="x.safetensors.index.json: exists already"):
        consolidate(folder, tmp_path / "x.safetensors")
    path = folder / "engine_rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError, match="engine_rank_00000.safetensors: damaged"):
        consolidate(folder, tmp_path / "out.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000007", "there.safetensors", "x.safetensors.index.json"]


def test_sizes_are_read_with_their_units() -> None:
    assert [parse_bytes(t) for t in ("2GB", "500MiB", "1.5 kb", "77")] == [2 * 10**9, 500 * 2**20, 1500, 77]
    for wrong in ("GB", "2 TBs", "-1GB", "0", "2GB2"):
        with pytest.raises(ValueError, match="allowed is a number with a unit"):
            parse_bytes(wrong)
