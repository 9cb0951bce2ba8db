"""The report of a run folder: complete when the run is, honest about what is missing, safe to open in a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from m2mkd_ds.report import build_report
from m2mkd_ds.report.collect import Curve, collect
from m2mkd_ds.report.html import render_html
from m2mkd_ds.report.markdown import plain, render_markdown
from m2mkd_ds.report.plots import load_matrix, router_figure, thin

FIGURES = {
    "accuracy", "race", "load", "router", "distillation_m2mkd",
    *(f"phase_{phase}" for phase in ("pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline")),
}  # fmt: skip


class Page(HTMLParser):
    """Tags, attributes that may load something, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_finished_run_gives_every_part(run_dir: Path) -> None:
    path = build_report(run_dir)
    assert path == run_dir / "report" / "report.html"
    assert {file.stem for file in path.parent.glob("*.svg")} == FIGURES
    page = Page(path.read_text())
    assert page.tags.count("img") == len(FIGURES)
    for text in ("student, final", "88.41", "87.81 to 89.01", "15:3", "image_size: 28", "torch", "Expert load", "end_to_end"):
        assert text in page.text
    assert "What this report lacks" not in page.text
    report = json.loads((path.parent / "report.json").read_text())
    assert report["missing"] == []
    assert report["results"]["models"]["student"]["top1"] == 0.8841
    markdown = (path.parent / "report.md").read_text()
    assert {name.removesuffix(".svg") for name in re.findall(r"\]\((\w+\.svg)\)", markdown)} == FIGURES


