"""The training phases, by the real launcher: one rank and two ranks, all pairs together and one by one, straight and interrupted.

Two launches; every fact is a test of its own. Mixup, cutmix, random erasing, drop-path, clipping, accumulation and the
moving average are on, because each of them could depend on the rank by mistake.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from m2mkd_ds.data.sources.registry import make_source
from tests.launching import launch
from tests.train import train_job

SCRIPT = Path(train_job.__file__)
WEIGHTS = [
    "pretrain_meta/weights.safetensors",
    *(f"modular_train/pair_{i}/weights.safetensors" for i in range(3)),
    "assemble_finetune/weights.safetensors",
    *(f"m2mkd/pair_{i}/weights.safetensors" for i in range(3)),
    "end_to_end/weights.safetensors",
]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    make_source("digits", folder / "shards")
    launch(SCRIPT, [str(folder), "one"], ranks=1, timeout_s=300)
    launch(SCRIPT, [str(folder), "two"], ranks=2, timeout_s=300)
    return folder


def worst_difference(left: Path, right: Path) -> float:
    a, b = load_file(left), load_file(right)
    assert a.keys() == b.keys()
    return float(torch.stack([(a[k] - b[k]).abs().max() for k in a]).max())  # torch's max passes NaN on, Python's does not


def same_bits(left: Path, right: Path) -> bool:
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("file", WEIGHTS)
def test_two_ranks_equal_one_rank_on_the_same_global_batch(out: Path, file: str) -> None:
    # weights move by about lr * steps = 8e-3 in these four steps; a batch shared out wrongly shows at 1e-3 and more
    phase = file.split("/")[0]
    assert worst_difference(out / "one" / file, out / f"two_{phase}" / file) < 1e-6


def test_weights_really_moved(out: Path) -> None:
    start = load_file(out / "one" / "assemble" / "weights.safetensors")
    end = load_file(out / "one" / "end_to_end" / "weights.safetensors")
    assert max(float((start[k] - end[k]).abs().max()) for k in start) > 1e-3


@pytest.mark.parametrize("pair", range(3))
def test_all_pairs_in_one_job_equal_single_pair_jobs_bit_for_bit(out: Path, pair: int) -> None:
    file = f"m2mkd/pair_{pair}/weights.safetensors"
    assert same_bits(out / "one" / file, out / "one_separate" / file)
    assert worst_difference(out / "two_m2mkd" / file, out / "two_separate" / file) < 1e-6


@pytest.mark.parametrize("mode", ["one", "two"])
@pytest.mark.parametrize("file", ["m2mkd/pair_1/weights.safetensors", "end_to_end/weights.safetensors"])
def test_bf16_phases_stay_near_fp32_and_keep_fp32_results(out: Path, mode: str, file: str) -> None:
    phase = file.split("/")[0]
    straight = out / ("one" if mode == "one" else f"two_{phase}") / file
    coarse = out / f"{mode}_bf16_{phase}" / file
    # AdamW's first steps have the size of lr whatever the gradient's, so a weight with a noisy gradient may walk the other
    # way: at most 2 * lr * 4 steps = 1.6e-2 apart. Equal results would mean that bf16 was not on.
    assert 1e-6 < worst_difference(straight, coarse) < 1.7e-2
    assert all(t.dtype == torch.float32 for t in load_file(coarse).values())


SPREAD = [*(f"m2mkd/pair_{i}/weights.safetensors" for i in range(3)), "end_to_end/weights.safetensors"]


@pytest.mark.parametrize("how", ["ep", "zero3"])
@pytest.mark.parametrize("file", SPREAD)
def test_spread_experts_and_zero_3_give_the_weights_of_the_plain_run(out: Path, how: str, file: str) -> None:
    phase = file.split("/")[0]
    plain = out / ("two_m2mkd" if phase == "m2mkd" else "two_plain_end_to_end") / file
    assert worst_difference(plain, out / f"two_{how}_{phase}" / file) < 1e-6
    assert same_bits(out / f"two_{how}_{phase}" / file, out / f"two_{how}_interrupted_{phase}" / file)


@pytest.mark.parametrize("how", ["ep", "zero3"])
def test_a_spread_model_is_evaluated_on_every_image(out: Path, how: str) -> None:
    plain = json.loads((out / "two_plain_end_to_end" / "end_to_end" / "metrics.jsonl").read_text().splitlines()[-1])
    spread = json.loads((out / f"two_{how}_end_to_end" / "end_to_end" / "metrics.jsonl").read_text().splitlines()[-1])
    assert spread["eval/top1"] == plain["eval/top1"] and spread["eval/loss"] == pytest.approx(plain["eval/loss"], rel=1e-5)


def test_single_pair_jobs_together_complete_the_node(out: Path) -> None:
    done = json.loads((out / "one_separate" / "m2mkd" / "done.json").read_text())
    assert sorted(done["files"]) == [f"pair_{i}/weights.safetensors" for i in range(3)]


@pytest.mark.parametrize("mode", ["one", "two"])
@pytest.mark.parametrize("phase, file", [("m2mkd", "m2mkd/pair_1/weights.safetensors"), ("end_to_end", "end_to_end/weights.safetensors")])
def test_an_interrupted_phase_ends_with_the_weights_of_a_straight_one(out: Path, mode: str, phase: str, file: str) -> None:
    again = out / f"{mode}_interrupted_{phase}"
    assert (again / "stopped_0").exists()  # it was interrupted
    straight = out / ("one" if mode == "one" else f"two_{phase}")
    assert same_bits(straight / file, again / file)


@pytest.mark.parametrize("mode", ["one", "two"])
def test_metrics_after_a_resume_hold_each_step_once(out: Path, mode: str) -> None:
    lines = (out / f"{mode}_interrupted_end_to_end" / "end_to_end" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_ce_kd_and_their_gradient_norms_are_logged_apart(out: Path) -> None:
    records = [json.loads(line) for line in (out / "one" / "m2mkd" / "pair_0" / "metrics.jsonl").read_text().splitlines()]
    assert {"task", "kd", "task_grad_norm", "kd_grad_norm", "grad_norm", "lr", "router/switch", "moe/0/load", "moe/0/entropy"} <= set(
        records[0]
    )
    # loss = (1 - a) task + a kd + router
    first = records[0]
    assert first["loss"] == pytest.approx(0.5 * first["task"] + 0.5 * first["kd"] + first["router/switch"], rel=1e-5)
    assert abs(sum(first["moe/0/load"]) - 1.0) < 1e-6


@pytest.mark.parametrize("mode, ranks", [("one", 1), ("two", 2)])
def test_a_nan_on_one_rank_stops_all_ranks_with_step_and_slots(out: Path, mode: str, ranks: int) -> None:
    texts = [(out / f"{mode}_nan" / f"error_{rank}.txt").read_text() for rank in range(ranks)]
    assert all("at step 2" in text and "no weight was changed" in text for text in texts)
    # global batch 32: step 2 owns slots 64..95; the last rank's micro-batches begin at 64 (one rank) or at 80 (second of two)
    first_slot = 64 if ranks == 1 else 80
    assert f"slots [{first_slot}, {first_slot + 1}," in texts[-1]


def test_a_rank_that_comes_late_to_a_node_of_rank_zero_takes_part(out: Path) -> None:
    assert (out / "two_late" / "split" / "done.json").is_file()  # and the launch did not hang


def test_an_error_on_one_rank_ends_the_job_at_once_with_its_message(out: Path) -> None:
    began = time.monotonic()
    job = launch(SCRIPT, [str(out), "broken"], ranks=2, timeout_s=120, check=False)
    assert job.returncode != 0
    assert "image number 7 cannot be decoded" in job.stdout
    assert time.monotonic() - began < 90  # the time-out of a collective is 600 s


def test_the_result_is_the_moving_average_when_one_is_kept(out: Path) -> None:
    # One rank's part is the whole row of each group, so the averages can be read off the checkpoint by hand.
    path = out / "one/end_to_end/checkpoints/step-00000004/engine_rank_00000.safetensors"
    parts = load_file(path)
    with safe_open(path, framework="pt") as file:
        groups = json.loads(file.metadata()["m2mkd_ds"])["groups"]
    result = load_file(out / "one" / "end_to_end" / "weights.safetensors")
    seen, moved = 0, 0.0
    for index, group in enumerate(groups):
        start = 0
        for name in group["names"]:
            row = slice(start, start + result[name].numel())
            start = row.stop
            assert torch.equal(parts[f"group{index}.ema"][row], result[name].flatten()), name
            moved = max(moved, float((parts[f"group{index}.master"][row] - result[name].flatten()).abs().max()))
            seen += 1
    buffers = sum("balance_bias" in name for name in result)  # not averaged
    assert buffers == 4 and seen == len(result) - buffers and moved > 1e-4  # the raw weights are others


@pytest.mark.parametrize("run", ["one", "two_end_to_end", "one_bf16_end_to_end"])
def test_balance_biases_took_a_step_of_the_rate_at_every_optimizer_step(out: Path, run: str) -> None:
    result = load_file(out / run / "end_to_end" / "weights.safetensors")
    biases = {name: value for name, value in result.items() if "balance_bias" in name}
    assert sorted(biases) == [f"blocks.{i}.moe.router.balance_bias" for i in range(4)]
    for value in biases.values():
        # Four steps of m2mkd, four of end_to_end, each up, down, or (at the exact mean) not at all.
        assert float(value.abs().max()) <= 0.008 + 1e-6 and bool(value.any())
        torch.testing.assert_close(value / 0.001, (value / 0.001).round(), rtol=0, atol=1e-3)


def test_a_node_whose_pairs_were_all_trained_before_still_records_its_steps(out: Path) -> None:
    done = json.loads((out / "two_recorded_again" / "m2mkd" / "done.json").read_text())
    assert (done["steps"], done["images"], done["world_size"]) == (4, 4 * 32, 2)
