"""`m2mkd shards index | verify | info`: results on stdout, logs on stderr, exit code 1 for damaged data and 2 for wrong usage."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from m2mkd_ds.data.shards import scan_parts
from m2mkd_ds.data.shards.scan import scan_samples
from tests.cli.ended import Run
from tests.data.tar_files import image_members, make_tar


@pytest.fixture
def run(m2mkd: Run, tmp_path: Path) -> Run:
    """`m2mkd shards WORDS`, in a folder with data/x-0.tar (3 samples) and data/x-1.tar (4 samples)."""
    (tmp_path / "data").mkdir()
    make_tar(tmp_path / "data" / "x-0.tar", image_members(range(3)))
    make_tar(tmp_path / "data" / "x-1.tar", image_members(range(3, 7)))
    return lambda *words: m2mkd("shards", *words)


def test_index_then_verify_then_info(run: Run) -> None:
    Path("names.txt").write_text("cat\ndog\neel\n")
    ended = run("index", "data/x-{0..1}.tar", "--class-names", "names.txt", "--source", "pets", "--license", "MIT", "--workers", "1")
    assert ended.code == 0 and "/data: 7 images, 3 classes, fingerprint " in ended.out, ended
    assert "7 samples of 3 classes in 2 shards, 0 left out" in ended.err
    again = run("index", "data", "--class-names", "names.txt")
    assert again.out == ended.out and "up to date" in again.err
    ended = run("verify", "data", "--workers", "1")
    assert ended.code == 0
    assert [line.split() for line in ended.out.splitlines()][:3] == [["all", "bad"], ["shards", "2", "0"], ["samples", "7", "0"]]
    ended = run("info", "data", "--classes", "--sheet", "sheet.png")
    assert ended.code == 0 and "source       pets; licence MIT" in ended.out and "dog  2" in ended.out
    assert Image.open("sheet.png").size == (1004, 118)
    tree = json.loads(run("info", "data", "--json").out)
    assert (tree["num_samples"], tree["samples_by_class"]) == (7, {"cat": 3, "dog": 2, "eel": 2})


def test_verify_lists_bad_shards_ends_with_1_and_writes_the_report(run: Run) -> None:
    assert run("index", "data", "--workers", "1").code == 0
    path = Path("data/x-1.tar")
    data = bytearray(path.read_bytes())
    data[data.index(b"\xff\xd8\xff") + 400] ^= 255
    path.write_bytes(data)
    ended = run("verify", "data", "--report", "bad.jsonl", "--no-decode", "--workers", "1")
    assert ended.code == 1
    assert ended.out.startswith("x-1.tar: 2 checksum: sample n003 (number 3): its image has other bytes than were indexed")
    assert [line.split() for line in ended.out.splitlines()][1:4] == [["all", "bad"], ["shards", "2", "1"], ["samples", "7", "1"]]
    listed = [json.loads(line) for line in Path("bad.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["shard"], line["key"], line.get("sample")) for line in listed] == [
        ("checksum", "x-1.tar", "", None),
        ("checksum", "x-1.tar", "n003", 3),
    ]


def test_damage_and_wrong_usage_are_told_with_exit_code_2(run: Run) -> None:
    make_tar(Path("data/x-1.tar"), [*image_members(range(3, 7)), ("lost.jpg", b"x")])
    ended = run("index", "data", "--workers", "1")
    assert ended.code == 2 and "1 damaged samples (1 bad_label)" in ended.err and "x-1.tar: sample lost has members" in ended.err
    assert "Traceback" not in ended.err
    ended = run("index", "data", "--allow-bad", "1", "--workers", "1")
    assert ended.code == 0 and json.loads(Path("data/bad.jsonl").read_text())["key"] == "lost"
    for words, message in (
        (["index"], "no shards were named"),
        (["index", "none"], "none: 1 of 1 shards are not there"),
        (["index", "data", "--out", "o", "--class-names", "empty.json"], "a class name is empty"),
        (["index", "data", "--out", "o", "--class-names", "wrong.json"], "wrong.json: not JSON"),
        (["index", "data", "--out", "o", "--class-names", "none.txt"], "--class-names none.txt: cannot be read (No such file"),
        (["verify", "none"], "none/index.json: no such file"),
        (["info", "data", "--sheet", "sheet.jpg"], "end it in .png"),
    ):
        Path("empty.json").write_text('["a", "", "c"]')
        Path("wrong.json").write_text("cat")
        ended = run(*words)
        assert ended.code == 2 and message in ended.err, ended


def test_a_file_system_without_its_package_is_told_in_one_sentence_and_leaves_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # importing it fails, also where it is installed
    ended = run("index", "s3://bucket/x-{0..1}.tar", "--out", "made/here")
    assert ended.code == 2 and len(ended.err.splitlines()) == 1, ended
    assert "s3:// needs a package that is not there" in ended.err and "pip install 'm2mkd_ds[s3]'" in ended.err
    assert not Path("made").exists()


@pytest.mark.parametrize(("unreadable", "kept"), [("x-0.tar", []), ("x-1.tar", ["index.parts"])])
def test_a_failed_index_leaves_no_empty_folder(run: Run, monkeypatch: pytest.MonkeyPatch, unreadable: str, kept: list[str]) -> None:
    def scan(stream: Any, name: str, **options: Any) -> Any:
        if name == unreadable:
            raise OSError("the disk is gone")
        return scan_samples(stream, name, **options)

    monkeypatch.setattr(scan_parts, "scan_samples", scan)
    ended = run("index", "data/x-{0..1}.tar", "--out", "made/here", "--workers", "1")
    assert ended.code == 2 and f"{unreadable}: cannot be read (the disk is gone)" in ended.err, ended
    # Shards are read in order: with the second unreadable, the first one's result is kept for the next try.
    assert [path.name for path in Path("made/here").glob("*")] == kept and Path("made").exists() == bool(kept)
