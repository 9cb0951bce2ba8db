"""`m2mkd shards write`: the help names every source and option, options that a source has no use for are refused, all are passed on."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from m2mkd_ds.cli.resolve import ensure_shards, resolve
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.source_options import SOURCE_USES, SourceName, SourceOptions, check_options
from m2mkd_ds.data.sources.registry import SOURCES, encode_png
from tests.cli.ended import Run


@pytest.fixture
def run(m2mkd: Run) -> Run:
    """`m2mkd shards write WORDS`, in an empty folder."""
    return lambda *words: m2mkd("shards", "write", *words)


def image_folder(root: Path) -> Path:
    for part, count in (("train", 30), ("val", 4)):
        for name in ("ant", "bee"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels_HW = np.full((20 + number, 40), 5 * number, np.uint8)
                (root / part / name / f"{number}.png").write_bytes(encode_png(pixels_HW))
    return root


def test_names_options_and_functions_are_the_same_list() -> None:
    assert list(SOURCES) == list(SOURCE_USES)
    assert set(get_args(SourceName)) == set(SOURCES)
    known = {field.name for field in fields(SourceOptions)}
    assert {option for use in SOURCE_USES.values() for option in use.options} == known
    for use in SOURCE_USES.values():
        assert {option for group in use.needs for option in group} <= set(use.options)


def test_help_names_every_source_and_option(run: Run) -> None:
    shown = run("--help").out
    for name in SOURCES:
        assert name in shown
    for flag in ("samples-per-shard", "seed", "resize-short", "quality", "workers", *(field.name for field in fields(SourceOptions))):
        assert f"--{flag.replace('_', '-')} " in shown
    assert "--resize-short 384 --quality 90" in shown


def test_all_options_of_writing_are_passed_on(run: Run, tmp_path: Path) -> None:
    image_folder(tmp_path / "set")
    words = (
        "--source",
        "image_folder",
        "--path",
        "set",
        "--samples-per-shard",
        "25",
        "--resize-short",
        "30",
        "--quality",
        "70",
        "--seed",
        "4",
    )
    ended = run(*words, "--out", "o", "--workers", "2")
    assert ended.code == 0, ended.err
    train, validation = (ShardIndex.load(tmp_path / "o" / part) for part in ("train", "validation"))
    assert [shard.num_samples for shard in train.shards] == [25, 25, 10]
    wanted = {"samples_per_shard": 25, "seed": 4, "resize_short": 30, "quality": 70}
    assert {key: train.request[key] for key in wanted} == wanted
    # Heights are 20 to 49; those above 30 are 19 of each class, and of the 4 validation heights none.
    assert sum(row["extension"] == b"jpg" for row in train.table) == 38
    assert {row["extension"] for row in validation.table} == {b"png"}
    assert f"o/train: 60 images, 2 classes, fingerprint {train.fingerprint[:16]}" in ended.out
    assert run(*words, "--out", "p", "--workers", "1").code == 0
    assert ShardIndex.load(tmp_path / "p" / "train").fingerprint == train.fingerprint


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits", "--path", "x"], "data source digits: has no use for --path; it takes no options of its own"),
        (
            ["image_folder", "--path", "x", "--num-classes", "3", "--hf-name", "y"],
            "has no use for --hf-name, --num-classes; it takes --path",
        ),
        (["tar"], "data source tar: needs --train-tars; see `m2mkd shards write --help`"),
        (["cub"], "data source cub: needs --path"),
        (["hf", "--path", "x", "--hf-name", "y"], "data source hf: needs one of --path and --hf-name"),
        (["tar", "--train-tars", "x", "--validation-share", "1"], "validation_share is 1.0; it must lie between 0 and 1"),
        (["digits", "--quality", "80"], "quality is 80, but without --resize-short all bytes are copied as they are"),
        (["digits", "--workers", "0"], "workers is 0; both must be at least 1"),
        (["icons", "--path", "nowhere"], "nowhere: no such package"),
        (["icons", "--path", "nowhere", "--image-size", "4"], "image_size is 4; icons can be drawn with 8 to 1024 pixels"),
    ],
)
def test_options_that_do_not_fit_are_refused(run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    ended = run("--source", words[0], "--out", "o", *words[1:])
    assert ended.code == 2
    assert message in ended.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_source_is_refused_with_the_names() -> None:
    with pytest.raises(
        ShardError, match=r"'mnist': allowed is digits \| fashion_mnist \| cifar100 \| cub \| icons \| image_folder \| tar \| hf"
    ):
        check_options("mnist", SourceOptions())


def test_the_pipeline_s_named_source_needs_no_options(tmp_path: Path) -> None:
    config = resolve(None, "tiny", str(tmp_path / "run"), [])
    ensure_shards(config)
    assert len(ShardIndex.load(config.data.train)) + len(ShardIndex.load(config.data.validation)) == 1797
    other = replace(config, data=replace(config.data, source="hf", train=str(tmp_path / "x" / "train")))
    with pytest.raises(ShardError, match="data source hf: needs one of --path and --hf-name"):
        ensure_shards(other)
    for name in ("digits", "fashion_mnist", "cifar100", "icons"):
        assert check_options(name, SourceOptions()) == name


def test_the_imagenet_script_passes_options_on(tmp_path: Path, repo_root: Path) -> None:
    """A stand-in for scripts/m2mkd beside a copy of the script writes down the words that it is called with."""
    scripts = tmp_path / "checkout" / "scripts"
    scripts.mkdir(parents=True)
    (scripts / "make.sh").write_text((repo_root / "scripts" / "make_imagenet_shards.sh").read_text())
    (scripts / "m2mkd").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    (scripts / "m2mkd").chmod(0o755)
    image_folder(tmp_path / "my set")
    command = ["bash", str(scripts / "make.sh"), str(tmp_path / "my set")]
    environment = {**os.environ, "NUM_CLASSES": "2"}
    done = subprocess.run([*command, "o", "--resize-short", "384"], env=environment, capture_output=True, text=True, check=True)
    expected = ["shards", "write", "--source", "image_folder", "--path", str(tmp_path / "my set"), "--out", "o", "--resize-short", "384"]
    assert done.stdout.splitlines() == expected
    wrong = subprocess.run([*command, "--resize-short", "384"], env=environment, capture_output=True, text=True, check=False)
    assert (wrong.returncode, "options come behind IMAGES and OUT" in wrong.stderr) == (2, True)


def test_the_request_of_digits_is_as_before(run: Run, tmp_path: Path) -> None:
    """Folders of earlier versions have no resize_short in their request, and must still be kept."""
    assert run("--source", "digits", "--out", "o").code == 0
    request = json.loads((tmp_path / "o" / "train" / "index.json").read_text())["request"]
    assert set(request) == {"format", "source", "license", "class_names", "total", "samples_per_shard", "seed", "content"}
