"""Every documented way to start ranks gives the losses and, bit for bit, the weights of one host with as many ranks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster import jobs
from tests.cluster.jobs import curve, login_environment, same_bits, train_words, write_images, write_run
from tests.cluster.lab import Lab
from tests.launching import free_port, launch

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(900)]
LIMIT_S = 240


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images and the runs `one_host_2` and `one_host_4`, which the others are compared with."""
    out = tmp_path_factory.mktemp("launchers")
    write_images(out / "shards")
    for ranks in (2, 4):
        module, *words = train_words(write_run(out, f"one_host_{ranks}", ranks=ranks))
        launch(module, words, ranks=ranks, module=True, timeout_s=LIMIT_S)
    return out


def finish(out: Path, *clients: subprocess.Popen[bytes], log: Path) -> None:
    codes = [client.wait(LIMIT_S) for client in clients]
    assert codes == [0] * len(clients), log.read_text()[-5000:]


def assert_like_one_host(out: Path, run: Path, ranks: int) -> None:
    assert len(curve(run)) >= 6
    assert curve(run) == curve(out / f"one_host_{ranks}")
    assert same_bits(run, out / f"one_host_{ranks}")


def test_deepspeed_over_ssh_on_four_hosts(lab_of_four: Lab, out: Path) -> None:
    hostfile = lab_of_four.hostfile({f"node{i}": 1 for i in range(1, 5)}, out / "four")
    run = write_run(out, "pdsh_4", ranks=4, hostfile=str(hostfile))
    log = out / "pdsh_4.log"
    finish(out, lab_of_four.launch("node1", jobs.pipeline_words(run), log, env=login_environment()), log=log)
    assert_like_one_host(out, run, 4)


def test_deepspeed_from_a_host_that_takes_no_part(lab_of_four: Lab, out: Path) -> None:
    hostfile = lab_of_four.hostfile({"node2": 1, "node3": 1}, out / "others")
    run = write_run(out, "pdsh_from_outside", hostfile=str(hostfile))
    log = out / "pdsh_from_outside.log"
    finish(out, lab_of_four.launch("node1", jobs.pipeline_words(run), log, env=login_environment()), log=log)
    assert_like_one_host(out, run, 2)


def test_deepspeed_with_one_other_host_starts_the_ranks_there(lab_of_four: Lab, out: Path) -> None:
    hostfile = lab_of_four.hostfile({"node2": 2}, out / "one_other")
    run = write_run(out, "pdsh_one_other", hostfile=str(hostfile))
    log = out / "pdsh_one_other.log"
    finish(out, lab_of_four.launch("node1", jobs.pipeline_words(run), log, env=login_environment()), log=log)
    assert "node2: [" in log.read_text()
    assert_like_one_host(out, run, 2)


def test_deepspeed_by_hand_on_each_node(lab_of_four: Lab, out: Path) -> None:
    hostfile = lab_of_four.hostfile({"node1": 1, "node2": 1}, out / "by_hand")
    run, log, port = write_run(out, "no_ssh"), out / "no_ssh.log", free_port()
    clients = [
        lab_of_four.launch(f"node{node + 1}", jobs.by_hand(run, hostfile, node, "node1", port), log, env=login_environment())
        for node in (0, 1)
    ]
    finish(out, *clients, log=log)
    assert_like_one_host(out, run, 2)


def test_tasks_of_srun_find_their_ranks_themselves(lab_of_four: Lab, out: Path) -> None:
    """Four tasks, two a node; Slurm numbers them by blocks."""
    run, log = write_run(out, "slurm", ranks=4), out / "slurm.log"
    clients = []
    for rank in range(4):
        node, local = divmod(rank, 2)
        told = jobs.as_srun("node[2-3]", "2(x2)", rank=rank, size=4, node=node, local=local, num_nodes=2)
        words = [sys.executable, "-m", *train_words(run)]
        clients.append(lab_of_four.launch(f"node{node + 2}", words, log, env={**login_environment(), **told}))
    finish(out, *clients, log=log)
    assert_like_one_host(out, run, 4)


