"""`m2mkd bench loader` in miniature: what is in a result, that its numbers follow from each other, what it reads. No speeds."""

from __future__ import annotations

import io
import json
import multiprocessing
import re
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from PIL import Image

from m2mkd_ds.bench.loader import run_loader
from m2mkd_ds.bench.loader_measure import Opened, Pass, measure_pass
from m2mkd_ds.bench.loader_options import READERS, LoaderBench
from m2mkd_ds.bench.loader_photos import photo_jpegs, photo_shards
from m2mkd_ds.bench.loader_readers import Source, data_config, opener
from m2mkd_ds.bench.loader_resume import RESUME_EPOCH, resume_step, synthetic_index
from m2mkd_ds.bench.loader_rows import LoaderRow, make_row, verdicts
from m2mkd_ds.cli import main
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.order import StreamOrder

MINIATURE = LoaderBench(images=8, batch=1, image_size=32, workers=(0,), repeats=1, resume_images=40, resume_shards=5)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_loader")


@pytest.fixture(scope="module")
def text(out: Path) -> str:
    return run_loader(replace(MINIATURE, repeats=2, out=out))


@pytest.fixture(scope="module")
def result(out: Path, text: str) -> dict[str, Any]:
    return json.loads((out / "loader_cpu.json").read_text())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(photo_shards(tmp_path_factory.mktemp("photos") / "p", 16, 3), batch=2, images=16, seed=3)


def test_a_result_has_every_field_of_its_schema(result: dict[str, Any]) -> None:
    assert set(result) == {"schema", "command", "options", "device", "shards", "environment", "wall_s", "rows", "verdicts"}
    assert result["schema"] == "m2mkd bench loader 1" and result["command"].startswith("m2mkd bench loader --images 8 --batch 1")
    versions = {"torch", "torchvision", "timm", "webdataset", "simplejpeg", "pillow", "numpy"}
    assert versions <= set(result["environment"]) and all(result["environment"][name] for name in versions)
    assert {"cpu", "git_commit", "git_modified", "threads"} <= set(result["environment"])
    assert result["shards"]["num_images"] == 8 and result["shards"]["num_shards"] == 8
    assert all(set(row) == {field.name for field in fields(LoaderRow)} for row in result["rows"])
    found = [(row["recipe"], row["reader"]) for row in result["rows"]]
    assert found == [("crop", reader) for reader in READERS]


def test_every_row_read_every_image_and_its_rates_follow_from_the_samples(result: dict[str, Any]) -> None:
    (limit,) = (row for row in result["rows"] if row["reader"] == "decode_limit")
    for row in result["rows"]:
        assert row["available"] and row["rounds"] == 2 and row["images"] == 8, row["reader"]
        for kind in ("wall", "cpu"):
            rates = [8 / seconds for seconds in row["samples"][f"{kind}_s"]]
            expected = {"median": median(rates), "min": min(rates), "max": max(rates)}
            assert row[f"{kind}_images_per_s"] == pytest.approx(expected)
        assert row["percent_of_limit"] == pytest.approx(100 * row["cpu_images_per_s"]["median"] / limit["cpu_images_per_s"]["median"])
        assert row["peak_rss_bytes"] > 50 << 20  # an interpreter with torch
        ours = row["reader"] in ("pil", "fast", "fast_device") and row["recipe"] == "crop"
        assert (row["resume_s"] is not None) == ours
        assert len(row["samples"].get("resume_s", [])) == (2 if ours else 0)


def test_the_files_say_the_same_as_the_table(result: dict[str, Any], text: str, out: Path) -> None:
    markdown = (out / "loader_cpu.md").read_text()
    for row in result["rows"]:
        rate = f"{row['cpu_images_per_s']['median']:.0f} ("
        assert rate in markdown and rate in text
    for verdict in result["verdicts"]:
        line = f"{'met' if verdict['met'] else 'MISSED'}: {verdict['what']}: {verdict['value']:.2f} (target {verdict['target']:g})"
        assert line in markdown and line in text
    assert ElementTree.fromstring((out / "loader_cpu.svg").read_text()).tag.endswith("svg")
    assert [path.name for path in sorted(out.iterdir())] == ["loader_cpu.json", "loader_cpu.md", "loader_cpu.svg"]


