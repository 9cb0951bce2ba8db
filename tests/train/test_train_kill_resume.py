"""A run that is killed goes on as if nothing had happened, also on another number of ranks; damaged samples are seen by every rank.

By the real launcher, three times, and once more for a damaged validation image. `straight`: 2 ranks, uninterrupted. `killed`: 2 ranks
with a loader worker each; launcher, ranks and workers are killed in the middle of a step, with batches read ahead and the newest
checkpoint a step old. Then the same folder goes on by the verb `train` on 2 ranks, and a copy of it on 1 rank with twice the
accumulation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.config import apply_overrides, load
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.train.pipeline import run_pipeline, write_config
from tests.launching import free_port, kill_group, launch, launcher_command, rank_environment
from tests.train import kill_resume_job
from tests.train.kill_resume_job import CHECKPOINT_STEPS, GLOBAL_BATCH, IMAGES, KILLED_IN, PHASE, STEPS, config_of

SCRIPT = Path(kill_resume_job.__file__)
SAVED = KILLED_IN // CHECKPOINT_STEPS * CHECKPOINT_STEPS
"""Step of the newest checkpoint when the run is killed."""
DAMAGED = (3, 20, 41)
pytestmark = pytest.mark.timeout(600)  # four launches, on a machine that may be busy


def write_noise(folder: Path) -> None:
    """Shards in which every image is a class of its own."""
    draw = np.random.default_rng(0)
    for part in ("train", "validation"):
        samples = [
            (encode_png(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)), "png", i, f"image-{i}") for i in range(IMAGES)
        ]  # fmt: skip
        write_shards(
            samples, folder / part, total=IMAGES, class_names=[f"class {i}" for i in range(IMAGES)], source="test", license="none",
            samples_per_shard=12,
        )  # fmt: skip


def damage(folder: Path, samples: Sequence[int]) -> None:
    """Change one byte in the middle of each of these images."""
    index = ShardIndex.load(folder)
    for sample in samples:
        row = index.table[sample]
        with (folder / index.shards[int(row["shard"])].name).open("r+b") as file:
            place = int(row["offset"]) + int(row["size"]) // 2
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 0xFF]))


def run_until_killed(out: Path, folder: Path) -> None:
    """Launch, wait until rank 0 stands still in the middle of a step, then SIGKILL to everybody at once."""
    command = [*launcher_command(2, free_port()), str(SCRIPT), str(out), "first"]
    with (out / "first.txt").open("w") as text:
        job = subprocess.Popen(command, env=rank_environment(folder), stdout=text, stderr=text, start_new_session=True)
        try:
            deadline = time.monotonic() + 200
            while not (out / "ready").exists():
                assert job.poll() is None and time.monotonic() < deadline, (out / "first.txt").read_text()[-4000:]
                time.sleep(0.1)
            time.sleep(0.5)  # the workers read ahead
            os.killpg(job.pid, signal.SIGKILL)
            assert job.wait(30) == -signal.SIGKILL
        finally:
            kill_group(job)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("killed")
    write_noise(out / "shards")
    shutil.copytree(out / "shards", out / "damaged_shards")
    damage(out / "damaged_shards" / "train", DAMAGED)
    damage(out / "damaged_shards" / "validation", [41])
    run_until_killed(out, tmp_path_factory.mktemp("scratch"))
    shutil.copytree(out / "killed", out / "one_rank")
    for name, ranks, words in (
        ("killed", 2, ["data.num_workers=0"]),
        ("one_rank", 1, ["data.num_workers=1", f"{PHASE}.gradient_accumulation_steps=4", f"{PHASE}.ds_config=zero2"]),
    ):
        train = ["train", "--config", str(out / name / "config.yaml"), "--phase", PHASE, "--set", *words]
        launch(SCRIPT, [str(out), f"{name}_again", *train], ranks=ranks, timeout_s=120)
    return out


def log_of(out: Path, name: str) -> list[dict[str, Any]]:
    """All lines of all ranks; a killed writer may have left half a line."""
    return [line for file in sorted(out.glob(f"{name}.*.jsonl")) for line in read_metrics(file)]


def uses(lines: list[dict[str, Any]]) -> dict[int, tuple[int, str]]:
    """slot -> (label, hash); no slot may come twice."""
    rows = [row for line in lines for row in zip(line["slots"], line["labels"], line["sha256"], strict=True)]
    assert len({slot for slot, _, _ in rows}) == len(rows)
    return {slot: (label, sha) for slot, label, sha in rows}


def weights(out: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(out / name / PHASE / "weights.safetensors")


def test_the_straight_run_uses_every_image_once_an_epoch(out: Path) -> None:
    found = uses(log_of(out, "straight"))
    assert sorted(found) == list(range(STEPS * GLOBAL_BATCH))
    epochs = [[found[slot][0] for slot in range(first, first + IMAGES)] for first in (0, IMAGES)]
    assert all(sorted(epoch) == list(range(IMAGES)) for epoch in epochs) and epochs[0] != epochs[1]
    assert len({sha for _, sha in found.values()}) == len(found)  # augmented anew in the second epoch


def test_the_run_was_killed_in_the_middle_of_a_step_behind_a_checkpoint(out: Path) -> None:
    lines = log_of(out, "killed")
    assert {line["rank"] for line in lines} == {0, 1}
    assert max(line["step"] for line in lines) == KILLED_IN and KILLED_IN % CHECKPOINT_STEPS
    assert uses(lines).items() <= uses(log_of(out, "straight")).items()
    assert (IMAGES < KILLED_IN * GLOBAL_BATCH) and (KILLED_IN * GLOBAL_BATCH % IMAGES > 0)  # inside the second epoch


@pytest.mark.parametrize("name", ["killed", "one_rank"])
def test_a_killed_run_goes_on_with_the_images_and_pixels_of_the_uninterrupted_one(out: Path, name: str) -> None:
    straight = uses(log_of(out, "straight"))
    again = uses(log_of(out, f"{name}_again"))
    assert again == {slot: use for slot, use in straight.items() if slot >= SAVED * GLOBAL_BATCH}
    before = {slot: use for slot, use in uses(log_of(out, "killed")).items() if slot < SAVED * GLOBAL_BATCH}
    assert before | again == straight


def test_on_as_many_ranks_the_weights_are_those_of_the_uninterrupted_run_bit_for_bit(out: Path) -> None:
    straight, again = weights(out, "straight"), weights(out, "killed")
    assert straight.keys() == again.keys() and all(torch.equal(straight[k], again[k]) for k in straight)


def test_on_one_rank_and_another_zero_stage_the_weights_differ_by_the_order_of_sums(out: Path) -> None:
    straight, again = weights(out, "straight"), weights(out, "one_rank")
    # The weights move by about lr * steps = 2e-2; a batch shared out wrongly shows at 1e-3 and more.
    assert straight.keys() == again.keys() and max(float((straight[k] - again[k]).abs().max()) for k in straight) < 1e-6
    done = json.loads((out / "one_rank" / PHASE / "done.json").read_text())
    assert (done["steps"], done["images"], done["world_size"]) == (STEPS, STEPS * GLOBAL_BATCH, 1)
    assert done["layout"] == {
        f"{PHASE}.micro_batch_size": 2, f"{PHASE}.gradient_accumulation_steps": 4, f"{PHASE}.ep_size": 1, f"{PHASE}.ds_config": "zero2"
    }  # fmt: skip


def test_the_record_of_a_checkpoint_is_a_few_numbers(out: Path) -> None:
    manifest = json.loads((out / "killed" / PHASE / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    fingerprint = ShardIndex.load(out / "shards" / "train").fingerprint
    assert manifest["record"]["stream"] == {
        "seed": 0, "fingerprint": fingerprint, "order": "global", "position": STEPS * GLOBAL_BATCH, "version": 1
    }  # fmt: skip


def test_a_rank_that_cannot_save_stops_all_ranks_at_one_step_with_its_reason(out: Path) -> None:
    errors = [json.loads((out / f"unsaved_{rank}.json").read_text()) for rank in (0, 1)]
    assert "step-00000003: not saved, rank 1 could not write its part" in errors[0] and "File too large" in errors[0]
    assert "step-00000003: checkpoint not saved" in errors[1] and "File too large" in errors[1]
    last = [max(line["step"] for line in read_metrics(out / f"unsaved.{rank}.jsonl")) for rank in (0, 1)]
    # Not before the save, whose step is the index 3; at the next save at the latest, which follows step index 5.
    assert last[0] == last[1] and last[0] in (3, 4, 5)
    assert not list((out / "unsaved" / PHASE / "checkpoints").glob("*/manifest.json"))


def test_a_finished_phase_keeps_the_checkpoints_that_it_is_told_to(out: Path) -> None:
    def kept(name: str) -> list[str]:
        return sorted(path.name for path in (out / name / PHASE / "checkpoints").iterdir())

    last, before = (f"step-{step:08d}" for step in (STEPS, STEPS - CHECKPOINT_STEPS))
    assert kept("straight") == [before, last] and kept("damaged") == [last]  # after_done is `keep`, and `last`


def test_a_checkpoint_names_the_files_of_each_rank_and_where_it_comes_from(out: Path) -> None:
    manifest = json.loads((out / "killed" / PHASE / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text())
    assert manifest["parts"] == {str(rank): [f"engine_rank_{rank:05d}.safetensors"] for rank in (0, 1)}
    record = manifest["record"]
    assert record["layout"]["ranks"] == 2 and record["lineage"]["recipe"] == "tiny"
    assert record["lineage"]["train_data"] == record["stream"]["fingerprint"]
    assert record["schedule"]["total_steps"] == STEPS


@pytest.mark.parametrize(
    ("words", "action"),
    [
        ([], "skip"),  # the config file says 2 ranks and 2 micro-steps
        (["launch.num_gpus=1", f"{PHASE}.gradient_accumulation_steps=4"], "skip"),
        ([f"{PHASE}.gradient_accumulation_steps=4"], "run"),  # on 2 ranks, twice the batch
    ],
)
@pytest.mark.parametrize("name", ["killed", "one_rank"])
def test_the_pipeline_takes_the_result_for_every_layout_of_its_batch(out: Path, name: str, words: list[str], action: str) -> None:
    plan = run_pipeline(apply_overrides(load(out / name / "config.yaml"), words), {}, until=PHASE, dry_run=True)
    # one_rank was finished with 2 x 4 images on one rank: its settings and ranks together still give 8
    assert plan.split()[:2] == [action, f"{PHASE}:"]


def bad_lines(out: Path) -> list[dict[str, Any]]:
    return read_metrics(out / "damaged" / PHASE / "bad_samples.jsonl")


def first_uses(out: Path) -> list[tuple[int, int]]:
    """(step counted from 1, sample) of the first use of each damaged image, by the straight run's log: labels tell images."""
    labels = ShardIndex.load(out / "shards" / "train").labels_N
    samples = {int(labels[sample]): sample for sample in DAMAGED}
    found = uses(log_of(out, "straight"))
    slots = [next(slot for slot in sorted(found) if found[slot][0] == label) for label in samples]
    return sorted((slot // GLOBAL_BATCH + 1, sample) for slot, sample in zip(slots, samples.values(), strict=True))


def test_past_the_cap_every_rank_stops_at_the_same_step_with_the_same_words(out: Path) -> None:
    errors = [json.loads((out / f"errors_{rank}.json").read_text())[0] for rank in (0, 1)]
    assert errors[0] == errors[1]
    third = first_uses(out)[2][0]
    assert errors[0].startswith(
        f"{PHASE}: 3 training samples are damaged at step {third}, and data.max_bad_samples allows 2 (checksum 3; shard-0000"
    )
    assert str(out / "damaged" / PHASE / "bad_samples.jsonl") in errors[0] and "m2mkd shards verify" in errors[0]
    # Nobody has begun the next step: step numbers of batches count from 0.
    assert max(line["step"] for line in log_of(out, "damaged_2")) == third - 1


def test_with_a_higher_cap_the_same_folder_goes_on_and_lists_every_use(out: Path) -> None:
    assert [json.loads((out / f"errors_{rank}.json").read_text())[1] for rank in (0, 1)] == ["", ""]
    straight = uses(log_of(out, "straight"))
    labels = ShardIndex.load(out / "shards" / "train").labels_N
    expected = {
        (slot // GLOBAL_BATCH + 1, slot, sample) for slot, (label, _) in straight.items() for sample in DAMAGED if label == labels[sample]
    }  # fmt: skip
    lines = bad_lines(out)
    assert {(line["step"], line["position"], line["sample"]) for line in lines} == expected and len(lines) == len(expected)
    assert {line["kind"] for line in lines} == {"checksum"} and {line["rank"] for line in lines} <= {0, 1}
    assert all(line["substitute"] not in DAMAGED and line["key"].startswith("image-") and line["message"] for line in lines)
    assert read_metrics(out / "damaged" / PHASE / "metrics.jsonl")[-1]["data/bad_samples"] == 3


def test_only_the_places_of_damaged_images_hold_others(out: Path) -> None:
    straight, damaged = uses(log_of(out, "straight")), uses(log_of(out, "damaged_3"))
    by_position = {line["position"]: line["substitute"] for line in bad_lines(out)}
    labels = ShardIndex.load(out / "shards" / "train").labels_N
    for slot, (label, _) in damaged.items():
        assert label == (labels[by_position[slot]] if slot in by_position else straight[slot][0])


def test_a_run_without_damage_has_no_list(out: Path) -> None:
    assert not (out / "straight" / PHASE / "bad_samples.jsonl").exists()
    assert {line["data/bad_samples"] for line in read_metrics(out / "straight" / PHASE / "metrics.jsonl")} == {0}


def test_a_damaged_validation_image_ends_the_job_of_all_ranks_with_its_name(out: Path) -> None:
    """Rank 1 alone meets it; rank 0 stands in the collective behind its own batches."""
    config = config_of(out, "bad_validation")
    data = replace(config.data, validation=str(out / "damaged_shards" / "validation"))
    file = write_config(replace(config, data=data, pretrain_meta=replace(config.pretrain_meta, max_steps=1)))
    began = time.monotonic()
    job = launch(SCRIPT, [str(out), "bad_validation", "train", "--config", str(file), "--phase", PHASE], timeout_s=120, check=False)
    assert job.returncode != 0
    assert "sample 41: the shard holds other bytes than were indexed (crc32 differs)" in job.stdout
    assert time.monotonic() - began < 90  # the time-out of a collective is 600 s
    assert not (out / "bad_validation" / PHASE / "weights.safetensors").exists()