def test_a_host_whose_own_name_means_loopback_takes_part(lab_of_four: Lab, out: Path) -> None:
    """As Debian sets it up; by hand, because the launcher is given a name, not an address."""
    hostfile = lab_of_four.hostfile({"node3": 1, "node4": 1}, out / "debian.hosts")
    run, log, port = write_run(out, "debian"), out / "debian.log", free_port()
    for name in ("node3", "node4"):
        lines = (lab_of_four.hosts[name].folder / "hosts").read_text().splitlines()
        own = [f"127.0.1.1 {name}" if line.endswith(f" {name}") else line for line in lines]
        (lab_of_four.hosts[name].folder / "hosts").write_text("\n".join(own) + "\n")
    assert lab_of_four.ssh("node3", "getent hosts node3").stdout.split() == ["127.0.1.1", "node3"]
    clients = [
        lab_of_four.launch(f"node{node + 3}", jobs.by_hand(run, hostfile, node, "node3", port), log, env=login_environment())
        for node in (0, 1)
    ]
    finish(out, *clients, log=log)
    assert_like_one_host(out, run, 2)


@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_other_launchers_on_one_host(out: Path, name: str) -> None:
    run = write_run(out, name)
    command = {"torchrun": jobs.torchrun, "accelerate": jobs.accelerate}[name](run, 2)
    _run_here(command, {})
    assert_like_one_host(out, run, 2)


def test_accelerate_that_starts_one_process_of_two_is_refused(out: Path) -> None:
    run = write_run(out, "accelerate_cpu")
    done = subprocess.run(jobs.accelerate(run, 2, "--cpu"), env=jobs.here(), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode != 0
    assert "with --multi_gpu it starts them all" in done.stderr
    assert not (run / "pretrain_meta").exists()


def _run_here(command: list[str], extra: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=jobs.here(extra), capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("backend", ["auto", pytest.param("tutel_dispatch", marks=pytest.mark.tutel)])
def test_experts_and_zero_2_spread_over_two_hosts(lab_of_four: Lab, out: Path, backend: str) -> None:
    """Experts are halved over the hosts by one field, gradients by another; compared with the same two ranks on one host."""
    hostfile = lab_of_four.hostfile({"node1": 1, "node2": 1}, out / "experts")
    words = ["m2mkd.ep_size=2", "end_to_end.ep_size=2", "m2mkd.ds_config=zero2", "end_to_end.ds_config=zero2"]
    words += [f"student.moe.backend={backend}"]
    run = write_run(out, f"{backend}_2", words, hostfile=str(hostfile), steps=3)
    log = out / f"{backend}_2.log"
    finish(out, lab_of_four.launch("node1", jobs.pipeline_words(run, "baseline"), log, env=login_environment()), log=log)
    one = write_run(out, f"{backend}_1", words, steps=3)
    module, *verb = train_words(one, "baseline")
    done = launch(module, verb, ranks=2, module=True, timeout_s=LIMIT_S)
    assert "crosses hosts" in log.read_text() and "crosses hosts" not in done.stdout
    assert len(curve(one, "baseline")) >= 6
    assert curve(run, "baseline") == curve(one, "baseline")
    assert same_bits(run, one, "baseline")
    # Experts were really apart, and that changes rounding only.
    whole = write_run(out, f"{backend}_0", [word.replace("ep_size=2", "ep_size=1") for word in words], steps=3)
    module, *verb = train_words(whole, "baseline")
    launch(module, verb, ranks=2, module=True, timeout_s=LIMIT_S)
    apart, together = (load_file(folder / "baseline/weights.safetensors") for folder in (one, whole))
    assert apart.keys() == together.keys()
    assert max(float((apart[name] - together[name]).abs().max()) for name in apart) < 1e-6