def test_the_document_names_every_field(result: dict[str, Any], repo_root: Path) -> None:
    document = (repo_root / "docs" / "benchmarks.md").read_text().partition("## Loader")[2]
    for name in (*(field.name for field in fields(LoaderRow)), *READERS, *result["shards"], "schema", "verdicts"):
        assert f"`{name}`" in document, name


@pytest.mark.parametrize(
    ("reader", "workers"), [*((reader, 0) for reader in READERS), ("pil", 1), ("fast_device", 1), ("webdataset", 1), ("timm_prefetcher", 1)]
)
def test_a_pass_reads_every_image_and_leaves_no_worker(source: Source, reader: Any, workers: int) -> None:
    options = replace(MINIATURE, images=16, batch=2)
    one = measure_pass(opener(reader, source, data_config(options, source.index, "crop", reader), workers))
    assert one.images == 16 and one.wall_s > 0 and one.cpu_s > 0 and one.first_batch_s > 0
    assert multiprocessing.active_children() == []


class _Burner(torch.utils.data.Dataset[int]):
    """Every item costs 0.1 s of CPU."""

    def __getitem__(self, number: int) -> int:
        _burn(0.1)
        return number


def _burn(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def _start(_: int) -> None:
    _burn(0.8)


@pytest.mark.parametrize("workers", [0, 2])
def test_cpu_time_is_that_of_the_pass_and_not_that_of_starting(workers: int) -> None:
    def open_reader() -> Opened:
        _burn(0.3)
        loader = torch.utils.data.DataLoader(
            _Burner(), batch_size=None, sampler=range(6), num_workers=workers, worker_init_fn=_start, persistent_workers=workers > 0
        )
        return Opened(loader, lambda batch: 1)

    one = measure_pass(open_reader)
    # Six items of 0.1 s; opening burns 0.3 s, the start of a worker 0.8 s, the first batch and what was read ahead up to 0.6 s more.
    assert one.images == 6
    assert 0.6 <= one.cpu_s < 0.75


def test_the_photos_are_like_imagenets_and_always_the_same() -> None:
    jpegs = photo_jpegs(6, seed=1)
    assert jpegs == photo_jpegs(6, seed=1) and jpegs[0] != photo_jpegs(1, seed=2)[0] and len(set(jpegs)) == 6
    for jpeg in jpegs:
        image = Image.open(io.BytesIO(jpeg))
        assert (image.format, image.size, image.mode) == ("JPEG", (500, 375), "RGB")
        assert 60_000 < len(jpeg) < 115_000


def test_the_synthetic_index_resumes_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    jpegs = photo_jpegs(4, seed=0)
    synthetic_index(tmp_path / "s", jpegs, num_images=43, num_shards=5, seed=9)
    index = ShardIndex.load(tmp_path / "s")
    assert index.num_samples == 43 and index.shard_sizes == (9, 9, 9, 8, 8)
    # Step 1617 of 4 images begins at position 6468 = 150 * 43 + 18, near the middle of epoch 150.
    assert resume_step(43, 4) == 1617 and RESUME_EPOCH == 150
    order = StreamOrder(9, index.shard_sizes)
    slots = [order.slot(6468 + place) for place in range(4)]
    assert [slot.epoch for slot in slots] == [150] * 4
    assert [index.read(slot.sample)[0] for slot in slots] == jpegs
    # Sparse: 43 * 110 kB, of which only the batch and headers are on disk.
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "s").glob("*.tar")) < 800_000
    with pytest.raises(ValueError, match=r"--resume-images is 3; give at least --resume-shards \(5\) and --batch \(4\)"):
        synthetic_index(tmp_path / "t", jpegs, num_images=3, num_shards=5, seed=9)


