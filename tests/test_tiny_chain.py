"""The whole chain of recipe `tiny` by the real command line and the real launcher, on two ranks; then the route with a teacher from a file.

Three trainings in module-scoped fixtures, with fewer epochs than the recipe's; every fact is a test of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from m2mkd_ds.config import load
from m2mkd_ds.data.index import ShardIndex
from tests.launching import launch

EPOCHS = {"pretrain_meta": 5, "modular_train": 4, "assemble_finetune": 2, "m2mkd": 4, "end_to_end": 3}
"""About half of the recipe's, in twice as large batches: a third of its steps."""

BATCHES = [f"{phase}.micro_batch_size=32" for phase in EPOCHS]
NODES = (
    "pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "assemble", "end_to_end", "baseline", "evaluate", "export",
    "report",
)  # fmt: skip
MODELS = {
    "meta", "teacher", "teacher_hybrid_0", "teacher_hybrid_1", "student_hybrid_0", "student_hybrid_1", "student_cold", "student",
    "baseline",
}  # fmt: skip
CHANCE = 0.1


def m2mkd(*words: str | Path, timeout_s: float = 280) -> str:
    """`m2mkd WORDS` in a fresh process; what it printed to stdout."""
    command = [sys.executable, "-m", "m2mkd_ds", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def planned(text: str) -> dict[str, str]:
    """{node: action} of a dry run's text."""
    rows = [line.split()[:2] for line in text.partition("\n\n")[0].splitlines() if not line.startswith(" ")]  # those go on
    return {name.rstrip(":"): action for action, name in rows}


def same_bits(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain")


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the first run of the whole chain printed."""
    epochs = [f"{phase}.epochs={count}" for phase, count in EPOCHS.items()]
    return m2mkd("pipeline", "--recipe", "tiny", "--run-dir", folder / "tiny", "--set", *epochs, "--set", *BATCHES)


@pytest.fixture(scope="module")
def run(folder: Path, printed: str) -> Path:
    """The finished run folder; tests must not change it."""
    return folder / "tiny"


@pytest.fixture(scope="module")
def results(run: Path) -> dict[str, Any]:
    return read(run / "evaluate" / "results.json")


def test_every_node_is_done(run: Path) -> None:
    for name in NODES:
        done = read(run / name / "done.json")
        assert done["node"] == name and done["wall_s"] > 0 and done["files"]
        for relative, entry in done["files"].items():
            assert (run / name / relative).stat().st_size == entry["bytes"]
    steps = {name: read(run / name / "done.json").get("steps") for name in NODES}
    # 1,438 images, 32 a rank and step: 22.47 steps an epoch
    assert (steps["pretrain_meta"], steps["m2mkd"], steps["end_to_end"]) == (112, 90, 67)
    assert steps["baseline"] == steps["m2mkd"] + steps["end_to_end"]


def test_the_data_are_the_digits_beside_the_run(folder: Path, run: Path) -> None:
    config = load(run / "config.yaml")
    assert config.data.train == str(folder / "shards" / "digits" / "train")
    assert (ShardIndex.load(config.data.train).num_samples, ShardIndex.load(config.data.validation).num_samples) == (1438, 359)


def test_results_hold_every_model_with_exact_counts(run: Path, results: dict[str, Any]) -> None:
    """Counted again from the stored predictions and the labels of the shards."""
    index = ShardIndex.load(load(run / "config.yaml").data.validation)
    predictions = read(run / "evaluate" / "predictions.json")
    assert results["models"].keys() == predictions.keys() == MODELS
    assert (results["num_images"], results["world_size"], results["seed"]) == (359, 2, 0)
    for name, model in results["models"].items():
        hits = sum(p == int(label) for p, label in zip(predictions[name], index.labels_N, strict=True))
        agree = sum(p == t for p, t in zip(predictions[name], predictions["teacher"], strict=True))
        assert (model["images"], model["top1"], model["agreement_with_teacher"]) == (359, hits / 359, pytest.approx(agree / 359))
        assert 0 <= model["top1_ci"][0] <= model["top1"] <= model["top1_ci"][1] <= 1
        assert model["top5"] >= model["top1"] and model["loss"] > 0
    assert results["student_minus_baseline"]["top1"] == pytest.approx(
        results["models"]["student"]["top1"] - results["models"]["baseline"]["top1"]
    )


def test_load_and_entropy_of_every_sparse_block(results: dict[str, Any]) -> None:
    for name in ("student_cold", "student", "baseline"):
        loads = results["expert_load"][name]
        assert list(loads) == ["0", "1", "2", "3"]
        # 359 images of 17 tokens (4 x 4 patches and the class token), two experts each
        assert all(len(load) == 4 and sum(load) == 359 * 17 * 2 for load in loads.values())
        assert all(0 <= entropy <= 1.387 for entropy in results["entropy"][name].values())  # ln 4 = 1.3863


def test_sizes_are_those_of_the_files(run: Path, results: dict[str, Any]) -> None:
    def total(file: Path) -> int:
        return sum(t.numel() for t in load_file(file).values())

    assert results["models"]["teacher"]["parameters"] == total(run / "assemble_finetune" / "weights.safetensors")
    student = results["models"]["student"]
    assert student["parameters"] == total(run / "end_to_end" / "weights.safetensors")
    assert student["active_parameters"] < student["parameters"]


@pytest.mark.parametrize("name", sorted(MODELS - {"student_cold"}))
def test_every_trained_model_is_far_above_chance(results: dict[str, Any], name: str) -> None:
    assert results["models"][name]["top1_ci"][0] > 3 * CHANCE


def test_pairs_and_modules_hold_the_blocks_of_their_stage(run: Path) -> None:
    for pair, blocks in ((0, {"0", "1"}), (1, {"2", "3"})):
        for file in (run / "split" / f"module_{pair}.safetensors", run / "m2mkd" / f"pair_{pair}" / "weights.safetensors"):
            assert {name.split(".")[1] for name in load_file(file) if name.startswith("blocks.")} == blocks


def test_the_table_and_the_report_tell_the_result(run: Path, printed: str, results: dict[str, Any]) -> None:
    student = f"{100 * results['models']['student']['top1']:.2f}"
    assert re.search(rf"^student, final +{student} ", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == f"report: {run}/report/report.html"
    for name in ("report.html", "report.md"):
        assert student in (run / "report" / name).read_text()
    report = read(run / "report" / "report.json")
    assert report["results"]["models"] == results["models"]
    assert "data:image/svg+xml;base64," in (run / "report" / "report.html").read_text()


def test_curves_reach_the_last_step(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "m2mkd" / "pair_1" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 90 and "eval/top1" in lines[-1] and {"task", "kd", "kd_grad_norm", "moe/2/load"} <= lines[0].keys()
    assert lines[-1]["loss"] < lines[0]["loss"]


CLASSIFY = """
import io, json, sys, tarfile
from PIL import Image
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1], trust_remote_code=True, device="cpu")
with tarfile.open(sys.argv[2]) as tar:
    members = [m for m in tar if m.name.endswith(".png")][:40]
    images = [Image.open(io.BytesIO(tar.extractfile(m).read())).convert("RGB") for m in members]
