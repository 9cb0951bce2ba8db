"""Evaluation: intervals against published and hand-worked numbers; every image counted once by any number of ranks."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png
from m2mkd_ds.train.evaluation.evaluate import Score, paired_interval, wilson_interval
from m2mkd_ds.train.evaluation.of_run import compare, summarise_scores
from m2mkd_ds.train.loop import NonFiniteLossError
from tests.train import evaluate_job
from tests.train.evaluate_job import WORLDS, logits_table


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998), table I, method 3 (Wilson's score interval without correction)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_gives_published_numbers(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)
    # the mirrored proportion has the mirrored interval
    assert wilson_interval(total - correct, total) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_wilson_interval_solves_its_defining_equation() -> None:
    # its ends are the p at which |p_hat - p| is exactly 1.96 standard deviations sqrt(p (1 - p) / n)
    for end in wilson_interval(8512, 10000):
        assert abs(0.8512 - end) / math.sqrt(end * (1 - end) / 10000) == pytest.approx(1.959963984540054, rel=1e-9)


def test_wilson_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="an accuracy of nothing has no confidence interval"):
        wilson_interval(0, 0)


def test_paired_interval_by_hand() -> None:
    # 100 images, 10 only the first gets right, 4 only the second: difference .06; variance of +1/-1/0 is .14 - .06^2 = .1364;
    # standard error sqrt(.1364 / 100) = .0369324; times 1.959964 is .0723862
    assert paired_interval(10, 4, 100) == pytest.approx((-0.0123862, 0.1323862), abs=1e-7)
    assert paired_interval(0, 0, 100) == (0.0, 0.0)
    assert paired_interval(5, 5, 100)[0] == -paired_interval(5, 5, 100)[1]


def test_paired_interval_holds_the_truth_in_95_of_100_samples() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(2000):  # P(only first) = .10, P(only second) = .06: the true difference is .04
        values = [draw.random() for _ in range(400)]
        low, high = paired_interval(sum(v < 0.10 for v in values), sum(0.10 <= v < 0.16 for v in values), 400)
        inside += low <= 0.04 <= high
    assert 0.935 < inside / 2000 < 0.965


def score(hits: list[int], predictions: list[int] | None = None, *, block_load: list[int] | None = None) -> Score:
    load = {0: torch.tensor(block_load)} if block_load else {}
    entropy_sum, drop_sum = ({0: 3.0}, {0: 0.2}) if load else ({}, {})
    answers = torch.tensor(predictions if predictions is not None else hits)
    return Score(len(hits), sum(hits), len(hits), 0.5 * len(hits), answers, torch.tensor(hits), load, entropy_sum, drop_sum)


def test_student_and_baseline_are_compared_image_by_image() -> None:
    # student right on images 0, 1, 2, 4; baseline on 0, 3: three images only the student, one only the baseline
    result = compare(score([1, 1, 1, 0, 1, 0]), score([1, 0, 0, 1, 0, 0]))
    assert (result["only_student_right"], result["only_baseline_right"]) == (3, 1)
    assert result["top1"] == pytest.approx(2 / 6)
    assert tuple(result["ci"]) == paired_interval(3, 1, 6)


def test_results_hold_agreement_sizes_load_and_entropy() -> None:
    scores = {
        "teacher": score([1, 1, 0, 0], [7, 3, 2, 1]),
        "student_hybrid_0": score([1, 1, 1, 1], [0, 0, 0, 0], block_load=[9, 9]),
        "student": score([1, 0, 0, 1], [7, 3, 9, 9], block_load=[6, 2]),
        "baseline": score([0, 0, 0, 0], [7, 3, 2, 1], block_load=[4, 4]),
    }
    results = summarise_scores(scores, {"student": (100, 60)}, seed=3, world_size=2)
    assert results["num_images"] == 4 and results["seed"] == 3 and results["world_size"] == 2
    assert {name: model["agreement_with_teacher"] for name, model in results["models"].items()} == {
        "teacher": 1.0, "student_hybrid_0": 0.0, "student": 0.5, "baseline": 1.0,
    }  # fmt: skip
    assert (results["models"]["student"]["parameters"], results["models"]["student"]["active_parameters"]) == (100, 60)
    assert "parameters" not in results["models"]["teacher"]
    # whole students only: a hybrid's load is that of one module
    assert results["expert_load"] == {"student": {"0": [6, 2]}, "baseline": {"0": [4, 4]}}
    assert results["entropy"]["student"] == {"0": 0.75}  # 3.0 summed over 4 images
    assert results["drop_rate"]["student"] == {"0": 0.05}  # 0.2 over 4 images
    assert results["student_minus_baseline"]["top1"] == 0.5
    del scores["baseline"]
    assert "student_minus_baseline" not in summarise_scores(scores, {}, seed=0, world_size=1)
    json.dumps(results)


LARGE, SMALL = (23, 7), (2, 4)
"""Images and classes; two images leave the third rank without a batch, and four classes have no fifth place."""


def grey(number: int) -> int:
    """Grey value of image `number`: different for every image of a set."""
    return 5 + 9 * number


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every rank found in jobs of 1, 2 and 3 ranks; all ranks must have found the same."""
    out = tmp_path_factory.mktemp("evaluate")
    for name, (images, classes) in (("large", LARGE), ("small", SMALL), ("copy", LARGE)):
        shade = {22: 1} if name == "copy" else {}  # the last image of the copy is a little brighter
        samples = [
            (encode_png(np.full((8, 8), grey(i) + shade.get(i, 0), np.uint8)), "png", i % classes, f"image-{i}") for i in range(images)
        ]
        write_shards(
            samples, out / name, total=images, class_names=[str(c) for c in range(classes)], source="test", license="none",
            samples_per_shard=10,
        )  # fmt: skip
    subprocess.run([sys.executable, str(evaluate_job.__file__), str(out)], check=True, timeout=240)
    by_rank = [json.loads((out / f"results_{rank}.json").read_text()) for rank in range(max(WORLDS))]
    for own in by_rank[1:]:
        assert all(by_rank[0][key] == value for key, value in own.items() if not key.startswith(("repeat", "drop", "label", "copy")))
    for name in ("large", "small"):
        index = ShardIndex.load(out / name)
        by_rank[0][name] = [(int(index.read(i)[2].split("-")[1]), index.read(i)[1]) for i in range(index.num_samples)]
    return by_rank[0]


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize(("name", "sign"), [("dense", 1), ("sparse", -1)])
@pytest.mark.parametrize(("data", "images", "classes"), [("large", *LARGE), ("small", *SMALL)])
def test_counts_are_those_of_a_plain_loop(
    results: dict[str, Any], data: str, images: int, classes: int, name: str, sign: int, size: int
) -> None:
    table = (sign * logits_table(classes).double()).tolist()
    found = results[f"{data}_{size}"][name]
    top1 = top5 = 0
    loss = 0.0
    for place, (number, label) in enumerate(results[data]):  # the order of the index: shards are shuffled
        logits = table[grey(number)]
        ranking = sorted(range(classes), key=lambda c: -logits[c])
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
        loss += math.log(sum(math.exp(x) for x in logits)) - logits[label]
        assert found["predictions_N"][place] == ranking[0] and found["hits_N"][place] == int(ranking[0] == label)
    assert (found["images"], found["top1_correct"], found["top5_correct"]) == (images, top1, top5)
    assert found["loss_sum"] == pytest.approx(loss, rel=1e-5)
    if classes < 5:
        assert top5 == images  # fewer than five classes: every label is among the first five


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize(("data", "images"), [("large", LARGE[0]), ("small", SMALL[0])])
def test_expert_load_and_entropy_are_sums_over_all_images(results: dict[str, Any], data: str, images: int, size: int) -> None:
    found = results[f"{data}_{size}"]
    values = [grey(i) for i in range(images)]
    assert found["sparse"]["expert_load"] == {"2": [sum(v % 3 == e for v in values) for e in range(3)]}
    assert found["sparse"]["entropy_sum"] == {"2": pytest.approx(sum(values) / 100, rel=1e-5)}
    assert found["sparse"]["drop_sum"] == {"2": pytest.approx(sum(values) / 1000, rel=1e-5)}
    assert found["dense"]["expert_load"] == {}


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("data", ["large", "small"])
def test_models_that_talk_to_other_ranks_run_in_step_and_score_the_same(results: dict[str, Any], data: str, size: int) -> None:
    # 23 images in batches of 4: on two ranks 3 and 3 batches, on three 2, 2 and 2; two images leave rank 2 of three without any
    assert results[f"in_step_{data}_{size}"]["together"] == results[f"{data}_{size}"]["dense"]


