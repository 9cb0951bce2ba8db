"""`m2mkd few-shot` as a job: on one and two ranks, stopped and gone on, on a run and its export. Random weights: only sameness counts."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.checkpoint.hf.export import export_hf
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.cli import main
from m2mkd_ds.config import RunConfig, dump
from m2mkd_ds.data.few_shot import EpisodeSampler, EpisodeShape
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.models.vmoe import VisionMoE, arch_from_config
from m2mkd_ds.report import build_report
from m2mkd_ds.train.few_shot.config import FitConfig
from m2mkd_ds.train.few_shot.models import open_candidates
from m2mkd_ds.train.few_shot.run import play
from tests.launching import launch
from tests.train.finished_run import tiny_config

SHAPE = ("--ways", "3", "--shots", "2", "--steps", "12", "--warmup-steps", "2")
CPU = torch.device("cpu")

M2mkd = Callable[..., tuple[int, str, str]]


def student(config: RunConfig, seed: int) -> VisionMoE:
    arch = arch_from_config(config)
    return VisionMoE(arch, StageSpan.whole(arch.num_blocks), seed=seed)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, digits_shards: Path) -> Path:
    """A run whose student, control and teacher are fresh weights."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(folder, digits_shards)
    (folder / "config.yaml").write_text(dump(config))
    arch = VitArch.from_teacher(config)
    modules = [build_stage(arch, span, seed=3) for span in stage_spans(config.teacher.depths)]
    weights = {"end_to_end/weights": student(config, 1), "baseline/weights": student(config, 2)}
    for name, module in {**weights, **{f"split/module_{i}": module for i, module in enumerate(modules)}}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        save_weights(folder / f"{name}.safetensors", module.state_dict())
    return folder


