"""Phase m2mkd with its teacher in four places: the weights are the same, bit for bit. By the real launcher, two ranks, a real server.

One server process listens on a Unix socket and on a port at once, and serves every run. `replay` reads what `teacher-export` wrote;
`no_images` has the index of the shards and no shards, for training and for validation.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.logs import read_metrics
from tests.launching import launch
from tests.train import teacher_feeds_job
from tests.train.serving import Server, m2mkd
from tests.train.teacher_feeds_job import STEPS

SCRIPT = Path(teacher_feeds_job.__file__)
FEEDS = ("shm", "remote_hidden", "remote_image", "remote_logits", "replay", "no_images")
pytestmark = pytest.mark.timeout(600)  # two launches and a server, on a machine that may be busy


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("feeds")
    make_source("digits", out / "shards")
    launch(SCRIPT, [str(out), "prepare"], timeout_s=240)
    config = out / "base" / "config.yaml"
    words = ["teacher-export", "--config", str(config), "--out", str(out / "logits"), "--ranks", "2", "--dtype", "fp32"]
    exported = m2mkd(words, out, out / "export.txt")
    assert exported.wait(120) == 0, (out / "export.txt").read_text()[-4000:]
    for part in ("train", "validation"):
        (out / "index" / part).mkdir(parents=True)
        for name in ("index.json", "index.npy"):
            shutil.copy(out / "shards" / part / name, out / "index" / part / name)
    server = Server(config, out, "a", "--listen", f"unix:{out}/s")
    try:
        server.ready()
        remote = f"feed=remote;endpoints=[{server.endpoint}]"
        runs = [
            f"shm=feed=shm;endpoints=[unix:{out}/s]", f"remote_hidden={remote}", f"remote_image={remote};payload=image",
            f"remote_logits={remote};payload=logits", f"replay=feed=replay;replay={out}/logits",
            f"no_images={remote};data.train={out}/index/train;data.validation={out}/index/validation",
        ]  # fmt: skip
        launch(SCRIPT, [str(out), "feeds", *runs], timeout_s=300)
        (out / "counters.json").write_text(json.dumps(server.counters()))
        server.signal(signal.SIGTERM)
        (out / "server.code").write_text(str(server.process.wait(40)))
        yield out
    finally:
        server.end()


def weights(out: Path, name: str, pair: int) -> dict[str, torch.Tensor]:
    return load_file(out / name / "m2mkd" / f"pair_{pair}" / "weights.safetensors")


@pytest.mark.parametrize("name", FEEDS)
def test_the_weights_do_not_depend_on_where_the_teacher_is(out: Path, name: str) -> None:
    pairs = len(list((out / "colocated" / "m2mkd").glob("pair_*")))
    assert pairs > 1
    for pair in range(pairs):
        ours, theirs = weights(out, "colocated", pair), weights(out, name, pair)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", FEEDS)
def test_losses_and_scores_are_those_of_the_colocated_run(out: Path, name: str) -> None:
    def told(run: str) -> list[dict[str, float]]:
        lines = read_metrics(out / run / "m2mkd" / "pair_1" / "metrics.jsonl")
        return [{key: line[key] for key in line if key in ("step", "loss", "task", "kd") or key.startswith("eval/")} for line in lines]

    assert told(name) == told("colocated") and len(told(name)) == STEPS


def test_the_trainer_logs_what_the_feed_cost(out: Path) -> None:
    lines = read_metrics(out / "remote_hidden" / "m2mkd" / "pair_1" / "metrics.jsonl")
    assert sum(line["teacher/bytes_in"] for line in lines) > 0
    assert all(line["teacher/retries"] == line["teacher/failovers"] == line["teacher/colocated"] == 0 for line in lines)


def test_the_server_counted_every_answer_and_left_when_told(out: Path) -> None:
    values = json.loads((out / "counters.json").read_text())
    # Five runs of six steps, two micro-steps, two ranks. Evaluation images come from the server where a trainer reads none itself: in
    # four runs, one batch for each of two ranks.
    assert values["answers_total"] == 5 * STEPS * 2 * 2 + 4 * 2
    assert (out / "server.code").read_text() == "0", (out / "server_a.txt").read_text()
    assert not (out / "s").exists()


def test_the_run_without_a_teacher_at_hand_wrote_down_the_same_inputs(out: Path) -> None:
    records = [json.loads((out / name / "m2mkd" / "done.json").read_text()) for name in ("colocated", *FEEDS)]
    assert len({record["fingerprint"] for record in records}) == 1


def test_no_shared_memory_is_left_behind(out: Path) -> None:
    assert [name for name in os.listdir("/dev/shm") if "m2mkd" in name] == []