def row(reader: str, rate: float, workers: int = 0, resume: float | None = None, recipe: str = "crop") -> LoaderRow:
    one = Pass(images=100, wall_s=1.0, cpu_s=100 / rate, first_batch_s=0.1, peak_rss_bytes=1)
    return make_row(recipe, reader, workers, "", [one], [] if resume is None else [resume], limit=1000.0)


def test_targets_compare_the_same_workers_and_say_what_is_missed() -> None:
    rows = [
        row("decode_limit", 1000),
        row("pil", 450, resume=2.5),
        row("fast", 850),
        row("webdataset", 300),
        row("timm", 400),
        row("fast", 700, workers=2, resume=9.0),
        row("timm", 200, workers=2),
        row("timm", 1, recipe="randaugment"),
    ]
    found = {verdict.what: (round(verdict.value, 3), verdict.met) for verdict in verdicts(rows)}
    assert found == {
        "fast / webdataset, 0 workers, images per CPU second": (2.833, True),
        "fast / timm, 0 workers, images per CPU second": (2.125, False),
        "fast / decode_limit, 0 workers, images per CPU second (goal 0.9)": (0.85, True),
        "fast / timm, 2 workers, images per CPU second": (3.5, True),
        "fast / decode_limit, 2 workers, images per CPU second (goal 0.9)": (0.7, False),
        "pil / webdataset, 0 workers, images per CPU second": (1.5, True),
        "pil / timm, 0 workers, images per CPU second": (1.125, False),
        "pil: seconds to resume in the synthetic index": (2.5, False),
    }


def test_a_second_recipe_measures_everything_but_the_limits_again(tmp_path: Path) -> None:
    readers: Any = ("decode_limit", "fast", "timm")
    text = run_loader(replace(MINIATURE, augment=True, readers=readers, resume_images=0, out=tmp_path))
    rows = json.loads((tmp_path / "loader_cpu.json").read_text())["rows"]
    found = [(one["recipe"], one["reader"]) for one in rows]
    assert found == [("crop", "decode_limit"), ("crop", "fast"), ("crop", "timm"), ("randaugment", "fast"), ("randaugment", "timm")]
    assert "random resized crop, flip and RandAugment, 1 rounds" in text


def test_shards_of_ones_own_are_read_in_whole_batches(tmp_path: Path) -> None:
    photo_shards(tmp_path / "mine", 8, 0)
    readers: Any = ("raw_read", "timm", "webdataset")
    options = replace(MINIATURE, shards=tmp_path / "mine", batch=3, workers=(0, 9), resume_images=0, readers=readers, out=tmp_path / "out")
    run_loader(options)
    rows = json.loads((tmp_path / "out" / "loader_cpu.json").read_text())["rows"]
    found = {(one["reader"], one["workers"]): (one["images"], one["available"]) for one in rows}
    # Ours: 8 // 3 whole batches. timm rounds up to whole batches and repeats; webdataset gives the short batch.
    assert found[("raw_read", 0)] == (6, True) and ("raw_read", 9) not in found
    assert found[("webdataset", 0)] == (8, True)
    assert found[("timm", 9)] == found[("webdataset", 9)] == (None, False)
    assert "8 shards cannot be dealt to 9 workers" in next(one["reason"] for one in rows if not one["available"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "100"], "--images is 100 and --batch 32; .* give a multiple of 256"),
        (["--workers", "1", "1"], "--workers is 1 1; give different numbers from 0 on"),
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_what_makes_no_measurement_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "loader", *words])
    assert end.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_the_command_line_runs_it_and_refuses_several_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "--images 8 --batch 1 --image-size 16 --workers 0 --repeats 1 --resume-images 0 --readers decode_limit raw_read"
    main(["bench", "loader", *words.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "decode_limit" in printed and f"wrote {tmp_path / 'loader_cpu.json'}" in printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["bench", "loader", *words.split()])
    assert "start it without the launcher" in capsys.readouterr().err