@pytest.fixture
def m2mkd(capfd: pytest.CaptureFixture[str]) -> Iterator[M2mkd]:
    """`m2mkd few-shot WORDS` in this process; the environment is put back afterwards."""
    environment = dict(os.environ)

    def call(*words: object) -> tuple[int, str, str]:
        code = 0
        try:
            main(["few-shot", *map(str, words)])
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capfd.readouterr()

    yield call
    os.environ.clear()
    os.environ.update(environment)


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_ranks_stops_and_models(run_folder: Path, tmp_path: Path, m2mkd: M2mkd) -> None:
    words = (run_folder, *SHAPE, "--model", "student", "--model", "baseline", "--model", "teacher")
    # 1. Two ranks by the launcher, then one: byte for byte the same.
    launch("m2mkd_ds", ["few-shot", *map(str, words), "--episodes", "5", "--out", str(tmp_path / "two")], module=True)
    code, printed, _ = m2mkd(*words, "--episodes", "5", "--out", tmp_path / "one")
    assert code == 0
    one, two = (tmp_path / name / "linear_3way_2shot" for name in ("one", "two"))
    assert sorted(p.name for p in one.iterdir()) == ["episodes.jsonl", "result.json", "settings.json"]
    for name in ("episodes.jsonl", "result.json", "settings.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes()
    found = result(one)
    assert list(found["models"]) == ["student", "baseline", "teacher"]
    assert list(found["differences"]) == ["student_minus_baseline", "student_minus_teacher"]
    assert "5 episodes of 3-way 2-shot with 6 other images of each class" in printed
    assert "student, final minus V-MoE from scratch, episode by episode" in printed

    # 2. A job that was killed: two finished episodes of two ranks, one of them marked, and half a line.
    lines = (one / "episodes.jsonl").read_text().splitlines(keepends=True)
    marked = json.loads(lines[2])
    marked["correct"] = dict.fromkeys(marked["correct"], 18)
    (two / "result.json").unlink()
    (two / "episodes.jsonl").unlink()
    (two / "episodes.0.jsonl").write_text(json.dumps(marked) + "\n" + lines[4][:20])
    (two / "episodes.1.jsonl").write_text(lines[1])
    assert m2mkd(*words, "--episodes", "5", "--out", tmp_path / "two")[0] == 0
    after = (two / "episodes.jsonl").read_text().splitlines(keepends=True)
    assert [*after[:2], *after[3:]] == [*lines[:2], *lines[3:]]
    assert json.loads(after[2]) == marked  # kept, not played again
    assert not list(two.glob("episodes.*.jsonl"))

    # 3. More episodes of the same settings are added; other settings are refused with what differs.
    assert m2mkd(*words, "--episodes", "6", "--out", tmp_path / "one")[0] == 0
    assert (one / "episodes.jsonl").read_text().startswith("".join(lines))
    assert result(one)["episodes"] == 6
    code, _, errors = m2mkd(*words, "--seed", "1", "--out", tmp_path / "one")
    assert code == 2
    assert "holds episodes of other settings (seed: 0 there, 1 now)" in errors


def test_the_verb_draws_from_the_runs_own_shards_and_the_report_lists_it(run_folder: Path, m2mkd: M2mkd) -> None:
    assert m2mkd(run_folder, *SHAPE, "--episodes", "2", "--name", "mine")[0] == 0
    found = result(run_folder / "few_shot" / "mine")
    shards = Path(tiny_folder(run_folder))
    assert found["support"] == ShardIndex.load(shards / "train").fingerprint
    assert found["query"] == ShardIndex.load(shards / "validation").fingerprint
    assert list(found["models"]) == ["student", "baseline"]
    page = build_report(run_folder)
    for text in (page.read_text(), page.with_name("report.md").read_text()):
        assert "Few-shot learning" in text
        assert f"{100 * found['models']['student']['accuracy']:.2f}" in text
    assert json.loads(page.with_name("report.json").read_text())["few_shot"]["mine"] == found


def tiny_folder(run: Path) -> str:
    from m2mkd_ds.config import load

    return str(Path(load(run / "config.yaml").data.train).parent)


def test_an_export_gives_what_its_run_gives(run_folder: Path, digits_shards: Path, tmp_path: Path, m2mkd: M2mkd) -> None:
    config = tiny_config(run_folder, digits_shards)
    names = [str(i) for i in range(10)]
    weights = student(config, 1).state_dict()
    export = export_hf(weights, arch_from_config(config), tmp_path / "model", class_names=names, data=config.data, license="mit")
    shared = (*SHAPE, "--episodes", "2", "--support", digits_shards / "train")
    code, printed, _ = m2mkd(export, *shared)
    assert code == 0
    ours = tmp_path / "model_few_shot" / "linear_3way_2shot"
    assert str(ours / "result.json") in printed
    assert m2mkd(run_folder, *shared, "--model", "student", "--out", tmp_path / "run")[0] == 0
    theirs = tmp_path / "run" / "linear_3way_2shot"
    assert result(ours)["models"]["model"] == result(theirs)["models"]["student"]
    assert sorted(path.name for path in export.iterdir()) == sorted(
        [*json.loads((export / "manifest.json").read_text())["files"], "manifest.json"]
    )


def test_finetuning_episodes_do_not_know_of_one_another(run_folder: Path, digits_shards: Path) -> None:
    sampler = EpisodeSampler(ShardIndex.load(digits_shards / "train"), None, EpisodeShape(3, 1), 0)
    fit = FitConfig(protocol="finetune", steps=3, warmup_steps=1, augment=True)

    def played(*numbers: int) -> list[dict[str, Any]]:
        return list(play(open_candidates(run_folder, ["student", "teacher"], 3, 0.1, CPU), sampler, fit, numbers, CPU))

    whole = played(0, 1, 2, 3)
    assert whole == sorted(played(1, 3) + played(2, 0), key=lambda record: record["episode"])
    assert len({json.dumps(record["classes"]) for record in whole}) > 1
    assert all(record["queries"] == 9 and set(record["correct"]) == {"student", "teacher"} for record in whole)


def test_what_a_user_can_get_wrong_is_one_sentence(run_folder: Path, digits_shards: Path, tmp_path: Path, m2mkd: M2mkd) -> None:
    (tmp_path / "config.json").write_text("{}")
    train = digits_shards / "train"
    for words, message in (
        ((tmp_path,), "few-shot on an exported folder needs --support"),
        ((tmp_path, "--support", train, "--model", "student"), "holds one model; leave --model out"),
        ((tmp_path / "nothing", "--support", train), "neither a run folder (config.yaml) nor an exported folder"),
        ((run_folder, "--query", train), "--query needs --support"),
        ((run_folder, "--episodes", 0), "--episodes is 0"),
        ((run_folder, "--model", "pupil"), "give each of student, baseline, student_cold, teacher at most once"),
        ((run_folder, "--model", "student", "--model", "student"), "--model student: give each of"),
        ((run_folder, "--model", "student_cold"), "the run has no student_cold yet"),
        ((run_folder, "--ways", 11), "10 classes have images, and 11 ways need as many"),
        ((run_folder, "--shots", 5, "--queries", 90), "different images, and an episode needs 90 query images of a class"),
        ((run_folder, "--steps", 10), "steps is 10 and warmup_steps is 20"),
    ):
        code, _, errors = m2mkd(*words)
        assert (code, message in errors) == (2, True), (words, errors)
