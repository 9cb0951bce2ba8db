"""Hosts of a job and their meeting point, as the launcher is told them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from m2mkd_ds.config import ConfigError, LaunchConfig
from m2mkd_ds.train.launching.hostfile import read_hostfile, with_meeting_point


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A name service of our own, and this host is node1."""
    known = {"node1": "10.0.0.1", "node2": "10.0.0.2", "me": "127.0.1.1", "node9": "127.0.0.2"}

    def look_up(host: str, *rest: object, **named: object) -> list[object]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (known[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(socket, "gethostname", lambda: "me")
    return known


def hostfile(folder: Path, text: str) -> str:
    (folder / "hosts").write_text(text)
    return str(folder / "hosts")


def test_hosts_come_in_the_order_of_the_file_as_deepspeed_reads_them(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    file = Path(hostfile(tmp_path, "# two\nnodeB slots=4  # big\n\n  nodeA   slots=2\n"))
    assert list(read_hostfile(file).items()) == [("nodeB", 4), ("nodeA", 2)]
    plain = Path(hostfile(tmp_path, "# two\nnodeB slots=4\n\nnodeA slots=2\n"))
    assert dict(read_hostfile(plain)) == dict(fetch_hostfile(str(plain)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", "line 1: 'node1'; expected `NAME slots=RANKS`"),
        ("node1 slots=2\nnode2 slots=0\n", "line 2"),
        ("node1;reboot slots=2\n", "line 1"),
        ("a slots=1\na slots=1\n", "line 2: a stands there twice"),
        ("# nobody\n", "names no host"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_hostfile(Path(hostfile(tmp_path, text)))


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"launch\.hostfile /: a folder; name a file"):
        read_hostfile(Path("/"))
    with pytest.raises(ConfigError, match=r"launch\.hostfile /nowhere/hosts: no such file"):
        read_hostfile(Path("/nowhere/hosts"))


def test_the_launcher_is_told_where_to_meet_and_never_starts_ranks_here_instead(tmp_path: Path, names: dict[str, str]) -> None:
    launch = LaunchConfig(hostfile=hostfile(tmp_path, "node1 slots=1\nnode2 slots=1\n"), extra=("--bind_cores_to_rank",))
    flags = with_meeting_point(launch, "/runs/a").extra
    assert flags[:2] == ("--master_addr", "10.0.0.1") and flags[2] == "--master_port"
    assert 20000 <= int(flags[3]) < 32000 and flags[4:] == ("--force_multi", "--bind_cores_to_rank")
    assert with_meeting_point(launch, "/runs/a").extra == flags  # a resumed run meets where it met before
    assert with_meeting_point(launch, "/runs/b").extra[3] != flags[3]


def test_what_the_user_says_stays(tmp_path: Path, names: dict[str, str]) -> None:
    file = hostfile(tmp_path, "unknown slots=1\n")
    said = ("--master_addr", "10.5.5.5", "--master_port=29501", "--force_multi")
    assert with_meeting_point(LaunchConfig(hostfile=file, extra=said), "r").extra == said
    flags = with_meeting_point(LaunchConfig(hostfile=file, master_addr="10.6.6.6", extra=("--include", "node1")), "r").extra
    assert flags[:2] == ("--master_addr", "10.6.6.6")
    with pytest.raises(ConfigError, match=r"launch\.master_addr is 10\.6\.6\.6 and launch\.extra has --master_addr"):
        with_meeting_point(LaunchConfig(hostfile=file, master_addr="10.6.6.6", extra=said), "r")


def test_a_job_of_this_host_is_left_alone() -> None:
    launch = LaunchConfig(num_gpus=2)
    assert with_meeting_point(launch, "r") is launch
    with pytest.raises(ConfigError, match=r"launch\.hostfile is empty"):
        with_meeting_point(LaunchConfig(master_addr="10.0.0.1"), "r")


def test_this_host_s_own_name_that_means_loopback_gives_the_address_towards_the_second_host(
    tmp_path: Path, names: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("m2mkd_ds.train.launching.hostfile.local_address_towards", lambda host: {"10.0.0.2": "10.0.0.77"}[host])
    launch = LaunchConfig(hostfile=hostfile(tmp_path, "me slots=1\nnode2 slots=1\n"))
    assert with_meeting_point(launch, "r").extra[:2] == ("--master_addr", "10.0.0.77")


@pytest.mark.parametrize(
    ("text", "extra", "message"),
    [
        ("node9 slots=1\nnode2 slots=1\n", (), r"node9 means 127\.0\.0\.2 here, and this host is me: set launch\.master_addr"),
        ("node7 slots=1\n", (), "node7: Name or service not known"),
        ("node1 slots=2\nnode2 slots=2\n", ("--include", "node2:0"), "launch.extra has --include, so the first host is not known"),
    ],
)
def test_a_meeting_point_that_cannot_be_told_is_asked_for(
    tmp_path: Path, names: dict[str, str], text: str, extra: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        with_meeting_point(LaunchConfig(hostfile=hostfile(tmp_path, text), extra=extra), "r")


def test_more_ranks_than_slots_are_refused(tmp_path: Path, names: dict[str, str]) -> None:
    launch = LaunchConfig(hostfile=hostfile(tmp_path, "node1 slots=4\nnode2 slots=2\n"), num_gpus=3)
    with pytest.raises(ConfigError, match=r"launch\.num_gpus is 3, but .* has node2 slots=2; 0 means as many as slots"):
        with_meeting_point(launch, "r")
