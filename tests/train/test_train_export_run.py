"""Exporting from a run folder: each of its models, checked in a fresh process; the card's facts; what a public card must not say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.hf.load import load_exported
from m2mkd_ds.checkpoint.store import write_json_atomic
from m2mkd_ds.config import ConfigError, RunConfig, TeacherConfig
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.exports.export_card import card
from m2mkd_ds.train.exports.export_run import export_run
from tests.train.exportable_run import make_run


@pytest.fixture
def ctx(tmp_path: Path, digits_shards: Path) -> RunContext:
    return make_run(tmp_path / "run", digits_shards)


def weights_file(ctx: RunContext, node: str) -> Path:
    return ctx.root / node / "weights.safetensors"


def test_the_baseline_is_exported_without_stitches_and_says_what_it_is(ctx: RunContext) -> None:
    folder = export_run(ctx.config, ctx.root / "out", what="baseline", dtype="fp32")
    assert load_exported(folder).stitches == ()
    text = (folder / "README.md").read_text()
    assert "trained from scratch on labels alone" in text and "| top1 | 0.8 | 0.79 to 0.81 |" in text


def test_the_card_holds_the_models_own_numbers(ctx: RunContext) -> None:
    student = card(ctx, "student", "student", weights_file(ctx, "end_to_end"))
    assert student["metrics"]["top1"] == 0.9 and student["metrics"]["top1_minus_baseline_ci"] == [0.05, 0.15]
    assert student["experts"][1] == {"block": 2, "load": [1, 1, 1, 1], "entropy": 1.0, "drop_rate": 0.25}
    assert "origin" not in student
    assembled = card(ctx, "assembled", "student_cold", weights_file(ctx, "assemble"))
    assert assembled["metrics"]["top1"] == 0.1 and "top1_minus_baseline" not in assembled["metrics"] and assembled["experts"] == []
    assert "not trained since" in assembled["origin"]
    lineage = student["lineage"]
    assert lineage["train_data"] == ctx.train_index.fingerprint and lineage["validation_data"] == ctx.val_index.fingerprint
    assert lineage["weights.recipe"] == "tiny" and "by Deep Incubation in this run" in lineage["teacher"]


def test_the_card_lists_what_was_trained(ctx: RunContext) -> None:
    record = ctx.root / "pretrain_meta" / "done.json"
    done = json.loads(record.read_text()) | {
        "steps": 360,
        "images": 11520,
        "world_size": 2,
        "wall_s": 7200.0,
        "device": "CPU (x86_64)",
        "commit": "0123abc",
    }
    write_json_atomic(record, done)
    training = card(ctx, "student", "student", weights_file(ctx, "end_to_end"))["training"]
    assert training == [
        {
            "phase": "pretrain_meta",
            "steps": 360,
            "images": 11520,
            "ranks": 2,
            "hours": 2.0,
            "device of a rank": "CPU (x86_64)",
            "commit": "0123abc",
        }
    ]


def test_the_card_names_no_host_and_no_folder(ctx: RunContext, tmp_path: Path) -> None:
    teacher = TeacherConfig(
        arch=ctx.config.teacher.arch, arch_args=ctx.config.teacher.arch_args, depths=ctx.config.teacher.depths,
        feed="remote", endpoints=("secret-host.example:8815",), tls_ca=str(tmp_path / "ca.pem"), tls_cert=str(tmp_path / "cert.pem"),
        tls_key=str(tmp_path / "key.pem"),
    )  # fmt: skip
    config: RunConfig = replace(ctx.config, teacher=teacher, m2mkd=replace(ctx.config.m2mkd, ds_config=str(tmp_path / "fast.json")))
    text = repr(card(replace(ctx, config=config), "student", "student", weights_file(ctx, "end_to_end")))
    assert "secret-host" not in text and str(tmp_path) not in text and "key.pem" not in text and "'ds_config': 'fast'" in text


def test_a_model_that_the_run_does_not_hold_is_refused(ctx: RunContext) -> None:
    weights_file(ctx, "baseline").unlink()
    with pytest.raises(ConfigError, match=r"baseline/weights.safetensors: no such file; the run holds no baseline yet, or trains none"):
        export_run(ctx.config, ctx.root / "out", what="baseline", dtype="fp32")
    assert not (ctx.root / "out").exists()
