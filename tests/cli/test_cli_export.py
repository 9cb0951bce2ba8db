"""The verb export: where folders go, what a dry run prints, and the exit codes of a push."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.hf.load import load_exported
from m2mkd_ds.cli import main
from m2mkd_ds.cli.export import default_target
from m2mkd_ds.config import dump
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.phases.end_to_end import student_stitches
from tests.checkpoint.exported_models import export, make_model
from tests.train.exportable_run import make_run


@pytest.fixture
def digits_shards(tmp_path: Path) -> Path:
    make_source("digits", tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return export(make_model(), tmp_path / "exported")


def test_folders_by_default() -> None:
    run = Path("run")
    assert default_target(run, "student", "fp32") == Path("run/export/model")
    assert default_target(run, "student", "bf16") == Path("run/export/student-bf16")
    assert default_target(run, "baseline", "fp32") == Path("run/export/baseline-fp32")


def test_a_student_is_exported_as_the_words_say(tmp_path: Path, digits_shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ctx, target = make_run(tmp_path / "run", digits_shards), tmp_path / "target"
    words = ["--dtype", "fp16", "--max-shard-size", "100KB", "--licence", "apache-2.0"]
    main(["export", str(ctx.root), str(target), "--out", str(target), *words])
    assert capsys.readouterr().out == f"{target}\n" and not (ctx.root / "export").exists()
    exported = load_exported(target)
    assert exported.stitches == student_stitches(ctx) and len(exported.stitches) == 2
    assert exported.data.crop_pct == pytest.approx(0.9, abs=0.05)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert "license: apache-2.0" in (target / "README.md").read_text()
    assert json.loads((target / "config.json").read_text())["dtype"] == "float16"


def test_a_dry_run_prints_the_plan_and_leaves_nothing(
    tmp_path: Path, digits_shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run(tmp_path / "run", digits_shards).root
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = sorted(root.rglob("*"))
    main(["export", str(root), "--what", "assembled", "--push", "me/vmoe", "--private", "--dry-run"])
    printed = capsys.readouterr().out
    assert printed.startswith("repository  me/vmoe (private), branch main\ncommit      one, ") and "model.safetensors" in printed
    assert "name: V-MoE assembled of recipe tiny" in printed
    assert sorted(root.rglob("*")) == before and not any((tmp_path / "temporary").iterdir())


def test_an_exported_folder_is_described_as_it_is(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", str(folder), "--push", "me/vmoe", "--revision", "v1", "--dry-run"])
    assert capsys.readouterr().out.startswith("repository  me/vmoe (public), branch v1\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--private"], "--private, --revision and --dry-run say how to push; give --push USER/NAME too"),
        (["--dry-run"], "--private, --revision and --dry-run say how to push; give --push USER/NAME too"),
        (["one", "--out", "two"], "the target folder is given twice: one and --out two; give one"),
        (["--push", "vmoe"], "--push is 'vmoe'; expected USER/NAME or ORGANISATION/NAME"),
        ([], "is an exported folder: it is pushed as it is (--push USER/NAME); all else needs a run folder"),
        (["--push", "me/vmoe", "--dtype", "bf16"], "is an exported folder: it is pushed as it is"),
    ],
)
def test_wrong_usage_is_one_sentence_and_exit_code_2(
    words: list[str], sentence: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", str(folder), *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and sentence in error and error.count("\n") == 1


def test_a_wrong_repository_is_said_before_a_run_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(dump(get_recipe("tiny")))
    with pytest.raises(SystemExit) as ended:
        main(["export", str(tmp_path), "--push", "vmoe"])
    assert ended.value.code == 2 and capsys.readouterr().err == "m2mkd: --push is 'vmoe'; expected USER/NAME or ORGANISATION/NAME\n"


def test_exit_codes_of_a_push(folder: Path, tmp_path: Path) -> None:
    """2 for what the user can mend, 1 for a network that is gone."""

    def ends(**environment: str) -> tuple[int, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        command = [sys.executable, "-m", "m2mkd_ds", "export", str(folder), "--push", "me/vmoe"]
        env |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
        return done.returncode, done.stderr.splitlines()[-1]

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        code, said = ends(HF_ENDPOINT=nobody, HF_TOKEN="hf_abc")
        assert code == 1 and said.startswith(f"m2mkd: {nobody} cannot be reached (") and "hf_abc" not in said
        assert ends(HF_ENDPOINT=nobody) == (
            2, "m2mkd: there is no token of the Hugging Face hub on this machine; run `hf auth login`, or set HF_TOKEN",
        )  # fmt: skip
