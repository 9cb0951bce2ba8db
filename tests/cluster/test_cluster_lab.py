"""The lab is what the other tests here take it for: hosts of their own, faults that bite, and nothing left behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, alive, why_no_lab


def test_hosts_know_each_other_by_name_and_share_no_process_and_no_name(lab: Lab, tmp_path: Path) -> None:
    answer = lab.ssh("node1", "hostname; hostname -I; ssh node2 hostname; ssh node2 hostname -I")
    assert answer.stdout.split() == ["node1", "10.77.0.1", "node2", "10.77.0.2"], answer.stderr
    client = lab.launch("node2", ["sleep", "61"], tmp_path / "log")
    try:
        _wait(lambda: any("sleep 61" in words for words in lab.processes("node2").values()))
        assert not any("sleep 61" in words for words in lab.processes("node1").values())
        assert lab.ssh("node1", "pkill -f 'sleep 61'").returncode == 1  # no such process there
        assert lab.ssh("node2", "pkill -x sleep").returncode == 0
        assert client.wait(20) != 0
    finally:
        client.kill()


def test_only_the_key_of_the_lab_opens_a_host(lab: Lab) -> None:
    refused = lab.ssh("node1", "ssh -o IdentityFile=none -o IdentitiesOnly=yes -F none -o BatchMode=yes node2 true")
    assert refused.returncode == 255
    stranger = lab.ssh("node1", "ssh -F none -i /etc/ssh/key -o BatchMode=yes -o UserKnownHostsFile=/dev/null node2 true")
    assert stranger.returncode == 255 and "Host key verification failed" in stranger.stderr


def test_a_cut_link_loses_packets_and_mends(lab: Lab) -> None:
    reach = "timeout 2 bash -c 'echo > /dev/tcp/node2/22'"
    assert lab.ssh("node1", reach).returncode == 0
    lab.link_down("node2")
    try:
        assert lab.ssh("node1", reach).returncode == 124  # neither refused nor unreachable: it waits
    finally:
        lab.link_up("node2")
    _wait(lambda: lab.ssh("node1", reach).returncode == 0)


def test_a_killed_host_takes_its_processes_along_and_boots_again(lab: Lab, tmp_path: Path) -> None:
    client = lab.launch("node2", ["sleep", "62"], tmp_path / "log")
    _wait(lambda: "sleep 62" in lab.processes("node2").values())
    number = next(pid for pid, words in lab.processes("node2").items() if words == "sleep 62")
    lab.kill_host("node2")
    try:
        assert not alive(number)
        assert client.wait(20) == 255  # its ssh saw the connection end
    finally:
        lab.start_host("node2")
    assert lab.ssh("node1", "ssh node2 hostname").stdout == "node2\n"
    assert lab.processes("node2") == {}


def test_two_labs_do_not_meet_and_leave_nothing(tmp_path: Path) -> None:
    reason = why_no_lab()
    if reason:
        pytest.skip(reason)
    spaces = _name_spaces()
    for name in "ab":
        (tmp_path / name).mkdir()
    with Lab.start(tmp_path / "a", 1) as first, Lab.start(tmp_path / "b", 1) as second:
        pids = [host.init for lab in (first, second) for host in lab.hosts.values()]
        assert first.ssh("node1", "pkill sshd; true").returncode in (0, 255)
        assert second.ssh("node1", "hostname").stdout == "node1\n"
    assert _name_spaces() == spaces
    assert not any(alive(pid) for pid in pids)


def _name_spaces() -> set[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def _wait(condition: object, limit_s: float = 15.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.1)
