"""Phase m2mkd with its teacher in four places: the weights are the same, bit for bit. By the real launcher, two ranks, a real server.

One server process listens on a Unix socket and on a port at once, and serves every run. `replay` reads what `teacher-export` wrote.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.logs import read_metrics
from tests.launching import free_port, launch, rank_environment
from tests.train import teacher_feeds_job
from tests.train.teacher_feeds_job import STEPS

SCRIPT = Path(teacher_feeds_job.__file__)
FEEDS = ("shm", "remote_hidden", "remote_image", "remote_logits", "replay")
pytestmark = pytest.mark.timeout(600)  # two launches and a server, on a machine that may be busy


def m2mkd(words: list[str], scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "m2mkd_ds", *words], env=rank_environment(scratch), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )  # fmt: skip


def get(url: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        return str(answer.read().decode())


def wait_ready(server: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if get(f"http://127.0.0.1:{port}/ready") == "ready\n":
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, server.communicate(timeout=5)[0][-4000:]
        time.sleep(0.2)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("feeds")
    make_source("digits", out / "shards")
    launch(SCRIPT, [str(out), "prepare"], timeout_s=240)
    config = str(out / "base" / "config.yaml")
    exported = m2mkd(["teacher-export", "--config", config, "--out", str(out / "logits"), "--ranks", "2", "--dtype", "fp32"], out)
    text, _ = exported.communicate(timeout=120)
    assert exported.returncode == 0, text[-4000:]
    port, metrics = free_port(), free_port()
    server = m2mkd(
        ["teacher-server", "--config", config, "--listen", f"127.0.0.1:{port}", f"unix:{out}/s", "--metrics", f"127.0.0.1:{metrics}"], out
    )
    try:
        wait_ready(server, metrics)
        remote = f"feed=remote;endpoints=[127.0.0.1:{port}]"
        runs = [
            f"shm=feed=shm;endpoints=[unix:{out}/s]", f"remote_hidden={remote}", f"remote_image={remote};payload=image",
            f"remote_logits={remote};payload=logits", f"replay=feed=replay;replay={out}/logits",
        ]  # fmt: skip
        launch(SCRIPT, [str(out), "feeds", *runs], timeout_s=300)
        (out / "metrics.txt").write_text(get(f"http://127.0.0.1:{metrics}/metrics"))
        server.send_signal(signal.SIGTERM)
        (out / "server.txt").write_text(server.communicate(timeout=40)[0])
        (out / "server.code").write_text(str(server.returncode))
        yield out
    finally:
        server.kill()
        server.wait(10)


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
    line = read_metrics(out / "remote_hidden" / "m2mkd" / "pair_1" / "metrics.jsonl")[-1]
    assert line["teacher/bytes_in"] > 0 and line["teacher/retries"] == 0 and line["teacher/colocated"] == 0


def test_the_server_counted_every_answer_and_left_when_told(out: Path) -> None:
    values = {
        words[0].removeprefix("m2mkd_teacher_"): float(words[1])
        for line in (out / "metrics.txt").read_text().splitlines()
        if not line.startswith("#") and len(words := line.rsplit(" ", 1)) == 2
    }
    # Four runs of six steps, two micro-steps, two ranks.
    assert values["answers_total"] == 4 * STEPS * 2 * 2
    assert (out / "server.code").read_text() == "0", (out / "server.txt").read_text()
    assert not (out / "s").exists()


def test_the_run_without_a_teacher_at_hand_wrote_down_the_same_inputs(out: Path) -> None:
    records = [json.loads((out / name / "m2mkd" / "done.json").read_text()) for name in ("colocated", *FEEDS)]
    assert len({record["fingerprint"] for record in records}) == 1


def test_no_shared_memory_is_left_behind(out: Path) -> None:
    assert [name for name in os.listdir("/dev/shm") if "m2mkd" in name] == []
