"""The command line: help, overrides, what launchers add, and one clear sentence with exit code 2 for what a user can cause."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from m2mkd_ds.checkpoint.hf.push import HubError
from m2mkd_ds.cli import join_overrides, take_launcher_flags
from m2mkd_ds.cli.app import app
from m2mkd_ds.config import dump, load
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.distributed.start.rendezvous import MissingRanksError
from m2mkd_ds.recipes import RECIPES, get_recipe
from m2mkd_ds.teacher.client.links import TeacherLostError, TeacherRefusedError
from m2mkd_ds.train.ending.guard import PeerLostError, exit_code
from m2mkd_ds.train.ending.stopping import StopRequested
from m2mkd_ds.train.launching.launch import LaunchError
from m2mkd_ds.train.loop import NonFiniteLossError
from tests.checkpoint.legacy_models import DEPTHS, LegacyModel, saved, student
from tests.cli.ended import Ended, Run

VERBS = (
    "recipes", "shards", "pipeline", "train", "eval", "few-shot", "report", "inspect", "consolidate", "reshard", "import", "export",
    "export-timm", "export-teacher", "onnx", "teacher-server", "teacher-export", "plan", "probe-batch", "doctor", "bench",
)  # fmt: skip
"""As a user meets them: data, training, results, checkpoints, exports, a teacher elsewhere, what it needs, measurements."""


@pytest.fixture
def run(m2mkd: Run) -> Run:
    """`m2mkd WORDS`, in an empty folder."""
    return m2mkd


def printed_config(ended: Ended) -> dict[str, object]:
    """The YAML that `m2mkd recipes NAME` prints under the recipe's description."""
    assert ended.code == 0, ended.err
    return yaml.safe_load("name:" + ended.out.partition("\nname:")[2])


