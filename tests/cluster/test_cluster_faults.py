"""Faults of a job over two hosts: it ends within a bounded time, leaves no process anywhere, and the same command goes on to the same bits.

One undisturbed run is compared with all. Each fault strikes when some steps are done and no checkpoint was just written.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from m2mkd_ds.logs import read_metrics
from tests.cluster import jobs
from tests.cluster.jobs import curve, login_environment, same_bits, train_words, write_images, write_run
from tests.cluster.lab import Lab
from tests.launching import launch

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
STEPS = 400
STRIKE = 33
"""Checkpoints are written every 5 steps."""
END_S = 90
"""Within so many seconds of a fault the command has ended, and no process of the job is left on any host."""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("faults")
    write_images(out / "shards")
    module, *words = train_words(write_run(out, "undisturbed", steps=STEPS))
    launch(module, words, ranks=2, module=True, timeout_s=240)
    return out


def start(lab: Lab, out: Path, name: str) -> tuple[Path, subprocess.Popen[bytes], Path]:
    """The pipeline on node1, over both hosts; the run folder, the client and the log."""
    hostfile = lab.hostfile({"node1": 1, "node2": 1}, out / "hostfile")
    run = out / name if (out / name).exists() else write_run(out, name, hostfile=str(hostfile), steps=STEPS)
    log = out / f"{name}.log"
    return run, lab.launch("node1", jobs.pipeline_words(run), log, env=login_environment()), log


def wait_for_step(run: Path, client: subprocess.Popen[bytes], log: Path) -> None:
    """Until step STRIKE was logged; the run must not have ended by itself."""
    deadline = time.monotonic() + 200
    metrics = run / "pretrain_meta/metrics.jsonl"
    while not metrics.exists() or not any(line["step"] >= STRIKE for line in read_metrics(metrics)):
        assert client.poll() is None and time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.05)


def rank_on(lab: Lab, host: str) -> int:
    """The trainer's process there, by its number outside."""
    (number,) = [pid for pid, words in lab.processes(host).items() if " m2mkd_ds --local_rank" in words]
    return number


def kill_a_rank(lab: Lab) -> None:
    os.kill(rank_on(lab, "node2"), signal.SIGKILL)


def kill_a_host(lab: Lab) -> None:
    lab.kill_host("node2")


def kill_the_launcher(lab: Lab) -> None:
    (number,) = [pid for pid, words in lab.processes("node1").items() if "deepspeed.launcher.runner" in words and "python" in words]
    os.kill(number, signal.SIGKILL)


def kill_the_pipeline(lab: Lab) -> None:
    (number,) = [pid for pid, words in lab.processes("node1").items() if "m2mkd_ds pipeline" in words]
    os.kill(number, signal.SIGTERM)


def cut_a_link(lab: Lab) -> None:
    lab.link_down("node2")


FAULTS: dict[str, Callable[[Lab], None]] = {
    function.__name__: function for function in (kill_a_rank, kill_a_host, kill_the_launcher, kill_the_pipeline, cut_a_link)
}
ENDS = {
    "kill_a_rank": (1, "failed on rank 0 .host node1.*rank 1 on node2"),
    "kill_a_host": (1, "failed on rank 0 .host node1.*rank 1 on node2"),
    "kill_the_launcher": (75, "stopped on request in pretrain_meta at step [1-9]"),
    "kill_the_pipeline": (75, r"stopped on request in pretrain_meta at step [1-9]\d* \(SIGTERM\)"),
    "cut_a_link": (76, r"failed on rank 0 .host node1.*limit: watch\.step_s=30"),
}
"""Exit code of the command, and what its last line says."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_ends_the_job_and_the_same_command_goes_on(lab: Lab, out: Path, fault: str) -> None:
    run, client, log = start(lab, out, fault)
    try:
        wait_for_step(run, client, log)
        FAULTS[fault](lab)
        struck = time.monotonic()
        code = client.wait(END_S)
        ended_s = time.monotonic() - struck
        while any(lab.processes(name) for name in lab.hosts):
            assert time.monotonic() - struck < END_S, {name: lab.processes(name) for name in lab.hosts}
            time.sleep(0.2)
        print(f"{fault}: the command ended after {ended_s:.1f} s, the last process after {time.monotonic() - struck:.1f} s")
        assert not (run / "pretrain_meta/done.json").exists()
        last = [line for line in log.read_text().splitlines() if line.startswith("m2mkd: ")][-1]
        print(f"{fault}: exit code {code}; {last}")
        expected, cause = ENDS[fault]
        assert code == expected and re.search(cause, last), log.read_text()[-4000:]
    finally:
        client.kill()
        if lab.hosts["node2"].boot is None:
            lab.start_host("node2")
        lab.link_up("node2")
    _, again, _ = start(lab, out, fault)
    assert again.wait(240) == 0, log.read_text()[-4000:]
    assert "resumed from step" in log.read_text()
    assert curve(run) == curve(out / "undisturbed")
    assert same_bits(run, out / "undisturbed")


def test_stopping_one_job_leaves_another_of_the_same_user_and_environment_alone(lab: Lab, out: Path) -> None:
    """The launcher's own clean-up is a pkill on every host by the name of the python, which would end both."""
    hostfile = lab.hostfile({"node1": 1, "node2": 1}, out / "hostfile")
    clients, runs, logs = [], [], []
    for name in ("stopped", "left_alone"):
        runs.append(write_run(out, name, hostfile=str(hostfile), steps=STEPS * 3))
        logs.append(out / f"{name}.log")
        clients.append(lab.launch("node1", jobs.pipeline_words(runs[-1]), logs[-1], env=login_environment()))
    for run, client, log in zip(runs, clients, logs, strict=True):
        wait_for_step(run, client, log)
    (pipeline,) = [pid for pid, words in lab.processes("node1").items() if "m2mkd_ds pipeline" in words and str(runs[0]) in words]
    os.kill(pipeline, signal.SIGTERM)
    assert clients[0].wait(END_S) == 75, logs[0].read_text()[-4000:]
    deadline = time.monotonic() + END_S
    while any(str(runs[0]) in words for name in lab.hosts for words in lab.processes(name).values()):
        assert time.monotonic() < deadline, {name: lab.processes(name) for name in lab.hosts}
        time.sleep(0.2)
    assert clients[1].poll() is None, "the other job ended before this one was stopped; it proves nothing"
    assert clients[1].wait(400) == 0, logs[1].read_text()[-4000:]
    assert (runs[1] / "pretrain_meta/done.json").exists()
