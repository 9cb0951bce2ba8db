"""What happens to teacher servers and trainers in the middle of phase m2mkd, done to real processes, changes no bit of the weights.

    storm    2 ranks, servers from a watched file: one is killed, comes back as another instance, one is frozen, one is drained
    alone    2 ranks, the only server is killed: the teacher moves into the trainers
    pair_0, pair_1   two jobs of a pair each at one server, one far behind the other; pair_1 is killed in step 4 and started again
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.logs import read_metrics
from tests.launching import free_port, kill_group, launch, launcher_command, rank_environment
from tests.train import teacher_feeds_job
from tests.train.serving import Server

SCRIPT = Path(teacher_feeds_job.__file__)
ONE_RANK = "m2mkd.gradient_accumulation_steps=4"
REMOTE = "feed=remote;deadline_s=5;patience_s=120;prefetch=2"
pytestmark = pytest.mark.timeout(900)  # a dozen processes, on a machine that may be busy


class Stage:
    """The folder, the servers, and the gates at which trainers wait."""

    def __init__(self, out: Path) -> None:
        self.out, self.config = out, out / "base" / "config.yaml"
        self.servers: list[Server] = []
        self.jobs: list[subprocess.Popen[str]] = []
        self.codes: dict[str, int] = {}
        self.counters: dict[str, float] = {}

    def server(self, name: str, port: int = 0) -> Server:
        self.servers.append(Server(self.config, self.out, name, port=port))
        return self.servers[-1]

    def job(self, name: str, *words: str, ranks: int = 2) -> subprocess.Popen[str]:
        """The ranks, or with ranks=1 a process without launcher."""
        start = launcher_command(ranks, free_port()) if ranks > 1 else [sys.executable]
        with (self.out / f"{name}.txt").open("a") as text:
            job = subprocess.Popen(
                [*start, str(SCRIPT), str(self.out), "feeds", *words], env=rank_environment(self.out), stdout=text, stderr=text, text=True,
                start_new_session=True,
            )  # fmt: skip
        self.jobs.append(job)
        return job

    def wait_at(self, name: str, step: int, job: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + 150
        while not (self.out / f"at_{name}_{step}").exists():
            assert job.poll() is None and time.monotonic() < deadline, self.said(name)
            time.sleep(0.05)

    def go(self, name: str, step: int) -> None:
        (self.out / f"go_{name}_{step}").touch()

    def finish(self, name: str, job: subprocess.Popen[str]) -> None:
        assert job.wait(200) == 0, self.said(name)

    def said(self, name: str) -> str:
        return (self.out / f"{name}.txt").read_text()[-6000:]

    def end(self) -> None:
        for job in self.jobs:
            kill_group(job)
        for server in self.servers:
            server.end()


def storm(stage: Stage) -> None:
    a, b = stage.server("a"), stage.server("b")
    listed = stage.out / "servers"
    listed.write_text(f"{a.ready().endpoint}\n")
    job = stage.job("storm", f"storm={REMOTE};endpoints=[file:{listed}];gates=1,2,3,4")
    stage.wait_at("storm", 1, job)
    listed.write_text(f"{a.endpoint}\n{b.ready().endpoint}\n")
    a.signal(signal.SIGKILL)
    a.process.wait(10)
    stage.go("storm", 1)
    stage.wait_at("storm", 2, job)
    again = stage.server("a_again", port=a.port).ready()
    b.signal(signal.SIGSTOP)
    stage.go("storm", 2)
    stage.wait_at("storm", 3, job)
    b.signal(signal.SIGCONT)  # its late answers come now, when nobody waits for them
    stage.go("storm", 3)
    stage.wait_at("storm", 4, job)
    again.signal(signal.SIGTERM)
    stage.go("storm", 4)
    stage.finish("storm", job)
    stage.codes["drained"] = again.process.wait(40)


def alone(stage: Stage, last: Server) -> None:
    job = stage.job("alone", f"alone={REMOTE};endpoints=[{last.endpoint}];on_teacher_loss=colocate;gates=2")
    stage.wait_at("alone", 2, job)
    last.signal(signal.SIGKILL)
    stage.go("alone", 2)
    stage.finish("alone", job)


def pairs(stage: Stage) -> None:
    server = stage.server("pairs").ready()
    remote = f"{REMOTE};{ONE_RANK};endpoints=[{server.endpoint}]"
    behind = stage.job("pair_1", f"pair_1@1={remote};gates=4", ranks=1)
    stage.finish("pair_0", stage.job("pair_0", f"pair_0@0={remote}", ranks=1))
    stage.wait_at("pair_1", 4, behind)  # its checkpoint is that of step 3
    behind.kill()
    behind.wait(10)
    stage.go("pair_1", 4)
    stage.finish("pair_1", stage.job("pair_1", f"pair_1@1={remote};gates=4", ranks=1))
    stage.counters = server.counters()
    server.signal(signal.SIGTERM)
    stage.codes["pairs"] = server.process.wait(40)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    out = tmp_path_factory.mktemp("faults")
    make_source("digits", out / "shards")
    launch(SCRIPT, [str(out), "prepare"], timeout_s=240)
    stage = Stage(out)
    try:
        storm(stage)
        alone(stage, stage.servers[1])
        stage.finish("reference", stage.job("reference", f"reference={ONE_RANK}", ranks=1))
        pairs(stage)
        yield stage
    finally:
        stage.end()


def same_weights(stage: Stage, ours: str, theirs: str, pair: int) -> bool:
    a, b = (load_file(stage.out / name / "m2mkd" / f"pair_{pair}" / "weights.safetensors") for name in (ours, theirs))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lines(stage: Stage, name: str, pair: int) -> list[dict[str, float]]:
    return read_metrics(stage.out / name / "m2mkd" / f"pair_{pair}" / "metrics.jsonl")


@pytest.mark.parametrize("pair", [0, 1])
def test_servers_that_die_come_back_freeze_and_leave_change_no_bit(stage: Stage, pair: int) -> None:
    assert same_weights(stage, "colocated", "storm", pair)


def test_the_trainer_counted_what_happened(stage: Stage) -> None:
    told = lines(stage, "storm", 0)
    assert sum(line["teacher/failovers"] + line["teacher/retries"] for line in told) > 0
    assert all(line["teacher/colocated"] == 0 for line in told)


def test_a_drained_server_ends_well(stage: Stage) -> None:
    assert stage.codes == {"drained": 0, "pairs": 0}


@pytest.mark.parametrize("pair", [0, 1])
def test_a_teacher_that_moves_in_gives_the_same_bytes(stage: Stage, pair: int) -> None:
    assert same_weights(stage, "colocated", "alone", pair)
    assert lines(stage, "alone", pair)[-1]["teacher/colocated"] == 1


@pytest.mark.parametrize("pair", [0, 1])
def test_jobs_of_single_pairs_at_one_server_equal_a_job_of_both(stage: Stage, pair: int) -> None:
    assert same_weights(stage, "reference", f"pair_{pair}", pair)  # pair_1 was killed and went on


def test_pairs_share_what_is_in_the_cache(stage: Stage) -> None:
    counters = stage.counters
    # pair_1 asks for what pair_0 had: decoded once, and decoded again for the steps that pair_1 repeats only if they were dropped.
    assert counters['cache_hits_total{level="decode"}'] >= 6 * 4
