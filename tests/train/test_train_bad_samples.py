"""The list of damaged samples by itself, in a job of one rank: cap, counts, and what a job that goes on finds in it.

Two ranks, the loop and the loader are in test_train_kill_resume.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.train.bad_samples import BadDataError, BadSampleList, lists_of_phase, resolve_cap


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


def bad(sample: int, *, kind: Any = "undecodable", shard: str = "shard-000000.tar", position: int = 0) -> BadSample:
    return BadSample(kind, shard, f"key-{sample}", sample, position, sample + 1, f"sample {sample} is damaged")


def new_list(world: World, folder: Path, *, cap: int = 100, start_step: int = 0) -> BadSampleList:
    return BadSampleList(folder / "bad_samples.jsonl", cap=cap, world=world, what="m2mkd", start_step=start_step)


@pytest.mark.parametrize(
    ("setting", "images", "cap"),
    [
        (-1, 1_281_167, 100),  # a thousandth would be 1,281
        (-1, 50_000, 50),
        (-1, 1_999, 1),
        (-1, 46, 1),  # one bad image never stops a run by default
        (0, 50_000, 0),
        (7, 46, 7),
    ],
)
def test_the_default_cap_is_a_thousandth_but_one_at_least_and_a_hundred_at_most(setting: int, images: int, cap: int) -> None:
    assert resolve_cap(setting, images) == cap


def test_uses_are_listed_and_different_samples_are_counted(world: World, tmp_path: Path) -> None:
    bads = new_list(world, tmp_path, cap=2)
    assert bads.total == 0 and not bads.file.exists()
    bads.add(3, [bad(7, position=40), bad(9, kind="checksum", shard="shard-000002.tar", position=41)])
    bads.add(8, [bad(7, position=140)])  # the next epoch
    assert bads.total == 2
    assert bads.summary() == "checksum 1, undecodable 1; shard-000000.tar 1, shard-000002.tar 1"
    bads.close()
    assert read_metrics(bads.file) == [
        {"step": step, "rank": 0, "kind": kind, "shard": f"shard-00000{shard}.tar", "key": f"key-{sample}", "sample": sample,
         "position": position, "substitute": sample + 1, "message": f"sample {sample} is damaged"}
        for step, kind, shard, sample, position in ((3, "undecodable", 0, 7, 40), (3, "checksum", 2, 9, 41), (8, "undecodable", 0, 7, 140))
    ]  # fmt: skip


def test_what_is_listed_is_on_the_disk_before_a_checkpoint_of_its_step_can_be(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bads = new_list(world, tmp_path)
    bads.add(1, [bad(7)])
    forced: list[int] = []
    real = os.fsync

    def fsync(number: int) -> None:
        forced.append(os.fstat(number).st_ino)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    bads.add(2, [bad(8)])
    assert forced == [bads.file.stat().st_ino]
    monkeypatch.undo()
    bads.close()


def test_past_the_cap_the_list_is_written_before_the_error(world: World, tmp_path: Path) -> None:
    bads = new_list(world, tmp_path, cap=1)
    bads.add(1, [bad(7)])
    with pytest.raises(BadDataError) as err:
        bads.add(2, [bad(8), bad(9, kind="io")])
    assert str(err.value) == (
        "m2mkd: 3 training samples are damaged at step 2, and data.max_bad_samples allows 1 (undecodable 2, io 1; shard-000000.tar 3); "
        f"they are listed in {bads.file}: check the shards with `m2mkd shards verify`, or raise data.max_bad_samples"
    )
    assert [record["sample"] for record in read_metrics(bads.file)] == [7, 8, 9]


def test_a_job_that_goes_on_knows_what_was_met_before_its_first_step_and_forgets_the_rest(world: World, tmp_path: Path) -> None:
    bads = new_list(world, tmp_path)
    for step in (2, 4, 5):
        bads.add(step, [bad(step)])
    bads.close()
    again = new_list(world, tmp_path, cap=3, start_step=4)  # steps 5 and on are done again
    assert again.total == 2 and [record["sample"] for record in read_metrics(again.file)] == [2, 4]
    again.add(5, [bad(5)])
    again.close()
    again.add(6, [bad(4)])  # opened again within the job, nothing is cut off
    assert [record["step"] for record in read_metrics(again.file)] == [2, 4, 5, 6]
    with pytest.raises(BadDataError, match="4 training samples are damaged at step 7, and data.max_bad_samples allows 3"):
        again.add(7, [bad(70)])


def test_where_nothing_can_be_read_the_list_is_written_before_the_error(world: World, tmp_path: Path) -> None:
    bads = new_list(world, tmp_path)
    with pytest.raises(BadDataError, match=r"^m2mkd: a batch could not be had at step 3: the disk is gone\. 2 damaged .*\(io 2; .*verify`"):
        bads.add(3, [replace(bad(i, kind="io"), substitute=-1) for i in (7, 8)], lost="the disk is gone")
    assert [(record["step"], record["sample"], record["substitute"]) for record in read_metrics(bads.file)] == [(3, 7, -1), (3, 8, -1)]


def test_a_job_of_other_pairs_knows_what_their_jobs_met_up_to_its_step(world: World, tmp_path: Path) -> None:
    for folder, samples in (("pair_0", (1, 2, 3)), ("pair_1", (1, 4)), (".", (5,))):
        other = new_list(world, tmp_path / folder)
        for step, sample in enumerate(samples):
            other.add(step + 1, [bad(sample)])
        other.close()
    own = tmp_path / "pair_1" / "bad_samples.jsonl"
    lists = lists_of_phase(own.parent)
    assert len(lists) == 3 and lists == lists_of_phase(tmp_path)
    again = BadSampleList(own, cap=9, world=world, what="m2mkd", start_step=2, others=lists)
    assert again.total == 4  # 1 and 4 of its own, 2 of pair 0's, 5 of all pairs'; 3 came in step 3
    again.close()
    assert [record["sample"] for record in read_metrics(own)] == [1, 4]  # the lists stay apart
    assert len(read_metrics(tmp_path / "pair_0" / "bad_samples.jsonl")) == 3


def test_only_the_first_ten_shards_are_named(world: World, tmp_path: Path) -> None:
    bads = new_list(world, tmp_path)
    bads.add(1, [bad(i, shard=f"shard-{i:06d}.tar") for i in range(12)] + [bad(100 + i, shard="shard-000011.tar") for i in range(3)])
    shards = bads.summary().split("; ")[1].split(", ")
    assert shards[0] == "shard-000011.tar 4" and shards[1] == "shard-000000.tar 1" and shards[-1] == "2 more shards" and len(shards) == 11
