"""The documented command over two hosts: one launch over ssh, and one on this host to compare it with."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.jobs import curve, login_environment, pipeline_words, same_bits, train_words, write_images, write_run
from tests.cluster.lab import Lab
from tests.launching import launch


def test_two_hosts_train_what_one_host_trains(lab: Lab, tmp_path: Path) -> None:
    write_images(tmp_path / "shards")
    hostfile = lab.hostfile({"node1": 1, "node2": 1}, tmp_path / "hostfile")
    two = write_run(tmp_path, "two", hostfile=str(hostfile))
    log = tmp_path / "log"
    job = lab.launch("node1", pipeline_words(two), log, env=login_environment())
    assert job.wait(180) == 0, log.read_text()[-4000:]
    text = log.read_text()
    assert all(f"{name}: [" in text for name in ("node1", "node2"))  # pdsh says which host speaks
    assert not lab.processes("node1") and not lab.processes("node2")

    one = write_run(tmp_path, "one")
    module, *words = train_words(one)
    launch(module, words, ranks=2, module=True, timeout_s=120)
    assert len(curve(one)) >= 6
    assert curve(two) == curve(one)
    assert same_bits(two, one)
