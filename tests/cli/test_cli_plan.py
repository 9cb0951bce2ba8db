"""`m2mkd plan`: text, JSON and picture of a plan, and one sentence for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.ended import Run


def test_a_plan_is_printed_and_drawn_and_needs_no_data(m2mkd: Run, tmp_path: Path) -> None:
    words = "plan --recipe tiny --phase pretrain_meta --gpus-per-node 2 --largest-micro-batch 1 --images 1437".split()
    ended = m2mkd(*words, "--plot", "plan.svg")
    assert ended.code == 0 and "tiny on 1 x 2 GPUs of 80 GB" in ended.out and "ds_config=zero1" in ended.out
    assert (tmp_path / "plan.svg").read_text().startswith("<?xml")
    assert ended.err.count("\n") == 1 and "plan: pretrain_meta on 2 ranks; every phase runs on shapes" in ended.err
    tree = json.loads(m2mkd(*words, "--json").out)
    (phase,) = tree["phases"]
    # 8 epochs of 1437 images in batches of 16 x 2.
    assert (phase["name"], phase["steps"]) == ("pretrain_meta", round(8 * 1437 / 32))
    assert sum(phase["memory"]["parts"].values()) == phase["memory"]["total"]


def test_a_refused_phase_has_its_reason_below_the_table_and_the_headings_stay_whole(m2mkd: Run) -> None:
    text = m2mkd("plan", "--recipe", "tiny", "--phase", "m2mkd", "--largest-micro-batch", "1", "--set", "m2mkd.ep_size=3").out
    assert "\n  refused: m2mkd: ep_size 3 does not divide 8 ranks\n" in text
    assert all(heading in text for heading in ("gradients", "activations", "temporary")) and "\u2026" not in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--phase", "split"), "--phase split: this run has the phases pretrain_meta, modular_train"),
        (("--mfu", "1.5"), "cluster: mfu is 1.5; it must be a number above 0, at most 1"),
        (("--cluster", "no.yaml"), "--cluster no.yaml: no such file"),
        (("--pair", "7"), "--pair 7: there are 2 pairs"),
        (("--phase", "baseline", "--pair", "0"), "--pair 0: baseline has no pairs"),
        (("--largest-micro-batch", "0"), "--largest-micro-batch 0"),
        (("--imbalance", "nan"), "--imbalance is nan; give a number from 1"),
        (("--imbalance", "inf"), "--imbalance is inf; give a number from 1"),
        (("--plot", "nowhere/memory.svg"), "--plot nowhere/memory.svg: there is no folder nowhere; make it"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(m2mkd: Run, words: tuple[str, ...], told: str) -> None:
    ended = m2mkd("plan", "--recipe", "tiny", *words)
    assert ended.code == 2 and told in ended.err and "Traceback" not in ended.err