def test_help_lists_every_verb_in_a_users_order_and_every_verb_has_help(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0 and tuple(re.findall(r"• (\S+)", ended.out)) == VERBS
    assert "Registered by no file" not in ended.out
    for verb in VERBS:
        ended = run(verb, "--help")
        assert ended.code == 0 and ended.out.startswith(f"usage: m2mkd {verb}"), verb
        assert len(ended.out.splitlines()) > 3


def test_the_module_and_its_version() -> None:
    done = subprocess.run([sys.executable, "-m", "m2mkd_ds", "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip().count(".") >= 1 and done.stderr == ""


def test_recipes_are_listed_with_their_first_line(run: Run) -> None:
    lines = run("recipes").out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert "1,797 digits" in lines[0]


OVERRIDES = [
    ["--set", "m2mkd.lr=1e-4", "seed=3"],
    ["--set", "m2mkd.lr=1e-4", "--set", "seed=3"],
    ["--set=m2mkd.lr=1e-4", "--set=seed=3"],
    ["--set", "m2mkd.lr=1e-4", "--local_rank=0", "--set", "seed=3"],
]


@pytest.mark.parametrize("words", OVERRIDES, ids=[" ".join(words) for words in OVERRIDES])
def test_overrides_as_a_list_and_as_a_repeated_flag_mean_the_same(run: Run, words: list[str]) -> None:
    tree = printed_config(run("recipes", "tiny", *words))
    assert tree["seed"] == 3 and tree["m2mkd"]["lr"] == 1e-4  # type: ignore[index]


def test_the_later_override_wins(run: Run) -> None:
    assert printed_config(run("recipes", "tiny", "--set", "seed=1", "--set", "seed=2"))["seed"] == 2


def test_words_behind_overrides_stay_words() -> None:
    words = ["recipes", "--set", "a=1", "b=2", "tiny", "c=3", "--set", "d", "e", "--only", "x=y"]
    # `d` is refused later as an override without `=`; `c=3` and `x=y` do not follow --set or one of its values
    assert join_overrides(words) == ["recipes", "tiny", "c=3", "e", "--only", "x=y", "--set", "a=1", "b=2", "d"]
    assert join_overrides(["eval", "RUN"]) == ["eval", "RUN"]
    assert join_overrides(["recipes", "tiny", "--set", "--help"]) == ["recipes", "tiny", "--help"]


FLAGS = ["--local_rank=1", "--deepspeed", "--deepspeed_config", "x/zero2.json"]


@pytest.mark.parametrize("place", range(4))
def test_what_the_launcher_and_its_users_add_is_taken_out_anywhere(place: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LOCAL_RANK", "M2MKD_DS_CONFIG"):
        monkeypatch.setenv(name, "")  # so that monkeypatch puts it back
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    words = ["train", "--phase", "m2mkd", "--set", "a=1", "b=2"]
    position = (0, 1, 3, len(words))[place]
    assert take_launcher_flags([*words[:position], *FLAGS, *words[position:]]) == words
    assert os.environ["LOCAL_RANK"] == "1"
    assert os.environ["M2MKD_DS_CONFIG"] == str(tmp_path / "x" / "zero2.json")


@pytest.mark.parametrize("flag", [["--local_rank", "1"], ["--local-rank=1"], ["--deepspeed-config=f.json"], []])
def test_other_spellings_of_the_launchers_flags(flag: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "5")  # what the launcher says by the environment counts
    monkeypatch.setenv("M2MKD_DS_CONFIG", "")
    assert take_launcher_flags(["recipes", *flag]) == ["recipes"]
    assert os.environ["LOCAL_RANK"] == "5"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipes", "tny"], "no recipe 'tny'; there are tiny, .*; did you mean tiny?"),
        (["recipes", "tiny", "--set", "m2mkd.lrr=1"], "--set m2mkd.lrr: no such field; did you mean m2mkd.lr?"),
        (["recipes", "tiny", "--set", "m2mkd.lr"], "--set 'm2mkd.lr': expected key=value"),
        (["recipes", "tiny", "--set", "m2mkd.lr", "1e-3"], "Unrecognized options: 1e-3"),
        (["recipes", "tiny", "--set", "seed=x"], "--set: seed: .*integer"),
        (["train", "--recipe", "tiny", "--phase", "m2mkdd"], "no node 'm2mkdd' in this run; allowed are .*m2mkd"),
        (["train", "--recipe", "tiny", "--phase", "m2mkd,export"], "--phase export: runs without ranks"),
        (["train", "--recipe", "tiny_pretrained", "--phase", "modular_train"], "no node 'modular_train' in this run"),
        (["train", "--recipe", "tiny", "--phase", "baseline", "--pair", "0"], "--pair 0: baseline has no pairs; leave --pair out, or give"),
        (["train", "--recipe", "tiny", "--phase", "m2mkd", "--pair", "7"], "--pair 7: there are 2 pairs"),
        (["train", "--phase", "m2mkd"], "give either --recipe NAME .* or --config RUN/config.yaml"),
        (["train", "--recipe", "tiny", "--config", "x.yaml", "--phase", "m2mkd"], "give either --recipe NAME"),
        (["train", "--config", "none.yaml", "--phase", "m2mkd"], "none.yaml: no such config file"),
        (["train", "--recipe", "tiny"], "Missing from CLI: --phase|required"),
        (["pipeline", "--recipe", "tiny", "--until", "split", "--set", "data.source="], "data.train is empty"),
        (["pipeline", "--recipe", "tiny", "--bogus"], "Unrecognized options: --bogus"),
        (["eval", "nowhere"], "nowhere: neither a run folder"),
        (["export", "nowhere"], "nowhere/config.yaml: no such config file"),
        (["shards", "write", "--source", "image_folder", "--out", "o"], "image_folder: needs --path"),
        (["import", "none.pth", "--out", "o.safetensors"], "none.pth"),
        (["shrads"], "Unrecognized options: shrads"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(run: Run, words: list[str], message: str) -> None:
    ended = run(*words)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.err
    text = " ".join(ended.err.replace("│", " ").split())
    pattern = message.replace("?", r"\?").replace("(", r"\(")
    assert re.search(pattern, text), text
    if ended.err.startswith("m2mkd:"):
        assert ended.err.count("\n") == 1
    assert not Path("runs").exists()  # nothing was made


@pytest.mark.parametrize("flag", ["--until", "--only"])
def test_a_misspelt_node_is_refused_with_the_names_of_the_run(run: Run, flag: str) -> None:
    ended = run("pipeline", "--recipe", "tiny", "--run-dir", "r", flag, "m2mdk", "--dry-run")
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(f"m2mkd: {flag} m2mdk: no such node in this run; allowed are pretrain_meta, modular_train")


def test_shards_verb_writes_both_splits_and_says_what_they_hold(run: Run, tmp_path: Path) -> None:
    ended = run("shards", "write", "--source", "digits", "--out", "digits")
    train, validation = ShardIndex.load(tmp_path / "digits" / "train"), ShardIndex.load(tmp_path / "digits" / "validation")
    assert train.num_samples + validation.num_samples == 1797
    assert ended.out.splitlines() == [
        f"digits/{name}: {index.num_samples} images, 10 classes, fingerprint {index.fingerprint[:16]}"
        for name, index in (("train", train), ("validation", validation))
    ]


def test_import_verb_converts_a_file_of_the_authors(run: Run, tmp_path: Path) -> None:
    model = LegacyModel(DEPTHS)
    saved(tmp_path / "teacher.pth", model.checkpoint())
    ended = run("import", "teacher.pth", "--out", "teacher.safetensors")
    assert ended.code == 0, ended.err
    assert ended.out.startswith("teacher.safetensors: ")
    tensors = load_file(tmp_path / "teacher.safetensors")
    assert torch.equal(tensors["blocks.4.mlp.fc1.weight"], model.blocks[4].mlp.fc1.weight)
    assert torch.equal(tensors["head.bias"], model.head.bias)


def test_import_verb_puts_a_student_stage_in_its_place(run: Run, tmp_path: Path) -> None:
    model = student(1, fused=False)
    saved(tmp_path / "student.pth", model.checkpoint())
    assert run("import", "student.pth", "--out", "o.safetensors").code == 2  # the file does not say which stage it is
    ended = run("import", "student.pth", "--out", "o.safetensors", "--depths", *map(str, DEPTHS), "--stage", "1")
    assert ended.code == 0, ended.err
    tensors = load_file(tmp_path / "o.safetensors")  # stage 1 is block 2
    assert torch.equal(tensors["blocks.2.moe.experts.up_proj"][1], model.blocks[0].moe.experts[1].htoh4.weight[0])


def test_a_config_file_belongs_to_the_folder_that_it_lies_in(run: Run, tmp_path: Path) -> None:
    """A run folder that was copied must not write into the one that it was copied from."""
    assert run("shards", "write", "--source", "digits", "--out", "shards/digits").code == 0
    (tmp_path / "copy").mkdir()
    moved = f"run_dir={tmp_path / 'original'}"
    config = get_recipe("tiny")
    (tmp_path / "copy" / "config.yaml").write_text(dump(config))
    ended = run("pipeline", "--config", "copy/config.yaml", "--set", moved, "--dry-run")
    assert f"--config {tmp_path / 'copy' / 'config.yaml'} " in ended.out
    ended = run("pipeline", "--config", "copy/config.yaml", "--run-dir", "other", "--dry-run")
    assert f"--config {tmp_path / 'other' / 'config.yaml'} " in ended.out
    (tmp_path / "mine.yaml").write_text(dump(config))
    ended = run("pipeline", "--config", "mine.yaml", "--set", moved, "--dry-run")
    assert f"--config {tmp_path / 'original' / 'config.yaml'} " in ended.out
    assert not (tmp_path / "original").exists() and load(tmp_path / "copy" / "config.yaml") == config


def test_what_the_system_refuses_is_said_without_its_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        Path("gone/run").mkdir()

    monkeypatch.setattr(app, "cli", refuse)
    assert run("report", "x") == (2, "", "m2mkd: gone/run: No such file or directory\n")


def test_ctrl_c_is_one_line_and_the_code_of_shells(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(**_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(app, "cli", interrupt)
    ended = run("report", "x")
    assert ended.code == 130 and ended.err.startswith("m2mkd: interrupted") and ended.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HubError("told"), 1),
        (MissingRanksError("told"), 1),
        (TeacherLostError("told"), 1),
        (TeacherRefusedError("told"), 2),
        (PeerLostError("told"), 1),
        (LaunchError("told"), 1),
        (LaunchError("told", 76), 76),  # of a job whose watchdog ended it
        (NonFiniteLossError("told"), 77),
        (StopRequested("m2mkd", 8, "SIGTERM"), 75),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_known_errors_are_one_line_and_their_own_code_here_and_in_a_jobs_records(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(app, "cli", fail)
    assert run("report", "x") == (code, "", f"m2mkd: {error}\n")
    assert exit_code(error) == code


def test_a_stop_that_another_process_tells_leaves_the_code_alone(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = StopRequested("m2mkd", 8, "SIGTERM")
    stopped.is_told = True

    def stop(**_: object) -> None:
        raise stopped

    monkeypatch.setattr(app, "cli", stop)
    assert run("train", "x") == (75, "", "")


def test_an_error_that_nobody_foresaw_keeps_its_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(app, "cli", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run("report", "x")


def test_debug_mode_shows_the_traceback(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("M2MKD_DEBUG", "1")
    with pytest.raises(ValueError, match="no recipe"):
        run("recipes", "tny")


def test_help_reads_well(run: Run) -> None:
    """No empty default, no doubled word, and one line or two for every verb."""
    verbs = "train", "pipeline", "recipes", "import", "shards index", "bench loader", "few-shot", "teacher-server", "teacher-export"
    for words in map(str.split, verbs):
        ended = run(*words, "--help")
        assert ended.code == 0 and "(default: )" not in ended.out and "options options" not in ended.out, ended.out
    assert "SHARDS" in run("few-shot", "--help").out  # its examples are there, and not in the list of verbs
    listed = run("--help").out.partition("few-shot  ")[2].partition("• report")[0]
    assert len(listed.splitlines()) <= 3 and "from a few images" in " ".join(listed.split())
