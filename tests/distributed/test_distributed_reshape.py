"""One training state moved 2 ranks -> 1 -> 4 -> 4 otherwise -> 2, by the engine and by the tool; real launches, every fact a test.

The values are compared with what DeepSpeed's own interface says the first engine held, and training with the run that never moved.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_ds.checkpoint.saves.manifest import hash_files, write_manifest
from m2mkd_ds.checkpoint.state.canonical import SHARED, CanonicalCheckpoint
from m2mkd_ds.checkpoint.state.reshard import reshard
from m2mkd_ds.distributed import world as jobs
from tests.distributed import reshape_job as job
from tests.launching import launch

KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
CHAIN = {"one": (1, 1, 1), "ep4": (4, 1, 1), "ep2dp2": (2, 2, 2), "ep2_again": (2, 1, 1)}
"""Checkpoint -> (ep, dp, ZeRO stage), in the order of the moves."""
TOOLS = ("tool_one", "tool_ep4", "tool_ep2dp2", "tool_ep2")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshape")


@pytest.fixture(scope="module")
def results(out: Path) -> dict[str, Any]:
    """The whole cycle; `tool_*` are the same moves made by the tool, from the first checkpoint on."""
    script = Path(job.__file__)
    launch(script, [str(out), "begin"], ranks=2)
    found: dict[str, Any] = torch.load(out / "begin.pt", weights_only=True)
    world = jobs.init_world(timeout_s=60)  # this process as a job of one rank, without a launcher
    with job.engine_of(world, 1) as engine:
        engine.load(out / "ep2")
        job.save(engine, world, out / "one")
        found["one"] = {"end": job.go_on(engine, world)}
    jobs.shutdown()
    write_manifest(out / "ep2", job.SAVED_AT, {"step": job.SAVED_AT}, attempt="a", files=hash_files(out / "ep2"))
    source = out / "ep2"
    for target, (ep, dp, zero) in CHAIN.items():
        source = reshard(source, out / f"tool_{target.removesuffix('_again')}", ep_size=ep, data_size=dp, zero_stage=zero).out
    for part, ranks in (("four", 4), ("back", 2)):
        launch(script, [str(out), part], ranks=ranks)
        found |= torch.load(out / f"{part}.pt", weights_only=True)
    return found


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference; names and shapes must agree. By torch's max, which passes NaN on (Python's does not)."""
    assert {k: v.shape for k, v in left.items()} == {k: v.shape for k, v in right.items()}
    return float(torch.stack([(left[k] - right[k]).abs().max() for k in left]).max())


def files_of(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("engine_rank_*"))}


@pytest.mark.parametrize(
    "name", ["ep2", "zero1", *CHAIN, "zero12", "zero123", "zero1231", "tool_one", "tool_ep4", "tool_ep2dp2", "tool_ep2"]
)
def test_every_checkpoint_holds_bit_for_bit_what_the_first_engine_held(results: dict[str, Any], out: Path, name: str) -> None:
    first = results["zero1" if name.startswith("zero") else "ep2"]
    read = CanonicalCheckpoint(out / name)
    assert read.kinds == KINDS
    for kind in KINDS:
        for key in read.tensors:
            assert torch.equal(read.read(kind, key), first["truth"][kind][key]), (kind, key)
    assert set(read.tensors) == set(first["truth"]["master"]) and float(read.scalars["step"]) >= job.SAVED_AT
    assert worst({k: read.read("exp_avg", k) for k in read.tensors}, {k: torch.zeros(s) for k, s in read.tensors.items()}) > 1e-4
    biases = {key: read.read(SHARED, key) for key in read.shared if key.endswith("balance_bias")}
    assert len(biases) == 2 and worst(biases, {key: first["middle"][key] for key in biases}) == 0.0
    assert torch.equal(biases["blocks.1.moe.router.balance_bias"], torch.tensor([0.01, -0.02, 0.03, 0.0]) * 2)


@pytest.mark.parametrize("name", CHAIN)
def test_the_tool_writes_the_very_files_that_the_engine_writes(results: dict[str, Any], out: Path, name: str) -> None:
    assert files_of(out / f"tool_{name.removesuffix('_again')}") == files_of(out / name)


def test_the_cycle_ends_with_the_bytes_that_it_began_with(results: dict[str, Any], out: Path) -> None:
    assert files_of(out / "ep2_again") == files_of(out / "ep2_of_tool") == files_of(out / "ep2") and len(files_of(out / "ep2")) == 2


def test_the_tool_cuts_zero_3_as_the_engine_does(results: dict[str, Any], out: Path, tmp_path: Path) -> None:
    write_manifest(out / "zero1", job.SAVED_AT, {}, attempt="a", files=hash_files(out / "zero1"))
    assert files_of(reshard(out / "zero1", tmp_path / "three", ep_size=1, data_size=2, zero_stage=3).out) == files_of(out / "zero123")


@pytest.mark.parametrize("name", ["one", "ep4", "ep2dp2", "ep2_again", "ep2_of_tool"])
def test_training_after_a_move_is_that_of_the_run_that_never_moved(results: dict[str, Any], name: str) -> None:
    stayed = results["ep2"]
    assert worst(results[name]["end"], stayed["end"]) <= (0.0 if name.startswith("ep2_") else 1e-6)
    assert worst(stayed["end"], stayed["middle"]) > 1e-3  # and it went somewhere


@pytest.mark.parametrize("name", ["zero12", "zero123", "zero1231"])
def test_training_on_another_zero_stage_is_that_of_the_first(results: dict[str, Any], name: str) -> None:
    assert worst(results[name]["end"], results["zero1"]["end"]) <= 1e-6


def test_a_rank_reads_only_files_that_hold_something_of_its_share(results: dict[str, Any], out: Path, tmp_path: Path) -> None:
    # One rank of ep 2 on 2 ranks, same shape: nothing of rank 1's file is opened for rank 0.
    (tmp_path / "engine_rank_00000.safetensors").write_bytes((out / "ep2" / "engine_rank_00000.safetensors").read_bytes())
    from m2mkd_ds.checkpoint.state.rank_files import RankFiles

    files = RankFiles(tmp_path)
    for group in files.description.groups:
        assert sum(run.numel() for _, run in files.runs_held("master", group.at(0))) > 0
    with pytest.raises(ValueError, match="engine_rank_00001.safetensors: this file of the checkpoint is missing"):
        files.check_held(files.description.groups[0].at(1))


def test_a_snapshot_takes_over_the_memory_of_an_earlier_one(results: dict[str, Any]) -> None:
    for rank, found in enumerate(results["reused"]):
        assert found["same_memory"] and "given away" in found["refusal"]
        assert found["written"] == found["fresh"] and list(found["written"]) == [f"engine_rank_{rank:05d}.safetensors"]