@pytest.mark.parametrize("size", WORLDS)
def test_a_loss_that_is_no_number_is_refused_on_all_ranks_with_the_same_words(results: dict[str, Any], size: int) -> None:
    # The fixture has compared the words of the ranks; one of them alone has met the image.
    assert results[f"poisoned_{size}"] == (
        "evaluate: student has a loss of nan on the validation images; results.json takes finite numbers only, and nothing was written: "
        "train end_to_end again with a lower lr or with clip_grad"
    )


def test_the_models_whose_scores_are_no_numbers_are_named_with_what_trained_them() -> None:
    fine, lost, routed = score([1, 0]), score([1, 0]), score([1, 0], block_load=[1, 1])
    lost.loss_sum = math.inf
    routed.entropy_sum = {0: math.nan}
    said = "student_hybrid_12 has a routing entropy of nan, baseline has a loss of inf on .*: train m2mkd and baseline again"
    with pytest.raises(NonFiniteLossError, match=said):
        summarise_scores({"teacher": fine, "student_hybrid_12": routed, "baseline": lost}, {}, seed=0, world_size=1)


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize(("tamper", "count"), [("repeat", "more"), ("drop", "fewer")])
def test_an_image_seen_twice_or_never_is_an_error(results: dict[str, Any], tamper: str, count: str, size: int) -> None:
    message = results[f"{tamper}_{size}"]
    seen = int(message.split()[2])
    assert message.startswith("evaluation saw ") and "of 23; samples not seen exactly once: [" in message
    assert seen > 23 if count == "more" else seen < 23


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("tamper", ["label", "copy"])
def test_ranks_that_mean_other_images_or_labels_by_the_same_numbers_are_an_error(results: dict[str, Any], tamper: str, size: int) -> None:
    # Counting alone would not see it: every number comes once. A job of one rank that has the copy only agrees with itself.
    message = results[f"{tamper}_{size}"]
    if tamper == "copy" and size == 1:
        assert message == "no error"
    else:
        assert message.startswith("evaluation saw every sample once, but other images or labels than the index says (checksum ")
