"""`m2mkd bench checkpoint` in miniature: what is in a result, and that its numbers follow from each other. No speeds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds.bench.checkpoint import CheckpointRow, run_checkpoint, verdicts
from m2mkd_ds.bench.checkpoint_options import PEERS, CheckpointBench
from m2mkd_ds.bench.measure import Spread
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.world import World


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_checkpoint")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


@pytest.fixture(scope="module")
def text(out: Path, world: World) -> str:
    (out / "disk").mkdir()
    return run_checkpoint(CheckpointBench(mib=12, batch=2, repeats=2, folder=out / "disk", out=out), world)


@pytest.fixture(scope="module")
def result(out: Path, text: str) -> dict[str, Any]:
    return json.loads((out / "checkpoint_cpu.json").read_text())


def test_a_result_says_what_was_measured_and_where(result: dict[str, Any], out: Path) -> None:
    assert result["schema"] == "m2mkd bench checkpoint 1" and "--mib 12 --batch 2 --repeats 2" in result["command"]
    assert result["state_bytes"] == 12 * 2**20  # one layer of 1024 x 1024 weights, 12 bytes each
    assert result["environment"]["torch"] and result["environment"]["cpu"]
    assert list((out / "disk").iterdir()) == []  # nothing stays


def test_each_peer_has_a_row_whose_numbers_belong_together(result: dict[str, Any], text: str, out: Path) -> None:
    assert [row["peer"] for row in result["rows"]] == list(PEERS)
    for row in result["rows"]:
        assert len(row["samples"]) == 2 and row["peer"] in text and row["peer"] in (out / "checkpoint_cpu.md").read_text()
        for sample in row["samples"]:
            assert 0 < sample["blocked_ms"] <= sample["on_disk_ms"] and sample["blocked_ms"] <= sample["lost_ms"]
        if row["peer"] in ("ours", "torch_save", "dcp"):
            assert row["lost_ms"] == row["blocked_ms"]  # nothing goes on behind them


def test_a_quick_look_is_small_and_is_called_so_in_all_that_it_leaves(
    world: World, tmp_path: Path, result: dict[str, Any], text: str, out: Path
) -> None:
    quick = CheckpointBench(quick=True, mib=12, peers=("ours",), folder=tmp_path, out=tmp_path)
    assert (quick.resolved().mib, quick.resolved().batch, quick.resolved().repeats) == (12, 64, 2)  # what was given counts
    assert CheckpointBench(quick=True).resolved().mib == 48 and CheckpointBench().resolved() == CheckpointBench()
    told = run_checkpoint(quick, world)
    found = json.loads((tmp_path / "checkpoint_cpu.json").read_text())
    assert found["options"]["quick"] and found["options"]["batch"] == 64 and len(found["rows"][0]["samples"]) == 2
    assert found["command"].startswith("m2mkd bench checkpoint --mib 12 --peers ours --quick --folder ")
    words = "A FIRST LOOK (--quick): state of 12 MiB"
    assert words in told and words in (tmp_path / "checkpoint_cpu.md").read_text()
    assert not result["options"]["quick"] and "FIRST LOOK" not in text + (out / "checkpoint_cpu.md").read_text()


def test_the_verdict_compares_our_two_ways() -> None:
    def row(peer: str, blocked_ms: float) -> CheckpointRow:
        spread = Spread(blocked_ms, blocked_ms, blocked_ms)
        return CheckpointRow(peer, spread, spread, spread, [])

    (verdict,) = verdicts([row("ours", 400.0), row("ours_async", 60.0)])
    assert verdict["value"] == pytest.approx(0.15) and not verdict["met"]
    assert verdicts([row("ours", 400.0), row("ours_async", 20.0)])[0]["met"] and verdicts([row("ours", 400.0)]) == []


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="--mib is 0; it must be at least 1"):
        CheckpointBench(mib=0).check()
    with pytest.raises(ValueError, match="--peers is empty"):
        CheckpointBench(peers=()).check()
    with pytest.raises(ValueError, match="--folder /nowhere: no such folder; make it first"):
        CheckpointBench(folder=Path("/nowhere")).check()


def test_defaults_are_left_out_of_the_command() -> None:
    assert CheckpointBench().command() == "m2mkd bench checkpoint"
    assert CheckpointBench(peers=("ours", "dcp"), mib=5).command() == "m2mkd bench checkpoint --mib 5 --peers ours dcp"