try:
    import m2mkd_ds
except ImportError:
    print(json.dumps({m.name: classify(image)[0]["label"] for m, image in zip(members, images)}))
"""


def test_the_exported_folder_classifies_as_the_evaluation_did(folder: Path, run: Path) -> None:
    """By transformers alone, in a process that cannot import this package."""
    shards = Path(load(run / "config.yaml").data.validation)
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-c", CLASSIFY, str(run / "export" / "model"), str(shards / "shard-000000.tar")]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    labels = json.loads(done.stdout.splitlines()[-1])
    index = ShardIndex.load(shards)
    ours = read(run / "evaluate" / "predictions.json")["student"]
    expected = {f"{index.read(i)[2]}.png": index.class_names[ours[i]] for i in range(40)}
    # a resize by Pillow of another layer may flip a tie, not more
    assert labels.keys() == expected.keys()
    assert sum(labels[key] != expected[key] for key in expected) <= 1


def test_the_eval_verb_scores_the_exported_folder_like_the_run(run: Path, results: dict[str, Any]) -> None:
    config = load(run / "config.yaml")
    score = json.loads(m2mkd("eval", run / "export" / "model", "--validation", config.data.validation))
    ours = results["models"]["student"]
    assert (score["images"], score["top1"], score["top5"]) == (359, ours["top1"], ours["top5"])
    assert score["loss"] == pytest.approx(ours["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("file", "model"),
    [
        ("pretrain_meta/weights", "meta"), ("assemble_finetune/weights", "teacher"), ("split/module_1", "teacher_hybrid_1"),
        ("m2mkd/pair_0/weights", "student_hybrid_0"), ("baseline/weights", "baseline"),
    ],
)  # fmt: skip
def test_the_eval_verb_scores_a_weights_file_like_the_run(run: Path, results: dict[str, Any], file: str, model: str) -> None:
    score = json.loads(m2mkd("eval", run / f"{file}.safetensors"))
    assert (score["images"], score["top1"]) == (359, results["models"][model]["top1"])


def test_the_eval_verb_leaves_the_runs_results_alone_when_it_scores_other_shards(run: Path) -> None:
    before = (run / "evaluate" / "results.json").read_bytes()
    text = m2mkd("eval", run, "--validation", load(run / "config.yaml").data.train)
    assert "1,438 validation images" in text
    assert (run / "evaluate" / "results.json").read_bytes() == before


def test_the_second_call_skips_everything_and_is_quick(run: Path) -> None:
    before = {name: (run / name / "done.json").read_bytes() for name in NODES}
    started = time.monotonic()
    text = m2mkd("pipeline", "--config", run / "config.yaml")
    assert time.monotonic() - started < 60  # the first took this long on an idle machine; this one some seconds
    assert {name: (run / name / "done.json").read_bytes() for name in NODES} == before
    assert "student, final" in text


def test_a_report_made_by_hand_leaves_the_run_finished(run: Path) -> None:
    m2mkd("report", run)
    assert set(planned(m2mkd("pipeline", "--config", run / "config.yaml", "--dry-run")).values()) == {"skip"}


def test_another_clipping_of_m2mkd_reruns_m2mkd_and_what_hangs_on_it(run: Path) -> None:
    before = (run / "config.yaml").read_bytes()
    text = m2mkd("pipeline", "--config", run / "config.yaml", "--set", "m2mkd.clip_grad=0.5", "--dry-run")
    actions = planned(text)
    assert [name for name in NODES if actions[name] == "run"] == ["m2mkd", "assemble", "end_to_end", "evaluate", "export", "report"]
    assert [name for name in NODES if actions[name] == "skip"] == [
        "pretrain_meta",
        "modular_train",
        "assemble_finetune",
        "split",
        "baseline",
    ]
    assert "m2mkd.clip_grad changed: 1.0 -> 0.5" in text
    assert f"--config {run}/config.yaml --phase m2mkd,assemble,end_to_end,evaluate" in text.replace(" \\\n    ", " ")
    assert (run / "config.yaml").read_bytes() == before


@pytest.fixture(scope="module")
def copied(folder: Path, run: Path, repo_root: Path) -> Path:
    """A copy of the run in which one pair was trained again by the plain launcher, with another engine."""
    copy = folder / "copied"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "m2mkd" / "pair_1")
    (copy / "m2mkd" / "done.json").unlink()
    words = ["train", "--config", str(copy / "config.yaml"), "--phase", "m2mkd", "--pair", "1"]
    engine = ["--deepspeed", "--deepspeed_config", str(repo_root / "ds_configs" / "zero2.json")]
    launch("m2mkd_ds", [*words, *engine], ranks=2, module=True, timeout_s=200)
    return copy


def test_one_pair_by_the_plain_launcher_gives_the_weights_of_the_pipeline(run: Path, copied: Path) -> None:
    done = read(copied / "m2mkd" / "pair_1" / "done.json")
    assert done["layout"]["m2mkd.ds_config"].endswith("ds_configs/zero2.json") and done["world_size"] == 2
    ours, theirs = (load_file(f / "m2mkd" / "pair_1" / "weights.safetensors") for f in (copied, run))
    # ZeRO-2 may add up gradients in another order than ZeRO-1; the weights themselves moved by about lr * steps = 0.1
    assert ours.keys() == theirs.keys() and max(float((ours[k] - theirs[k]).abs().max()) for k in ours) < 1e-6


def test_a_phase_of_a_copied_run_leaves_the_original_alone(run: Path, copied: Path) -> None:
    assert read(run / "m2mkd" / "pair_1" / "done.json")["layout"]["m2mkd.ds_config"] == "zero1"
    assert load(run / "config.yaml").run_dir == str(run)
    assert same_bits(run / "m2mkd" / "pair_0" / "weights.safetensors", copied / "m2mkd" / "pair_0" / "weights.safetensors")


def test_a_pair_trained_with_another_engine_completes_its_node(copied: Path) -> None:
    actions = planned(m2mkd("pipeline", "--config", copied / "config.yaml", "--dry-run"))
    assert actions["m2mkd"] == actions["split"] == "skip"  # ZeRO stages are layout, not result


def test_a_finished_run_outlives_another_layout_of_the_same_batch(run: Path) -> None:
    layout = [f"{phase}.gradient_accumulation_steps=2" for phase in EPOCHS]
    one_rank = m2mkd("pipeline", "--config", run / "config.yaml", "--set", "launch.num_gpus=1", *layout, "--dry-run")
    assert set(planned(one_rank).values()) == {"skip"}
    two_ranks = m2mkd("pipeline", "--config", run / "config.yaml", "--set", layout[0], "--dry-run")
    assert planned(two_ranks)["pretrain_meta"] == "run"
    assert "the global batch of pretrain_meta changed: 32 x 2 ranks = 64 -> 64 x 2 ranks = 128" in two_ranks


@pytest.fixture(scope="module")
def pretrained(folder: Path, run: Path) -> Path:
    """The second way to a teacher: the first run's, saved by timm; chain until m2mkd."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=16, num_classes=10, patch_size=4, embed_dim=64, depth=4, num_heads=2)
    model.load_state_dict(load_file(run / "assemble_finetune" / "weights.safetensors"))
    torch.save(model.state_dict(), folder / "teacher.pth")
    settings = [f"teacher.weights={folder / 'teacher.pth'}", "pretrain_meta.epochs=4", "m2mkd.epochs=3", *BATCHES]
    m2mkd("pipeline", "--recipe", "tiny_pretrained", "--run-dir", folder / "pretrained", "--until", "m2mkd", "--set", *settings)
    return folder / "pretrained"


def test_a_teacher_file_of_timm_is_split_into_the_same_modules(run: Path, pretrained: Path) -> None:
    for pair in (0, 1):
        name = Path("split") / f"module_{pair}.safetensors"
        assert same_bits(run / name, pretrained / name)


def test_the_meta_model_follows_the_teacher_that_it_was_given(pretrained: Path) -> None:
    lines = [json.loads(line) for line in (pretrained / "pretrain_meta" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["align"] < 0.7 * lines[0]["align"]
    assert lines[-1]["eval/top1"] > 3 * CHANCE


def test_the_students_of_a_given_teacher_learn(pretrained: Path) -> None:
    for pair in (0, 1):
        lines = [json.loads(line) for line in (pretrained / "m2mkd" / f"pair_{pair}" / "metrics.jsonl").read_text().splitlines()]
        assert lines[-1]["eval/top1"] > 3 * CHANCE and lines[-1]["kd"] < lines[0]["kd"]
    assert read(pretrained / "m2mkd" / "done.json")["files"].keys() == {f"pair_{i}/weights.safetensors" for i in (0, 1)}
    assert not (pretrained / "assemble").exists() and not (pretrained / "modular_train").exists()
