"""Words for servers, the watched list, and who is asked for what."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest

from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.teacher.client.connect import check_endpoints, connect
from m2mkd_ds.teacher.client.endpoints import EndpointList, by_preference, split_host_port


@pytest.mark.parametrize(
    "endpoint", ["a:1", "teacher-3.cluster.example:8815", "10.0.0.7:65535", "[::1]:8815", "unix:/run/t.sock", "unix:t"]
)
def test_good_endpoints_pass(endpoint: str) -> None:
    check_endpoints((endpoint,))


@pytest.mark.parametrize(
    ("endpoint", "told"),
    [
        ("teacher", "the host or the port is missing"),
        (":8815", "the host or the port is missing"),
        ("", "the host or the port is missing"),
        ("a:", "the port is ''"),
        ("a:0", "it must be a number from 1 to 65535"),
        ("a:65536", "it must be a number from 1 to 65535"),
        ("a:88 15", "it must be a number"),
        ("a:\u0661", "it must be a number"),
        ("grpc://a:1", "leave out the scheme"),
        ("::1:8815", "put an IPv6 address into brackets"),
        ("[]:1", "cannot be a name"),
        ("user@a:1", "cannot be a name"),
        ("a b:1", "cannot be a name"),
        ("unix:", "has 0 bytes"),
        ("unix:/" + "x" * 107, "has 108 bytes; a socket's path has 1 to 107"),
        ("file:", "without a path"),
    ],
)  # fmt: skip
def test_odd_endpoints_are_refused_with_the_reason(endpoint: str, told: str) -> None:
    with pytest.raises(ValueError, match="teacher.endpoints.*" + told.replace("'", ".")):
        check_endpoints((endpoint,))


def test_lists_and_feeds_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="is empty"):
        check_endpoints(())
    with pytest.raises(ValueError, match="a file:PATH stands alone"):
        check_endpoints(("a:1", "file:x"))
    with pytest.raises(ValueError, match="a:1 is a network address, and teacher.feed=shm needs unix:PATH"):
        check_endpoints(("a:1",), feed="shm")
    check_endpoints(("unix:x",), feed="shm")
    with pytest.raises(ValueError, match="'a' is not HOST:PORT"):
        connect("a", TeacherConfig())


def test_hosts_and_ports_are_taken_apart() -> None:
    assert split_host_port("a.b:17") == ("a.b", 17) and split_host_port("[fe80::1]:17") == ("fe80::1", 17)


def test_a_fixed_list_holds_each_once_and_never_changes() -> None:
    listed = EndpointList(("a:1", "b:1", "a:1"))
    assert listed.current == ("a:1", "b:1") and not listed.is_watched and not listed.refresh()


@pytest.mark.parametrize(
    ("listed", "feed", "is_encrypted", "named", "told"),
    [
        ("a:1", "remote", False, "a:2", ""),
        ("a:1", "remote", False, "127.0.0.1:2", ""),
        ("a:1", "remote", False, "[::1]:2", ""),
        ("a:1", "remote", False, "unix:x", ""),
        ("a:1", "remote", False, "b:1", "b:1 is on a host that teacher.endpoints does not name, and no teacher.tls_ca"),
        ("unix:x", "remote", False, "b:1", "b:1 is on a host"),
        ("a:1", "remote", True, "b:1", ""),
        ("a:1", "remote", True, "b", "'b' is not HOST:PORT"),
        ("unix:x", "shm", True, "a:1", "a:1 is a network address, and teacher.feed=shm needs unix:PATH"),
        ("unix:x", "shm", False, "unix:y", ""),
    ],
)  # fmt: skip
def test_a_server_leads_the_trainer_nowhere_that_its_settings_would_not(
    listed: str, feed: str, is_encrypted: bool, named: str, told: str
) -> None:
    endpoints = EndpointList((listed,), feed, is_encrypted=is_encrypted)
    with pytest.raises(ValueError, match=told) if told else nullcontext():
        endpoints.check_named(named)


def test_a_connection_is_of_the_kind_that_the_feed_needs() -> None:
    with pytest.raises(ValueError, match="a:1 is a network address, and teacher.feed=shm needs unix:PATH"):
        connect("a:1", TeacherConfig(feed="shm", endpoints=("unix:x",)))


def test_a_file_is_followed_and_kept_when_it_is_odd(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "servers"
    file.write_text("# ours\na:1\n\n b:1 # rack 2\na:1\n")
    listed = EndpointList((f"file:{file}",))
    assert listed.current == ("a:1", "b:1") and listed.is_watched and not listed.refresh()
    file.write_text("b:1\n")
    assert listed.refresh() and listed.current == ("b:1",)
    for text, told in [
        ("b:1\nc:88", "half written"),
        ("", "lists no endpoint"),
        ("x\n", "'x' is not HOST:PORT"),
        ("#\n" * 40_000, "more than"),
    ]:
        file.write_text(text)
        caplog.clear()
        assert not listed.refresh() and not listed.refresh()
        assert listed.current == ("b:1",)
        assert len(caplog.records) == 1 and told in caplog.text and "the 1 teacher servers of before stay" in caplog.text
    file.unlink()
    assert not listed.refresh() and "cannot be read" in caplog.text
    file.write_bytes(b"\xff\n")
    assert not listed.refresh()
    file.write_text("c:8815\n")
    assert listed.refresh() and listed.current == ("c:8815",)


def test_a_file_that_cannot_be_used_at_the_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        EndpointList((f"file:{tmp_path / 'none'}",))
    (tmp_path / "tcp").write_text("a:1\n")
    with pytest.raises(ValueError, match="needs unix:PATH"):
        EndpointList((f"file:{tmp_path / 'tcp'}",), feed="shm")


def test_keys_are_dealt_evenly_and_only_those_of_who_comes_or_goes_move() -> None:
    names = [f"10.0.0.{i}:8815" for i in range(4)]
    owner = {key: by_preference(names, key)[0] for key in range(2000)}
    # 2000 keys over 4: 500 each, standard deviation sqrt(2000 * 1/4 * 3/4) = 19.
    assert all(abs(n - 500) < 100 for n in Counter(owner.values()).values())
    assert owner == {key: by_preference(reversed(names), key)[0] for key in owner}  # the list's order means nothing
    left = {key: by_preference(names[:3], key)[0] for key in owner}
    assert all(left[key] == owner[key] for key in owner if owner[key] != names[3])
    assert all(by_preference(names, key)[1] == left[key] for key in owner if owner[key] == names[3])
