"""Stored teacher logits: the bytes of a colocated teacher, exports that go on, and refusals that name file or field."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import AugmentConfig, RunConfig, from_dict, to_dict
from m2mkd_ds.data import atomic
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.teacher.protocol.wire import Answer, GetBatch
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.stored.export import export_logits, positions_of_steps, stored_bytes
from m2mkd_ds.teacher.stored.logit_files import StoreError
from m2mkd_ds.teacher.stored.replay import LogitsStore, ReplayFeed
from tests.teacher.conftest import make_parts, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=1, world=2)
STEPS = 5  # 40 positions: with parts of 16, the last one holds 8
CPU = torch.device("cpu")
SECOND_PART = "000000000016-000000000032"


class Watched:
    """A real producer that counts what it is asked, computes each answer once, and may wait, fail or change its logits."""

    def __init__(self, config: RunConfig, index: ShardIndex, *, wait_s: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        self._producer = Producer(make_parts(config, index, dtype))
        self.parts, self.wait_s = self._producer.parts, wait_s
        self.starts: list[int] = []
        self._made: dict[GetBatch, Answer] = {}
        self.fail_at: int | None = None
        self.change: Callable[[Tensor], Tensor] = lambda logits: logits

    def answer(self, request: GetBatch) -> Answer:
        self.starts.append(request.start)
        time.sleep(self.wait_s)
        if request.start == self.fail_at:
            raise RuntimeError("the power went")
        answer = self._made.get(request) or self._producer.answer(request)
        self._made[request] = answer
        return Answer(answer.head, {name: self.change(tensor) for name, tensor in answer.tensors.items()})


@pytest.fixture
def watched(tiny_config: RunConfig, tiny_index: ShardIndex) -> Watched:
    return Watched(tiny_config, tiny_index)


@pytest.fixture
def prints(tiny_config: RunConfig, tiny_index: ShardIndex) -> dict[str, str]:
    return tiny_fingerprints(tiny_config, tiny_index)


def export(producer: Any, out: Path, prints: dict[str, str], steps: int = STEPS, **changes: Any) -> None:
    layout = changes.get("layout", LAYOUT)
    settings: dict[str, Any] = {
        "layout": layout, "pairs": (0, 1, 2), "positions": positions_of_steps(layout, range(steps)), "dtype": "fp32", "part_rows": 18,
        "show_progress": False,
    }  # fmt: skip
    export_logits(producer, out, prints=prints, **{**settings, **changes})


def colocated(config: RunConfig, index: ShardIndex, layout: BatchLayout, rank: int, *, teachers: bool) -> ColocatedFeed:
    parts = make_parts(config, index)
    loader = TrainLoader(
        index, config.data, seed=config.seed, micro_batch_size=layout.micro_batch_size, accumulation=layout.accumulation, rank=rank,
        world=layout.world, start_step=0, total_steps=STEPS,
    )  # fmt: skip
    return ColocatedFeed(loader, parts.pairs, parts.meta, parts.teachers if teachers else {}, device=CPU, dtype=torch.float32)


def all_batches(feed: Any, layout: BatchLayout, rank: int, steps: int = STEPS) -> list[TeacherBatch]:
    places = [(step, micro) for step in range(steps) for micro in range(layout.accumulation)]
    return [feed.batch(BatchRequest(step, micro, layout.positions(step, micro, rank), (0, 1, 2), True)) for step, micro in places]


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("layout", [LAYOUT, replace(LAYOUT, accumulation=2, world=1)], ids=["two ranks", "one rank, twice the micro-steps"])
def test_replay_gives_the_bytes_of_a_colocated_teacher_on_any_ranks(
    layout: BatchLayout, watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tiny_index: ShardIndex, tmp_path: Path
) -> None:
    export(watched, tmp_path, prints)
    assert sorted(watched.starts) == list(range(0, 40, 4))
    for rank in range(layout.world):
        store = LogitsStore(tmp_path, prints)
        store.check_run(layout, tiny_config.data.augment, (0, 1, 2), STEPS)
        base = colocated(tiny_config, tiny_index, layout, rank, teachers=False)
        feed = ReplayFeed(base, store, device=CPU, dtype=torch.float32)
        ours = all_batches(feed, layout, rank)
        theirs = all_batches(colocated(tiny_config, tiny_index, layout, rank, teachers=True), layout, rank)
        for mine, its in zip(ours, theirs, strict=True):
            assert not mine.lost and torch.equal(mine.targets_BV, its.targets_BV) and torch.equal(mine.slot_ids_B, its.slot_ids_B)
            for i in range(3):
                assert torch.equal(mine.hidden[i], its.hidden[i])
                assert torch.equal(mine.teacher_logits[i], its.teacher_logits[i]) and mine.teacher_logits[i].dtype == torch.float32
        feed.close()


def test_other_micro_batches_get_the_same_images_and_logits_up_to_rounding_and_are_told_so(
    watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tiny_index: ShardIndex, tmp_path: Path
) -> None:
    export(watched, tmp_path, prints)
    store = LogitsStore(tmp_path, prints)
    whole = BatchLayout(micro_batch_size=8, accumulation=1, world=1)
    assert "made in micro-batches of 4 and are used in micro-batches of 8" in store.check_layout(whole, tiny_config.data.augment)
    assert store.check_layout(LAYOUT, tiny_config.data.augment) == ""
    feed = ReplayFeed(colocated(tiny_config, tiny_index, whole, 0, teachers=False), store, device=CPU, dtype=torch.float32)
    ours = all_batches(feed, whole, 0)  # positions 8..15 and 16..23 and so on: the third batch crosses into the second part's middle
    theirs = all_batches(colocated(tiny_config, tiny_index, whole, 0, teachers=True), whole, 0)
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine.hidden[0], its.hidden[0])
        for i in range(3):
            torch.testing.assert_close(mine.teacher_logits[i], its.teacher_logits[i], atol=1e-5, rtol=1e-5)
    crossing = store.rows(1, range(10, 36))  # three parts
    assert torch.equal(crossing, torch.cat([batch.teacher_logits[1] for batch in ours])[10:36])
    feed.close()


def test_layouts_that_mean_other_images_are_refused_with_the_reason(
    watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tmp_path: Path
) -> None:
    export(watched, tmp_path, prints)
    store, augment = LogitsStore(tmp_path, prints), tiny_config.data.augment
    twice = replace(LAYOUT, accumulation=2)
    with pytest.raises(StoreError, match=r"layout: this run has 4 images x 2 micro-steps x 2 ranks, .* 4 images x 1 .*mixup and cutmix"):
        store.check_layout(twice, augment)
    with pytest.raises(StoreError, match="mixup and cutmix draw by optimizer step"):
        store.check_layout(replace(LAYOUT, origin=8), augment)
    with pytest.raises(StoreError, match="mix_group=0 mixes within a micro-batch"):
        store.check_layout(BatchLayout(micro_batch_size=8, accumulation=1, world=1), replace(augment, mix_group=0))
    assert store.check_layout(replace(LAYOUT, accumulation=2, world=1), replace(augment, mix_group=0)) == ""
    deit = AugmentConfig(repeats=3, repeat_mode="deit")
    with pytest.raises(StoreError, match="repeat_mode=deit"):
        store.check_layout(replace(LAYOUT, accumulation=2, world=1), deit)
    assert store.check_layout(LAYOUT, deit) == ""
    # Without mixing, an image follows from its position alone.
    assert store.check_layout(twice, AugmentConfig(repeats=3)) == ""
    with pytest.raises(StoreError, match=r"pairs \[3\] are trained and the folder holds pairs \[0, 1, 2\]"):
        store.check_pairs((1, 3))


@pytest.mark.parametrize(("dtype", "on_disk"), [("fp32", np.float32), ("fp16", np.float16), ("bf16", np.uint16)])
def test_files_are_plain_npy_in_the_order_of_positions(
    dtype: str, on_disk: type, watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tiny_index: ShardIndex, tmp_path: Path
) -> None:
    export(watched, tmp_path, prints, dtype=dtype)
    names = [f"{start:012d}-{stop:012d}.pair2.npy" for start, stop in ((0, 16), (16, 32), (32, 40))]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*pair2.npy")) == names
    arrays = [np.load(tmp_path / "parts" / name, allow_pickle=False) for name in names]
    assert [array.shape for array in arrays] == [(16, 10), (16, 10), (8, 10)] and arrays[0].dtype == on_disk
    feeds = [colocated(tiny_config, tiny_index, LAYOUT, rank, teachers=True) for rank in (0, 1)]
    batches = {int(b.slot_ids_B[0]): b for rank in (0, 1) for b in all_batches(feeds[rank], LAYOUT, rank)}
    expected = torch.cat([batches[start].teacher_logits[2] for start in sorted(batches)])
    found = torch.from_numpy(np.concatenate(arrays).view(np.int16)).view(torch.bfloat16) if dtype == "bf16" else np.concatenate(arrays)
    cast = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert torch.equal(torch.as_tensor(found), expected.to(cast))
    stored = LogitsStore(tmp_path, prints).rows(2, range(13, 37))
    assert stored.dtype == cast and torch.equal(stored, expected[13:37].to(cast))


def test_an_epoch_of_imagenet_is_two_and_a_half_gigabytes_a_pair() -> None:
    assert stored_bytes(range(1_281_167), 1, 1000, "fp16") == 2_562_334_000


def test_an_export_that_fails_anywhere_goes_on_and_gives_the_same_bytes(
    watched: Watched, prints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(watched, tmp_path / "whole", prints)
    whole = folder_bytes(tmp_path / "whole")
    # 1. The teacher fails at every micro-batch in turn; each time the parts before it are kept.
    for fail_at in range(0, 40, 4):
        out = tmp_path / f"answer{fail_at}"
        watched.fail_at = fail_at
        with pytest.raises(RuntimeError, match="the power went"):
            export(watched, out, prints)
        assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp"))
        watched.fail_at, watched.starts = None, []
        export(watched, out, prints)
        assert sorted(watched.starts) == list(range(fail_at // 16 * 16, 40, 4)) and folder_bytes(out) == whole
    # 2. The process ends at every rename in turn: contents, three files and a record for each of three parts, manifest.
    real = os.replace
    for end_at in range(1 + 3 * 4 + 1):
        out, calls = tmp_path / f"rename{end_at}", iter(range(100))

        def ends(source: Any, target: Any, *, calls: Any = calls, end_at: int = end_at) -> None:
            if next(calls) == end_at:
                raise KeyboardInterrupt
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(atomic.os, "replace", ends)
            with pytest.raises(KeyboardInterrupt):
                export(watched, out, prints)
        with pytest.raises(StoreError, match="the export has not ended" if end_at else "no stored logits lie here"):
            LogitsStore(out, prints)
        export(watched, out, prints)
        assert folder_bytes(out) == whole


def export_slowly(tree: dict[str, Any], out: str) -> None:
    """For another process: an export that takes its time."""
    config = from_dict(tree)
    index = ShardIndex.load(config.data.train)
    export(Watched(config, index, wait_s=0.2), Path(out), tiny_fingerprints(config, index))


def test_a_killed_export_loses_one_part_at_most(watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    child = multiprocessing.get_context("spawn").Process(target=export_slowly, args=(to_dict(tiny_config), str(out)))
    child.start()
    deadline = time.monotonic() + 60
    while child.is_alive() and time.monotonic() < deadline:
        if list((out / "parts").glob("*.json")) and list(out.rglob("*.npy.*.tmp")):  # in the middle of the second part
            break
        time.sleep(0.02)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    kept = [json.loads(path.read_text())["stop"] for path in sorted((out / "parts").glob("*.json"))]
    assert kept and not (out / "manifest.json").exists() and list(out.rglob("*.tmp"))
    export(watched, out, prints)
    assert sorted(watched.starts) == list(range(kept[-1], 40, 4))
    export(watched, tmp_path / "whole", prints)
    assert folder_bytes(out) == folder_bytes(tmp_path / "whole")


def test_a_damaged_part_is_named_and_made_anew(
    watched: Watched,
    prints: dict[str, str],
    tiny_config: RunConfig,
    tiny_index: ShardIndex,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    export(watched, tmp_path, prints)
    whole = folder_bytes(tmp_path)
    file = tmp_path / "parts" / f"{SECOND_PART}.pair1.npy"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    store = LogitsStore(tmp_path, prints)
    assert store.rows(1, range(16)).shape == (16, 10)  # the first part is good
    with pytest.raises(StoreError, match=rf"{SECOND_PART}.pair1.npy: damaged, its sha256 is \w+ and its record says \w+; run the same"):
        store.rows(0, range(14, 18))  # whatever pair: a part is good or not
    # In training, all ranks have to stop together: the batch says why.
    feed = ReplayFeed(colocated(tiny_config, tiny_index, LAYOUT, 0, teachers=False), store, device=CPU, dtype=torch.float32)
    batches = all_batches(feed, LAYOUT, 0, steps=3)
    assert [f"{SECOND_PART}.pair1.npy" in batch.lost for batch in batches] == [False, False, True]
    assert batches[2].teacher_logits[1].shape == (4, 10)
    feed.close()
    watched.starts = []
    export(watched, tmp_path, prints)
    assert sorted(watched.starts) == [16, 20, 24, 28] and folder_bytes(tmp_path) == whole
    assert f"{SECOND_PART}.pair1.npy: damaged" in caplog.text
    file.write_bytes(damaged[:100])
    with pytest.raises(StoreError, match=rf"{SECOND_PART}.pair1.npy: 100 bytes, its record says {len(damaged)}"):
        LogitsStore(tmp_path, prints)
    file.unlink()
    with pytest.raises(StoreError, match=rf"{SECOND_PART}.pair1.npy: missing"):
        LogitsStore(tmp_path, prints)


def test_what_does_not_belong_to_the_run_is_refused_by_field_and_both_values(
    watched: Watched, prints: dict[str, str], tmp_path: Path
) -> None:
    export(watched, tmp_path, prints)
    other = {**prints, "weights.teacher.1": "f" * 64}
    with pytest.raises(StoreError, match=rf"weights.teacher.1: this run has {'f' * 64}, the stored logits were made with {'1' * 64}"):
        LogitsStore(tmp_path, other)
    LogitsStore(tmp_path, {name: value for name, value in prints.items() if not name.startswith("weights.teacher.2")})
    watched.starts = []
    with pytest.raises(StoreError, match="weights.teacher.1"):
        export(watched, tmp_path, other)
    for changes, told in (
        ({"dtype": "fp16"}, "dtype: this export has fp16, the folder was begun with fp32"),
        ({"pairs": (0, 1)}, r"pairs: this export has \(0, 1\)"),
        ({"pairs": (0, 3)}, r"pairs \[0, 3\]: give some of \[0, 1, 2\]"),
        ({"pairs": (1, 0)}, "in ascending order"),
        ({"layout": replace(LAYOUT, accumulation=2)}, r"layout: this export has .*accumulation=2"),
        ({"positions": range(8, 40)}, "start: this export has 8, the folder was begun with 0"),
        ({"positions": range(0, 42)}, "positions 0 to 42: give at least one, in whole micro-batches of 4"),
        ({"part_rows": 3}, "part_rows is 3; a part holds at least one micro-batch of 4"),
    ):
        with pytest.raises(StoreError, match=told):
            export(watched, tmp_path, prints, **changes)
    assert watched.starts == []  # nothing was computed


def test_steps_that_are_not_stored_are_refused_before_training_and_can_be_added(
    watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tmp_path: Path
) -> None:
    export(watched, tmp_path, prints, steps=3)
    store, augment = LogitsStore(tmp_path, prints), tiny_config.data.augment
    store.check_run(LAYOUT, augment, (0, 1), 3)
    told = r"positions 0 to 23 \(3 steps of 8\), and the phase trains on 0 to 39: run `m2mkd teacher-export` for 5 steps"
    with pytest.raises(StoreError, match=told):
        store.check_run(LAYOUT, augment, (0, 1), 5)
    # A run that goes on with twice the batch after 1 step of 8: step 1 begins at position 8, and step 0 would have begun at -8.
    doubled = BatchLayout(micro_batch_size=4, accumulation=2, world=2, origin=-8)
    store.check_run(doubled, AugmentConfig(), (0,), 2, start_step=1)
    with pytest.raises(StoreError, match=r"trains on 8 to 39: run `m2mkd teacher-export` for 3 steps"):
        store.check_run(doubled, AugmentConfig(), (0,), 3, start_step=1)
    with pytest.raises(StoreError, match="trains on 20 to 27"):
        store.rows(0, range(20, 28))
    watched.starts = []
    export(watched, tmp_path, prints, steps=5)
    assert sorted(watched.starts) == [24, 28, 32, 36]
    longer = LogitsStore(tmp_path, prints)
    longer.check_run(LAYOUT, augment, (0, 1), 5)
    assert torch.equal(longer.rows(1, range(24)), store.rows(1, range(24)))
    export(watched, tmp_path, prints, steps=2)  # asked for less: nothing is thrown away
    LogitsStore(tmp_path, prints).check_run(LAYOUT, augment, (0, 1), 5)
    assert len(watched.starts) == 4


def test_a_manifest_that_is_cut_short_or_lies_is_refused_by_name(watched: Watched, prints: dict[str, str], tmp_path: Path) -> None:
    export(watched, tmp_path, prints)
    path = tmp_path / "manifest.json"
    text = path.read_text()
    for cut in (0, 1, len(text) // 2, len(text) - 3):
        path.write_text(text[:cut])
        with pytest.raises(StoreError, match=r"manifest.json: damaged .*delete it and run"):
            LogitsStore(tmp_path, prints)
    for change, told in (
        (lambda tree: tree["contents"].update(version=9), "version is 9, this m2mkd_ds reads 1"),
        (lambda tree: tree["parts"].pop(1), "does not follow position 16"),
        (lambda tree: tree["contents"].update(classes=11), "bytes do not hold 16 rows of 11 fp32"),
        (lambda tree: tree["contents"].update(surprise=1), "contents.surprise"),
        (lambda tree: tree["contents"].update(start=-1), "contents.start"),
    ):
        tree = json.loads(text)
        change(tree)  # type: ignore[no-untyped-call]
        path.write_text(json.dumps(tree))
        with pytest.raises(StoreError, match=told):
            LogitsStore(tmp_path, prints)
    path.unlink()
    with pytest.raises(StoreError, match="the export has not ended"):
        LogitsStore(tmp_path, prints)


def test_logits_that_a_dtype_cannot_hold_are_an_error_that_names_the_slots(
    watched: Watched, prints: dict[str, str], tmp_path: Path
) -> None:
    def large(logits_BV: Tensor) -> Tensor:
        changed = logits_BV.clone()
        changed[2, 3] = 65_600.0  # the largest fp16 is 65,504; this rounds to infinity
        return changed

    watched.change = large
    with pytest.raises(StoreError, match=r"pair 0, slots \[2\]: .* not finite in fp16: the largest is 6.56e\+04, beyond fp16"):
        export(watched, tmp_path / "a", prints, dtype="fp16")
    export(watched, tmp_path / "b", prints, dtype="bf16")
    watched.change = lambda logits_BV: torch.where(torch.arange(4)[:, None] > 1, torch.nan, logits_BV)
    with pytest.raises(StoreError, match=r"pair 0, slots \[2, 3\]: .* not finite in fp32: the teacher is broken"):
        export(watched, tmp_path / "c", prints)


def test_two_exports_into_one_folder_and_small_disks_are_refused(
    watched: Watched, prints: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another export writes into this folder"):
        export(watched, tmp_path, prints)
    os.close(descriptor)
    # 40 positions x 3 pairs x 10 classes x 4 bytes, and 9 headers of 128 bytes: 5952 bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5951))
    with pytest.raises(StoreError, match=r"5.95e-06 GB are needed and 5.95e-06 GB are free"):
        export(watched, tmp_path, prints)
    assert watched.starts == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5952))
    export(watched, tmp_path, prints)


def test_logits_of_another_image_than_the_trainers_stop_the_run(
    watched: Watched, prints: dict[str, str], tiny_config: RunConfig, tiny_index: ShardIndex, tmp_path: Path
) -> None:
    def answer_with_bad(request: GetBatch, answer: Callable[[GetBatch], Answer] = watched.answer) -> Answer:
        found = answer(request)
        bad = BadSample(kind="io", shard="a", key="b", sample=1, position=request.start + 1, substitute=77, message="gone")
        return Answer(replace(found.head, bad=(bad,) if request.start == 8 else ()), found.tensors)

    export(SimpleNamespace(parts=watched.parts, answer=answer_with_bad), tmp_path, prints)
    store = LogitsStore(tmp_path, prints)
    assert store.replaced(range(8, 12)) == {9: 77} and store.replaced(range(10, 40)) == {}
    feed = ReplayFeed(colocated(tiny_config, tiny_index, LAYOUT, 0, teachers=False), store, device=CPU, dtype=torch.float32)
    told = [batch.lost for batch in all_batches(feed, LAYOUT, 0, steps=3)]
    assert told[0] == told[2] == "" and "position 9: the image was damaged and replaced by sample 77" in told[1]
    feed.close()
