"""Bad input: one clear sentence before compute is spent; a full disk leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from m2mkd_ds.config import ConfigError
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.train.pipeline import run_pipeline
from tests.train import bad_input_job
from tests.train.finished_run import tiny_config


def refusal(run: Path, shards: Path, *overrides: str, recipe: str = "tiny", until: str = "") -> str:
    """The one-line error of the pipeline."""
    with pytest.raises(ValueError) as err:
        run_pipeline(tiny_config(run, shards, *overrides, recipe=recipe), {}, until=until)
    assert "\n" not in str(err.value)
    return str(err.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that does not exist yet."""
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("train", "train/index.json: no such file; the folder holds no complete shards, write them with `m2mkd shards write`"),
        ("train/shard-000000.tar", "train/shard-000000.tar: shard is missing (1 are indexed); copy it here or write the shards again"),
        ("validation/index.npy", "validation/index.npy: no such file"),
    ],
)
def test_missing_shards_are_named(run: Path, digits_shards: Path, tmp_path: Path, damage: str, message: str) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(digits_shards, shards)
    target = shards / damage
    if target.is_dir():
        shutil.rmtree(target)
    else:
        target.unlink()
    assert message in refusal(run, shards)
    assert not run.exists()


def test_a_truncated_shard_is_named(run: Path, digits_shards: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(digits_shards, shards)
    tar = shards / "train" / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "it is truncated or changed" in refusal(run, shards)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.num_classes=7"], "data.num_classes is 7, but data.train ("),
        (["teacher.depths=[2,3]"], "teacher.depths [2, 3] has 5 blocks and teacher.arch vit_tiny_patch16_224 has 4"),
        (["teacher.depths=[2,1]"], "teacher.depths [2, 1] has 3 blocks"),
        (["teacher.arch=vit_tinny_patch16_224"], "is not a model of the installed timm"),
        (["teacher.arch=resnet18", "teacher.arch_args={}"], "teacher.arch resnet18"),
        (["teacher.arch_args.num_heads=3"], "timm cannot build teacher.arch vit_tiny_patch16_224"),
        (["teacher.arch_args.num_classes=10"], "teacher.arch_args.num_classes is 10: this number belongs to data.num_classes"),
        (["data.train="], "data.train is empty"),
        (["run_dir="], "run_dir is empty: give the run folder with --run-dir"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_runs(run: Path, digits_shards: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(run, digits_shards, *overrides)
    assert not run.exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("meta.depths=[1,1,1]", "meta.depths has 3 stages and teacher.depths has 2"),
        ("teacher.depths=[1,1,2]", "meta.depths has 2 stages and teacher.depths has 3"),
        ("student.depths=[4]", "student.depths has 1 stages and teacher.depths has 2"),
    ],
)
def test_models_with_different_numbers_of_stages_are_refused(run: Path, digits_shards: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as err:
        tiny_config(run, digits_shards, override)
    assert message in str(err.value)


def teacher_weights(num_classes: int = 10, depth: int = 4) -> dict[str, torch.Tensor]:
    args = {"patch_size": 4, "embed_dim": 64, "depth": depth, "num_heads": 2}
    arch = VitArch("vit_tiny_patch16_224", args, num_classes, 16)
    return build_stage(arch, StageSpan.whole(depth), seed=0).state_dict()


def test_a_teacher_file_that_is_not_there_is_refused_before_anything_runs(run: Path, digits_shards: Path) -> None:
    message = refusal(run, digits_shards, "teacher.weights=/none/teacher.pth", recipe="tiny_pretrained")
    assert message.startswith("teacher.weights /none/teacher.pth: no such file; give a .safetensors or .pth file of vit_tiny_patch16_224")
    assert not run.exists()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (teacher_weights(num_classes=7), "has a head of 7 classes and data.num_classes is 10"),
        (teacher_weights(depth=3), "vit_tiny_patch16_224"),
        ({"head.weight": torch.zeros(10, 64)}, "vit_tiny_patch16_224"),
    ],
    ids=["other classes", "a block is missing", "not a teacher"],
)
def test_a_teacher_file_that_does_not_fit_leaves_no_result(
    run: Path, digits_shards: Path, tmp_path: Path, weights: dict[str, torch.Tensor], message: str
) -> None:
    save_file(weights, tmp_path / "teacher.safetensors")
    override = f"teacher.weights={tmp_path / 'teacher.safetensors'}"
    with pytest.raises(ValueError, match=message):
        run_pipeline(tiny_config(run, digits_shards, override, recipe="tiny_pretrained"), {}, until="split")
    assert not list((run / "split").glob("*"))


def test_a_damaged_teacher_file_is_refused(run: Path, digits_shards: Path, tmp_path: Path) -> None:
    for name in ("teacher.safetensors", "teacher.pth"):
        (tmp_path / name).write_bytes(b"not weights")
        message = refusal(run, digits_shards, f"teacher.weights={tmp_path / name}", recipe="tiny_pretrained", until="split")
        assert name in message


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, digits_shards: Path) -> dict[str, Any]:
    """What the phases of bad_input_job.py met, in one process without a launcher."""
    out = tmp_path_factory.mktemp("bad_input")
    command = [sys.executable, str(bad_input_job.__file__), str(out), str(digits_shards)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


def test_a_phase_runs_without_a_launcher_and_records_what_it_wrote(results: dict[str, Any]) -> None:
    assert results["good"] == ""
    assert {"weights.safetensors", "metrics.jsonl", "done.json", "checkpoints/step-00000002/manifest.json"} <= results["files"].keys()
    done = results["done"]
    # 2 steps of 16 images on one rank
    assert (done["steps"], done["images"], done["world_size"], done["inputs"]) == (2, 32, 1, [])
    assert done["files"]["weights.safetensors"]["bytes"] == results["files"]["weights.safetensors"]


def test_a_phase_whose_input_is_missing_says_what_to_run(results: dict[str, Any]) -> None:
    assert "pretrain_meta holds no finished output; run it first: m2mkd pipeline" in results["missing_input"]
    # Nothing but the records of the failure itself.
    assert results["new"].keys() == {"m2mkd/outcome.json", "m2mkd/failed-0.json", "m2mkd/heartbeats/rank-0.json"}


def test_a_checkpoint_of_another_global_batch_is_not_resumed(results: dict[str, Any]) -> None:
    message = results["foreign"]["batch"]
    assert (
        "was made with a global batch of 64 and this launch has 16 = pretrain_meta.micro_batch_size 16 x "
        "pretrain_meta.gradient_accumulation_steps 1 x 1 ranks: make the product 64 (--set pretrain_meta.gradient_accumulation_steps=4 "
        "or launch with 4 ranks), or delete "
    ) in message


@pytest.mark.parametrize(
    ("field", "theirs", "ours"), [("seed", "5", "0"), ("order", "block/16", "global"), ("position", "17", "16")]
)  # fmt: skip
def test_a_checkpoint_of_another_stream_stops_the_phase_with_both_values(
    results: dict[str, Any], field: str, theirs: str, ours: str
) -> None:
    # step 1 of 16 images: the next position is 16
    assert f"its data stream has {field} {theirs}, this run has {ours}; give the run the data" in results["foreign"][field]


def test_a_checkpoint_of_other_images_stops_the_phase_with_both_fingerprints(results: dict[str, Any], digits_shards: Path) -> None:
    ours = json.loads((digits_shards / "train" / "index.json").read_text())["fingerprint"]
    assert f"its data stream has fingerprint of other images, this run has {ours}" in results["foreign"]["fingerprint"]


@pytest.mark.parametrize("case", ["settings", "finished"])
def test_checkpoints_of_other_settings_are_set_aside_and_of_another_stream_where_its_phase_was_finished(
    results: dict[str, Any], case: str
) -> None:
    assert results["foreign"][case] == ""
    assert {"checkpoints.outdated/step-00000001/state.pt", "weights.safetensors", "done.json"} <= results["aside"][case].keys()


def test_a_full_disk_at_the_end_of_a_phase_leaves_no_result(results: dict[str, Any]) -> None:
    full = results["full"]
    assert "No space left" in full["error"] or "too large" in full["error"]
    assert "done.json" not in full["left"] and "weights.safetensors" not in full["left"]
    assert not [name for name in full["left"] if ".tmp" in name or "weights" in name]
    if full["mounted"]:  # the last checkpoint was saved: nothing of the training is lost
        assert "checkpoints/step-00000002/manifest.json" in full["left"]


def test_a_second_launch_into_a_phase_at_work_is_refused(results: dict[str, Any]) -> None:
    assert "another launch is at work here (process" in results["taken"]
    assert "give this run another --run-dir" in results["taken"]
    assert results["free"] == ""


def test_after_a_full_disk_the_same_command_ends_with_the_same_files(results: dict[str, Any]) -> None:
    full = results["full"]
    assert full["again"] == ""
    assert full["then"].keys() == results["files"].keys()
    assert full["then"]["weights.safetensors"] == results["files"]["weights.safetensors"]