def test_damaged_training_images_are_counted_and_a_clean_run_has_no_such_part(run_dir: Path) -> None:
    folder = build_report(run_dir).parent
    assert all("Damaged training images" not in (folder / name).read_text() for name in ("report.html", "report.md"))
    # sample 7 twice, in two epochs, and sample 9 once
    lines = [{"step": step, "sample": sample, "kind": kind} for step, sample, kind in ((1, 7, "io"), (2, 9, "checksum"), (8, 7, "io"))]
    (run_dir / "m2mkd" / "bad_samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    build_report(run_dir)
    assert "| m2mkd/bad\\_samples.jsonl | 2 | 3 | checksum 1, io 1 |" in (folder / "report.md").read_text()
    assert "<td>checksum 1, io 1</td>" in (folder / "report.html").read_text()
    report = json.loads((folder / "report.json").read_text())
    assert report["bad_samples"] == {"m2mkd/bad_samples.jsonl": {"images": 2, "uses": 3, "kinds": {"checksum": 1, "io": 1}}}


def test_the_routers_settings_and_drops_are_told(run_dir: Path) -> None:
    config = (run_dir / "config.yaml").read_text()
    changed = config.replace("capacity_factor: 0.0", "capacity_factor: 1.25", 1).replace("balance_rate: 0.0", "balance_rate: 0.001")
    (run_dir / "config.yaml").write_text(changed)
    page = Page(build_report(run_dir).read_text())
    for text in ("topk, top-2, softmax after top-k, capacity factor 1.25 in training, loss-free balancing at rate 0.001", "no room for"):
        assert text in page.text


def test_metrics_from_before_drops_were_recorded_still_draw(run_dir: Path) -> None:
    file = run_dir / "end_to_end" / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    old = [{k: v for k, v in record.items() if not k.endswith(("/drop_rate", "/uncovered"))} for record in records]
    with_drops = router_figure(collect(run_dir).curves)
    file.write_text("".join(json.dumps(record) + "\n" for record in old))
    without = router_figure(collect(run_dir).curves)
    assert with_drops is not None and without is not None and len(without) < len(with_drops)  # the panel's lines are gone


def test_the_page_is_one_file_that_asks_for_nothing(run_dir: Path) -> None:
    page = Page(build_report(run_dir).read_text())
    assert "script" not in page.tags
    assert page.links
    for link in page.links:
        kind, _, data = link.partition(",")
        assert kind == "data:image/svg+xml;base64"
        assert ElementTree.fromstring(base64.b64decode(data)).tag.endswith("svg")


def test_text_of_the_run_cannot_become_markup(run_dir: Path) -> None:
    evil = '<script>alert("x")</script> $\\frac$'
    config = (
        (run_dir / "config.yaml").read_text().replace("name: fashion", f"name: '{evil}'").replace("arch: vit_tiny", f"arch: '{evil}' #")
    )
    (run_dir / "config.yaml").write_text(config)
    results = json.loads((run_dir / "evaluate/results.json").read_text())
    results["models"][evil] = {"top1": 0.5}
    results["expert_load"][evil] = results["expert_load"]["student"]
    (run_dir / "evaluate/results.json").write_text(json.dumps(results))
    path = build_report(run_dir)
    assert "<script" not in path.read_text()
    assert evil in Page(path.read_text()).text
    assert "<script" not in (path.parent / "report.md").read_text().replace("\\<", "")


def test_building_twice_gives_the_same_bytes(run_dir: Path) -> None:
    folder = build_report(run_dir).parent
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    build_report(run_dir)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


@pytest.mark.parametrize(
    ("gone", "sentence"),
    [
        ("config.yaml", "config.yaml is not there"),
        ("evaluate", "evaluate/results.json is not there, so this report has no table of accuracies"),
        ("end_to_end/metrics.jsonl", "end_to_end/metrics.jsonl is not there, so this report has no curves of end_to_end"),
        ("m2mkd/pair_1", "m2mkd has curves of 2 of 3 pairs"),
        ("m2mkd", "m2mkd/done.json is not there: m2mkd has not finished"),
        ("export", "export/done.json is not there: export has not finished"),
    ],
)
def test_a_missing_part_is_named_and_the_rest_is_shown(run_dir: Path, gone: str, sentence: str) -> None:
    target = run_dir / gone
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    facts = collect(run_dir)
    assert sentence in Page(render_html(facts, {})).text
    markdown = render_markdown(facts, {})
    assert plain(sentence) in markdown
    assert markdown.count("\n## ") >= 3


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("evaluate/results.json", "{"),
        ("evaluate/results.json", "[]"),
        ("end_to_end/metrics.jsonl", '{"step": 1, "loss": 2}\n{"ste\n'),
        ("end_to_end/metrics.jsonl", "[1]\n"),
        ("config.yaml", "name: [\n"),
        ("config.yaml", "nome: fashion\n"),
        ("m2mkd/done.json", "null"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_shown(run_dir: Path, file: str, content: str) -> None:
    (run_dir / file).write_text(content)
    assert f"{file} cannot be read" in Page(render_html(collect(run_dir), {})).text


def test_the_half_line_of_a_killed_writer_is_no_damage(run_dir: Path) -> None:
    with (run_dir / "end_to_end/metrics.jsonl").open("a") as file:
        file.write('{"step": 33')
    assert collect(run_dir).missing == []


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "pretrain_meta").mkdir()
    (tmp_path / "pretrain_meta/metrics.jsonl").write_text('{"step": 20, "loss": 2.3}\n')
    page = Page(build_report(tmp_path).read_text())
    assert "evaluate/results.json is not there" in page.text
    assert page.tags.count("img") == 1


def test_numbers_that_are_none_do_not_stop_the_report(run_dir: Path) -> None:
    line = '{"step": 330, "loss": NaN, "eval/top1": Infinity, "moe/0/entropy": null, "task": "x"}\n'
    with (run_dir / "end_to_end/metrics.jsonl").open("a") as file:
        file.write(line)
    results = json.loads((run_dir / "evaluate/results.json").read_text())
    results["expert_load"]["student"]["0"] = [0] * 8
    results["expert_load"]["student"]["x"] = "?"
    results["models"]["student"]["loss"] = float("nan")
    (run_dir / "evaluate/results.json").write_text(json.dumps(results))
    report = json.loads((build_report(run_dir).parent / "report.json").read_text())
    assert report["results"]["models"]["student"]["loss"] is None


def test_a_pretrained_teacher_misses_no_phase_of_deep_incubation(run_dir: Path) -> None:
    text = (run_dir / "config.yaml").read_text().replace("source: incubate", "source: pretrained").replace("weights: ''", "weights: timm")
    (run_dir / "config.yaml").write_text(text)
    for phase in ("modular_train", "assemble_finetune"):
        shutil.rmtree(run_dir / phase)
    assert collect(run_dir).missing == []


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such run folder; `m2mkd pipeline"):
        build_report(tmp_path / "absent")
    with pytest.raises(ValueError, match="not a run folder"):
        build_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_images_per_second_is_the_median_of_the_logged_intervals(tmp_path: Path) -> None:
    (tmp_path / "baseline").mkdir()
    # A slow first interval (start-up) must not pull the number down: median of 10, 100, 102 is 100.
    lines = [{"step": step, "loss": 1.0, "images_per_second": rate} for step, rate in ((1, 10), (2, 100), (3, 102))]
    (tmp_path / "baseline/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "baseline/done.json").write_text('{"wall_s": 61.5, "steps": 3, "images": 30}')
    (node,) = collect(tmp_path).nodes
    assert (node.name, node.images_per_second, node.wall_s, node.steps, node.images) == ("baseline", 100, 61.5, 3, 30)


def test_times_of_pairs_trained_as_separate_jobs_are_listed_apart(run_dir: Path) -> None:
    (run_dir / "m2mkd/done.json").unlink()
    for pair in range(3):
        (run_dir / f"m2mkd/pair_{pair}/done.json").write_text(json.dumps({"wall_s": 10.0 + pair}))
    times = {node.name: node.wall_s for node in collect(run_dir).nodes}
    assert {name: wall for name, wall in times.items() if name.startswith("m2mkd")} == {
        "m2mkd pair 0": 10,
        "m2mkd pair 1": 11,
        "m2mkd pair 2": 12,
    }


def test_load_is_a_multiple_of_the_even_share() -> None:
    # 4 experts, 8 rows: even share 2, so 4 rows are twice the share. Blocks in numeric order: 2 before 10.
    assert load_matrix({"10": [1, 1, 1, 1], "2": [4, 2, 2, 0]}) == {"2": [2.0, 1.0, 1.0, 0.0], "10": [1.0] * 4}


def test_thinning_averages_groups_and_keeps_the_last_step() -> None:
    # 5 points, at most 3: groups of 2, 2 and 1.
    assert thin([1, 2, 3, 4, 5], [1.0, 3.0, 5.0, 7.0, 9.0], limit=3) == ([2, 4, 5], [2.0, 6.0, 9.0])
    assert thin([1, 2], [1.0, 2.0], limit=3) == ([1, 2], [1.0, 2.0])


def test_a_series_skips_records_without_the_metric() -> None:
    curve = Curve(
        "whole", [{"step": 1, "loss": 2.0}, {"step": 2, "eval/top1": 0.5}, {"step": 3, "loss": float("inf")}, {"step": 4, "loss": 1}]
    )
    assert curve.series("loss") == ([1.0, 4.0], [2.0, 1.0])
    assert curve.last("loss") == 1.0
    assert curve.last("kd") is None
