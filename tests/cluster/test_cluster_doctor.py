"""`m2mkd doctor --cluster` on real hosts: a sound cluster, and one where every host has another fault."""

from __future__ import annotations

import json
import sys
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.jobs import login_environment, write_images, write_run
from tests.cluster.lab import Lab

pytestmark = [pytest.mark.multinode, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("doctor")
    write_images(out / "shards")
    return write_run(out, "run")


def ask(lab: Lab, run: Path, slots: dict[str, int], *words: str) -> tuple[int, str]:
    hostfile = lab.hostfile(slots, run.parent / "hostfile")
    log = run.parent / f"log-{len(list(run.parent.glob('log-*')))}"
    command = [sys.executable, "-m", "m2mkd_ds", "doctor", "--cluster", str(hostfile), "--config", str(run / "config.yaml"), *words]
    code = lab.launch("node1", command, log, env=login_environment()).wait(240)
    return code, log.read_text()


def test_a_sound_cluster_gets_a_table_and_speeds(lab_of_four: Lab, run: Path) -> None:
    code, text = ask(lab_of_four, run, {"node1": 1, "node2": 1})
    assert code == 0, text
    assert text.splitlines()[-1] == "no problem found"
    rows = [line.split() for line in text.splitlines() if line.startswith("node")]
    assert [row[:3] for row in rows] == [["node1", "1", "yes"], ["node2", "1", "yes"]]
    assert all("eth0" in row and f"10.77.0.{i}" in row for i, row in enumerate(rows, start=1))
    assert "small job: 2 ranks" in text and "GB/s a rank" in text
    assert not list(run.glob(".doctor-*"))


def test_every_fault_of_a_host_is_named_in_one_line(lab_of_four: Lab, run: Path, tmp_path: Path) -> None:
    """node2 has another deepspeed, a clock an hour behind and a name that means loopback; node3 no python; node4 is down."""
    lab = lab_of_four
    metadata = Path(str(distribution("deepspeed").locate_file(""))) / f"deepspeed-{distribution('deepspeed').version}.dist-info/METADATA"
    other = tmp_path / "METADATA"
    other.write_text(metadata.read_text().replace(f"Version: {distribution('deepspeed').version}", "Version: 0.1.2", 1))
    clock = tmp_path / "date"
    clock.write_text("#!/bin/bash\nprintf '%d.0\\n' $(($EPOCHSECONDS - 3600))\n")
    clock.chmod(0o755)
    hosts = lab.hosts["node2"].folder / "hosts"
    before = hosts.read_text()
    hosts.write_text(before.replace("10.77.0.2 node2", "127.0.1.1 node2"))
    mounts = [("node2", other, metadata), ("node2", clock, Path("/bin/date")), ("node3", tmp_path / "empty", Path(sys.executable).parent)]
    (tmp_path / "empty").mkdir()
    for host, source, target in mounts:
        lab.inside(host, ["mount", "--bind", str(source), str(target)])
    lab.kill_host("node4")
    try:
        code, text = ask(lab, run, {"node1": 1, "node2": 99, "node3": 1, "node4": 1}, "--json")
    finally:
        hosts.write_text(before)
        for host, _, target in mounts:
            lab.inside(host, ["umount", str(target)])
        lab.start_host("node4")
    found: dict[str, Any] = json.loads(text[text.index("{") :])
    assert code == 1
    lines = found["problems"]
    assert [line.partition(":")[0] for line in lines] == ["node2", "node2", "node2", "node3", "node4", "small job"]
    assert lines[0] == f"node2: deepspeed 0.1.2 and here {distribution('deepspeed').version}; install the same version on all hosts"
    assert lines[1].startswith("node2: its clock is 3") and "behind ours" in lines[1]
    assert lines[2].startswith("node2: slots=99 but no GPU and")
    assert "cannot be started" in lines[3] and "same path" in lines[3]
    assert "not reached by ssh" in lines[4]
    assert found["notes"] == ["node2: its own name means 127.0.1.1, which gloo alone would take; ranks are told eth0"]
    assert found["exchange"] is None


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (["mount", "--bind", "-o", "ro", "RUN", "RUN"], "run folder RUN: [Errno 30] Read-only file system"),
        (["mount", "-t", "tmpfs", "none", "RUN"], "run folder RUN: [Errno 2] No such file or directory"),
        (["mount", "-t", "tmpfs", "none", "SHARDS"], "data.train:"),
    ],
)
def test_a_folder_that_one_host_does_not_share_is_named(lab_of_four: Lab, run: Path, fault: list[str], message: str) -> None:
    """The third host is down, so that no small job is started."""
    lab, shards = lab_of_four, str(run.parent / "shards/train")
    words = [word.replace("RUN", str(run)).replace("SHARDS", shards) for word in fault]
    lab.inside("node2", words)
    lab.kill_host("node3")
    try:
        code, text = ask(lab, run, {"node1": 1, "node2": 1, "node3": 1})
    finally:
        lab.inside("node2", ["umount", words[-1]])
        lab.start_host("node3")
    assert code == 1
    problems = [line for line in text.splitlines() if line.startswith("PROBLEM ")]
    assert len(problems) == 3
    assert problems[0].startswith(f"PROBLEM node2: {message.replace('RUN', str(run))}")
