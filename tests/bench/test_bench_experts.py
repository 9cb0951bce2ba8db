"""`m2mkd bench experts` at tiny sizes: what is in a result, that its numbers follow from each other, and that peers agree. No speeds."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from m2mkd_ds.bench.experts import run_experts
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.bench.peers import names_at
from m2mkd_ds.bench.rows import Row
from m2mkd_ds.distributed.world import World
from m2mkd_ds.moe.backends import BACKENDS
from tests.bench import bench_job
from tests.launching import launch

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))
EVERYBODY = tuple(dict.fromkeys(name for level in ("layer", "ffn") for name in names_at(level)))
SIZES: dict[str, Any] = {"tokens": 40, "dim": 16, "hidden": 32, "experts": 4, "iters": 3}
ENVIRONMENT_KEYS = ("python", "torch", "triton", "deepspeed", "tutel", "scattermoe", "numpy", "cuda", "driver", "device", "cpu", "threads",
              "system", "git_commit", "git_modified")  # fmt: skip


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def text(out: Path) -> str:
    return run_experts(ExpertBench(**SIZES, peers=EVERYBODY, out=out), ALONE)


@pytest.fixture(scope="module")
def result(out: Path, text: str) -> dict[str, Any]:
    return json.loads((out / "experts_cpu_fp32.json").read_text())


def rows_of(result: dict[str, Any], **wanted: object) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if all(row[key] == value for key, value in wanted.items())]


def test_a_result_has_every_field_of_its_schema(result: dict[str, Any]) -> None:
    keys = {"schema", "command", "options", "device", "dtype", "ranks", "environment", "wall_s", "rows"}
    assert set(result) == keys and result["schema"] == "m2mkd bench experts 1"
    assert set(result["environment"]) == set(ENVIRONMENT_KEYS) and result["environment"]["torch"].startswith(torch.__version__[:4])
    assert result["device"] == "cpu" and result["dtype"] == "fp32" and result["ranks"] == 1
    assert result["options"]["tokens"] == 40 and result["options"]["seed"] == 0
    assert all(set(row) == {field.name for field in fields(Row)} for row in result["rows"])
    found = {(row["level"], row["routing"]) for row in result["rows"]}
    routings = ("balanced", "zipf", "router")
    assert found == {(level, r) for level in ("layer", "a2a") for r in routings} | {
        ("ffn", "balanced"),
        ("ffn", "zipf"),
        ("step", "router"),
    }


def test_the_document_names_every_field(result: dict[str, Any], repo_root: Path) -> None:
    document = (repo_root / "docs" / "benchmarks.md").read_text()
    for name in (*result, *result["environment"], *(field.name for field in fields(Row))):
        assert f"`{name}`" in document, name


def test_every_peer_has_a_row_and_an_absent_one_says_why(result: dict[str, Any], text: str) -> None:
    for level in ("layer", "ffn"):
        for routing in ("balanced", "zipf"):
            names = [row["peer"] for row in rows_of(result, level=level, routing=routing)]
            assert [name for name in names if not name.startswith("part:")] == names_at(level)
    absent = rows_of(result, available=False)
    assert {"scattermoe", "deepspeed_triton", "all_to_all"} <= {row["peer"] for row in absent}
    assert all(row["reason"] and row["total_ms"] is None and row["rounds"] == 0 for row in absent)
    for row in absent:
        assert f"{row['peer']}: not available: {row['reason']}" in text


def test_all_peers_that_do_the_same_work_agree_with_fp64(result: dict[str, Any]) -> None:
    compared = [row for row in result["rows"] if row["error_output"] is not None]
    assert {row["peer"] for row in compared} >= {"reference", "grouped", "deepspeed"}
    for row in compared:
        # fp32 keeps 24 bits: sums of 16 and 32 products are good to about 1e-6.
        assert 0 < row["error_output"] < 3e-6 and 0 < row["error_gradient"] < 3e-6, row["peer"]
    # A peer is either compared, or has weights of its own, or drops tokens.
    rest = {row["peer"] for row in result["rows"] if row["available"] and row["level"] in ("layer", "ffn") and row["error_output"] is None}
    assert rest <= {"gemm", "dense", "deepspeed_capacity", "part:router", "part:dispatch", "part:combine"}


def test_rates_follow_from_the_samples_by_the_documented_formulas(result: dict[str, Any]) -> None:
    (row,) = rows_of(result, level="layer", routing="balanced", peer="grouped")
    (dense,) = rows_of(result, level="layer", routing="balanced", peer="dense")
    totals = [a + b for a, b in zip(row["samples_ms"]["forward"], row["samples_ms"]["backward"], strict=True)]
    assert row["rounds"] == len(totals) == 3
    seconds = median(totals) / 1e3
    assert row["total_ms"]["median"] == pytest.approx(1e3 * seconds)
    # 40 tokens * 2 = 80 rows; 12 * 80 * 16 * 32 = 491520 FLOPs; balanced over 4 experts: 20 rows each.
    assert row["tokens_per_s"] == pytest.approx(40 / seconds) and row["rows_per_s"] == pytest.approx(80 / seconds)
    assert row["useful_tflops"] == pytest.approx(491520 / seconds / 1e12)
    assert row["load"] == [20] * 4 and row["imbalance"] == 1.0 and row["padding_ratio"] == 1.0 and row["drop_rate"] == 0.0
    assert row["percent_of_dense"] == pytest.approx(100 * dense["total_ms"]["median"] / row["total_ms"]["median"])
    parts = [r["total_ms"]["median"] for r in rows_of(result, level="layer", routing="balanced") if r["peer"].startswith("part:")]
    assert len(parts) == 3 and row["overhead_share"] == pytest.approx(sum(parts) / row["total_ms"]["median"])
    assert dense["overhead_share"] is None


def test_deepspeed_pads_to_the_busiest_expert_or_drops_what_its_capacity_does_not_hold(result: dict[str, Any]) -> None:
    (padded,) = rows_of(result, level="layer", routing="zipf", peer="deepspeed")
    (dropping,) = rows_of(result, level="layer", routing="zipf", peer="deepspeed_capacity")
    load = padded["load"]
    assert sum(load) == 80 and max(load) > 30 and padded["imbalance"] == max(load) / 20
    assert padded["drop_rate"] == 0.0 and padded["padding_ratio"] == pytest.approx(4 * max(load) / 80)
    # Capacity: ceil(40 / 4 * 1.0 * 2) = 20 rows an expert.
    kept = sum(min(n, 20) for n in load)
    assert kept < 80 and dropping["drop_rate"] == pytest.approx(1 - kept / 80) and dropping["padding_ratio"] == pytest.approx(80 / kept)
    assert "drop_tokens=False" in padded["note"] and "is dropped (not the same work)" in dropping["note"]


def test_a_layer_holds_more_for_its_backward_pass_than_its_experts_do(result: dict[str, Any]) -> None:
    (layer,) = rows_of(result, level="layer", routing="balanced", peer="grouped")
    (ffn,) = rows_of(result, level="ffn", routing="balanced", peer="grouped")
    # At least the pre-activation and the activation, [80, 32] fp32 each, or one of them where the other is recomputed.
    assert layer["saved_bytes"] >= ffn["saved_bytes"] >= 80 * 32 * 4
    # The gradients of the weights (4 experts of 2 * 16 * 32 + 48 numbers) are part of the peak.
    assert ffn["peak_bytes"] >= 4 * (2 * 16 * 32 + 48) * 4


def test_markdown_and_picture_stand_beside_the_json(out: Path, text: str) -> None:
    markdown = (out / "experts_cpu_fp32.md").read_text()
    assert "![tokens per second by peer and routing](experts_cpu_fp32.png)" in markdown and "## layer, zipf routing" in markdown
    assert (out / "experts_cpu_fp32.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(file.name for file in out.iterdir()) == [f"experts_cpu_fp32.{suffix}" for suffix in ("json", "md", "png")]
    assert text.count("wrote ") == 3


def test_swiglu_counts_three_maps_and_the_gelu_only_peers_say_so(tmp_path: Path) -> None:
    options = ExpertBench(**SIZES, level="layer", routing=("balanced",), activation="swiglu", out=tmp_path)
    run_experts(options, ALONE)
    result = json.loads((tmp_path / "experts_cpu_fp32.json").read_text())
    (row,) = rows_of(result, peer="grouped")
    # 18 * 80 * 16 * 32
    assert row["useful_tflops"] == pytest.approx(737280 / (row["total_ms"]["median"] / 1e3) / 1e12)
    assert row["error_output"] < 3e-6 and row["error_gradient"] < 3e-6
    for name in ("deepspeed", "tutel"):
        (gone,) = rows_of(result, peer=name)
        assert not gone["available"] and "gelu only" in gone["reason"]


def test_bf16_is_measured_with_its_own_error_and_tutel_says_that_it_has_none() -> None:
    options = ExpertBench(**SIZES, level="layer", routing=("zipf",), dtype="bf16", peers=("grouped", "deepspeed", "tutel"))
    text = run_experts(options, ALONE)
    assert "grouped" in text and "tutel: not available" in text and ", bf16," in text


@pytest.mark.tutel
def test_tutel_is_measured_on_the_same_routing_where_it_is_installed(tmp_path: Path) -> None:
    run_experts(ExpertBench(**SIZES, level="layer", peers=("tutel",), out=tmp_path), ALONE)
    result = json.loads((tmp_path / "experts_cpu_fp32.json").read_text())
    rows = rows_of(result, peer="tutel", available=True)
    assert len(rows) == 3 and all(row["error_output"] < 3e-6 and row["error_gradient"] < 3e-6 for row in rows)


def test_what_cannot_be_measured_is_one_sentence() -> None:
    for bad, sentence in (
        ({"top_k": 9}, r"--top-k is 9; allowed is 1 to --experts, which is 8"),
        ({"tokens": 0}, r"--tokens is 0; it must be at least 1"),
        ({"experts": 32, "dim": 16}, r"--experts is 32 and --dim 16"),
        ({"iters": -1}, r"--iters is -1"),
        ({"routing": ()}, r"--routing is empty"),
        ({"budget_s": -1.0}, r"--budget-s is -1"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run_experts(ExpertBench(**bad), ALONE)
    with pytest.raises(ValueError, match=r"--peers megablocks: allowed are gemm, dense, .*tutel"):
        run_experts(ExpertBench(peers=("dense", "megablocks")), ALONE)
    with pytest.raises(ValueError, match="--device is cuda, and this job runs on cpu; torch sees no CUDA device"):
        run_experts(ExpertBench(device="cuda"), ALONE)


def test_a_trained_load_is_measured_and_its_run_recorded(tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "evaluate").mkdir(parents=True)
    (run / "evaluate" / "results.json").write_text(json.dumps({"expert_load": {"student": {"0": [30, 6, 3, 1]}}}))
    options = ExpertBench(**SIZES, level="layer", routing=("run",), load_from=run, peers=("dense", "loop"), out=tmp_path)
    run_experts(options, ALONE)
    result = json.loads((tmp_path / "experts_cpu_fp32.json").read_text())
    assert result["options"]["load_from"] == str(run)
    (row,) = rows_of(result, routing="run", peer="loop")
    assert row["available"] and row["load"][0] == max(row["load"]) and sum(row["load"]) == 80


def test_the_command_is_what_was_asked_for() -> None:
    options = ExpertBench(level="layer", tokens=40, top_k=1, routing=("zipf", "balanced"), out=Path("results"))
    assert options.command() == "m2mkd bench experts --level layer --tokens 40 --top-k 1 --routing zipf balanced --out results"


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_ranks")
    launch(Path(bench_job.__file__), [str(folder)], ranks=2)
    return folder


@pytest.mark.slow
def test_deepspeed_with_shared_out_experts_equals_our_layer_on_each_rank(two_ranks: Path) -> None:
    facts = [rank["deepspeed"] for rank in json.loads((two_ranks / "facts.json").read_text())]
    assert [fact["first_expert"] for fact in facts] == [0, 2] and all(fact["local_experts"] == 2 and fact["same"] for fact in facts)
    assert max(fact["difference"] for fact in facts) < 1e-6


@pytest.mark.slow
def test_the_exchange_gives_every_row_and_gradient_back(two_ranks: Path) -> None:
    facts = [rank["exchange"] for rank in json.loads((two_ranks / "facts.json").read_text())]
    assert all(fact["rows_return"] and fact["gradients_return"] for fact in facts)
    assert facts[0]["load"] != facts[1]["load"]  # the parts are uneven
    # 48 rows of 16 fp32 each; rank 0 keeps those of experts 0 and 1, rank 1 those of 2 and 3.
    leaving = [sum(facts[0]["load"][2:]) * 64, sum(facts[1]["load"][:2]) * 64]
    assert [fact["bytes"] for fact in facts] == [[48 * 64, leaving[0]], [48 * 64, leaving[1]]]


@pytest.mark.slow
def test_two_ranks_report_the_whole_job(two_ranks: Path) -> None:
    a2a, result = (json.loads((two_ranks / level / "experts_cpu_fp32_2ranks.json").read_text()) for level in ("a2a", "layer"))
    facts = [rank["exchange"] for rank in json.loads((two_ranks / "facts.json").read_text())]
    (exchange,) = a2a["rows"]
    assert a2a["ranks"] == 2 and exchange["available"] and exchange["exchanged_bytes"] == 48 * 64
    one_exchange_s = exchange["total_ms"]["median"] / 1e3 / 4
    assert exchange["busbw_gb_s"] == pytest.approx(max(fact["bytes"][1] for fact in facts) / one_exchange_s / 1e9)
    (layer,) = rows_of(result, peer="grouped")
    # Both ranks' tokens and loads count: 2 * 24 tokens, 96 rows.
    assert layer["tokens_per_s"] == pytest.approx(48 / (layer["total_ms"]["median"] / 1e3))
    assert layer["load"] == [a + b for a, b in zip(facts[0]["load"], facts[1]["load"], strict=True)] and sum(layer["load"]) == 96
    assert set(BACKENDS) - {"reference"} <= {row["peer"] for row in result["rows"]}


@pytest.mark.slow
@pytest.mark.parametrize("peer", ["expert_parallel", "deepspeed_expert_parallel"])
def test_spread_experts_compute_what_whole_ones_do(two_ranks: Path, peer: str) -> None:
    result = json.loads((two_ranks / "layer" / "experts_cpu_fp32_2ranks.json").read_text())
    (row,) = rows_of(result, peer=peer)
    assert row["available"] and row["error_output"] < 1e-5 and row["error_gradient"] < 1e-5
    assert "2 ranks" in row["note"]
