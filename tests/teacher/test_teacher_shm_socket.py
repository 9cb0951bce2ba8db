"""The socket's name: who gets it, who keeps it, and what a path may be; and a link to servers that are silent, or forked away."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from m2mkd_ds.teacher.protocol.wire import LinkError
from m2mkd_ds.teacher.server.service import TeacherService
from m2mkd_ds.teacher.shm import socket as shm_socket
from m2mkd_ds.teacher.shm.client import ShmConnection
from m2mkd_ds.teacher.shm.server import ShmTransport

MakeService = Callable[..., TeacherService]


def test_a_live_servers_path_is_refused_and_a_dead_ones_taken_over(sharing_service: MakeService, tmp_path: Path) -> None:
    path = str(tmp_path / "t.sock")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()  # as kill -9 leaves it: a name, and nobody behind it
    first, second = ShmTransport(sharing_service(), path), ShmTransport(sharing_service(), path)
    first.start()
    try:
        with pytest.raises(ValueError, match=r"t\.sock: a server is running there already"):
            second.start()
        assert ShmConnection(path).status(5.0).ready
        # Somebody else takes the path: stopping must leave what is not ours.
        os.unlink(path)
        third = shm_socket.listen(path)
        assert first.stop(5.0) and os.path.exists(path)  # its lane may still be saying so
        third.close()
    finally:
        first.stop(0.0)
    assert sorted(os.listdir(tmp_path)) == ["t.sock"]


class SlowToListen(socket.socket):
    """A server that is interrupted between having its name and listening."""

    def listen(self, backlog: int = 128, /) -> None:
        time.sleep(0.3)
        super().listen(backlog)


@pytest.mark.parametrize("kind", [socket.socket, SlowToListen])
def test_servers_that_start_at_once_over_a_dead_ones_socket_get_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[socket.socket]
) -> None:
    monkeypatch.setattr(shm_socket.socket, "socket", kind)
    path = str(tmp_path / "t.sock")
    left = socket.socket(socket.AF_UNIX)
    left.bind(path)
    left.close()
    got: list[socket.socket] = []
    refused: list[str] = []

    def start() -> None:
        try:
            got.append(shm_socket.listen(path))
        except ValueError as err:
            refused.append(str(err))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 5 and os.listdir(tmp_path) == ["t.sock"]
    probe = socket.socket(socket.AF_UNIX)
    probe.connect(path)
    got[0].accept()[0].close()


def test_paths_that_cannot_be_are_refused_with_what_to_do(sharing_service: MakeService, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has 108 bytes, a socket's may have 1 to 107; .*for example unix:/tmp/teacher\.sock"):
        ShmTransport(sharing_service(), "/" + "x" * 107)
    with pytest.raises(ValueError, match="has 108 bytes"):
        ShmConnection("unix:/" + "ä" * 53 + "x")  # 1 + 53 * 2 + 1
    with pytest.raises(ValueError, match="has 0 bytes"):
        ShmConnection("unix:")
    with pytest.raises(ValueError, match="its folder does not exist"):
        ShmTransport(sharing_service(), tmp_path / "absent" / "t.sock").start()
    file = tmp_path / "notes.txt"
    file.write_text("precious")
    with pytest.raises(ValueError, match="a file that is no socket"):
        ShmTransport(sharing_service(), file).start()
    assert file.read_text() == "precious"


def test_a_silent_server_ends_by_the_deadline_and_by_close(tmp_path: Path) -> None:
    silent = shm_socket.listen(str(tmp_path / "t.sock"))  # takes connections, never answers
    link = ShmConnection(f"unix:{tmp_path}/t.sock")
    begun = time.monotonic()
    with pytest.raises(LinkError, match=r"no answer within 0\.2 s") as late:
        link.status(0.2)
    assert late.value.fault == "deadline" and time.monotonic() - begun < 1.0
    faults: list[str] = []

    def wait() -> None:
        try:
            link.status(10.0)
        except LinkError as err:
            faults.append(err.fault)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.2)
    link.close()
    thread.join(2.0)
    assert faults == ["closed"]
    with pytest.raises(LinkError, match="was closed"):
        link.status(1.0)
    silent.close()


def test_a_server_that_takes_no_more_connections_ends_by_the_deadline(tmp_path: Path) -> None:
    full = socket.socket(socket.AF_UNIX)
    full.bind(str(tmp_path / "t.sock"))
    full.listen(0)
    first = socket.socket(socket.AF_UNIX)
    first.connect(str(tmp_path / "t.sock"))  # fills the queue
    begun = time.monotonic()
    with pytest.raises(LinkError, match=r"took no connection within 0\.2 s") as late:
        ShmConnection(str(tmp_path / "t.sock")).status(0.2)
    assert late.value.fault == "deadline" and 0.2 <= time.monotonic() - begun < 1.0


def test_a_forked_child_is_refused_and_leaves_the_parents_link_alone(sharing_service: MakeService, tmp_path: Path) -> None:
    transport = ShmTransport(sharing_service(), tmp_path / "t.sock")
    transport.start()
    link = ShmConnection(transport.endpoint)
    link.status(5.0)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            link.status(5.0)
        except LinkError as err:
            code = 0 if "was forked from it; open a new one" in str(err) else 2
        finally:
            link.close()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert link.status(5.0).ready and transport.num_lanes == 1  # the same lane
    link.close()
    transport.stop(0.0)
