"""Shared memory between processes that are killed and frozen: nothing leaks, nothing hangs, nothing that is held changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import RunConfig, to_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.packing import pack
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, FeedError, GetBatch, Hello, LinkError, Welcome
from m2mkd_ds.teacher.server.service import TeacherService
from m2mkd_ds.teacher.shm.client import ShmConnection
from m2mkd_ds.teacher.shm.server import ShmTransport
from tests.left_over import open_files
from tests.teacher.conftest import tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=1, world=1)

SERVER = """
import json, sys, time, torch
torch.set_num_threads(1)
from m2mkd_ds.config import from_dict
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from m2mkd_ds.teacher.shm.server import ShmTransport
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints
config = from_dict(json.loads(sys.argv[1]))
index = ShardIndex.load(config.data.train)
options = ServiceOptions(limits=LIMITS, max_bytes=2**28)
service = TeacherService(Producer(make_parts(config, index)), tiny_fingerprints(config, index), options)
ShmTransport(service, sys.argv[2]).start()
print("ready", flush=True)
time.sleep(60)  # the test kills it long before
"""

# Asks for a batch, receives its segment, maps it, and never says that it has taken it: only the standard library, so it starts at once.
CLIENT = """
import mmap, socket, sys, time
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
body = sys.argv[2].encode()
sock.sendall(len(body).to_bytes(4, "big") + b"B" + body)
header, fds, _, _ = socket.recv_fds(sock, 5, 1)
assert header[4:] == b"R" and len(fds) == 1
segment = mmap.mmap(fds[0], 0, prot=mmap.PROT_READ)
print("holds", len(segment), flush=True)
time.sleep(60)
"""


@contextmanager
def running(script: str, *argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process, and the first line it says."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", script, *argv], stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


@pytest.fixture
def hello(tiny_config: RunConfig, tiny_index: ShardIndex) -> Hello:
    return Hello(
        oldest_protocol=2, newest_protocol=PROTOCOL_VERSION, client="test", rank=0, layout=LAYOUT, pairs=(0, 1, 2), payload="hidden",
        wire_dtype="fp32", with_teacher=True, fingerprints=tiny_fingerprints(tiny_config, tiny_index),
    )  # fmt: skip


def request(welcome: Welcome, step: int) -> GetBatch:
    return GetBatch(
        instance=welcome.instance, plan=welcome.plan, client="test", layout=LAYOUT, start=4 * step, pairs=(0, 1, 2), payload="hidden",
        wire_dtype="fp32", with_teacher=True, attempt=0,
    )  # fmt: skip


def open_segments() -> int:
    """Descriptors of this process that are segments."""
    links = [Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd")]
    return sum("m2mkd_teacher" in os.readlink(link) for link in links if link.is_symlink())


def mapped_segments() -> int:
    return Path("/proc/self/maps").read_text().count("m2mkd_teacher")


def names_in_shared_memory() -> set[str]:
    """Without the semaphores that other processes of this machine make and remove for their pools."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def test_a_server_that_is_frozen_or_killed_is_told_in_time_and_leaves_nothing(
    make_service: Callable[..., TeacherService], tiny_config: RunConfig, tmp_path: Path, hello: Hello
) -> None:
    path = tmp_path / "t.sock"
    named = names_in_shared_memory()
    link = ShmConnection(f"unix:{path}")
    with running(SERVER, json.dumps(to_dict(tiny_config)), str(path)) as (server, said):
        assert said == "ready"
        welcome = link.hello(hello, 10.0)
        held = [link.get(request(welcome, step), 10.0) for step in range(4)]

        # Frozen: the kernel still takes connections and bytes for it.
        server.send_signal(signal.SIGSTOP)
        for call in (lambda: link.get(request(welcome, 5), 0.4), lambda: link.status(0.4)):
            begun = time.monotonic()
            with pytest.raises(LinkError, match=r"no answer within 0\.4 s") as late:
                call()
            assert late.value.fault == "deadline" and time.monotonic() - begun < 2.0
        server.send_signal(signal.SIGCONT)
        # It now answers the abandoned requests, to nobody; ours gets what it asked for.
        held.append(link.get(request(welcome, 4), 10.0))
        assert held[4].head.start == 16 and link.status(10.0).ready

        server.kill()
        server.wait(10)
        for _ in range(2):
            with pytest.raises(LinkError) as gone:
                link.get(request(welcome, 6), 5.0)
            assert gone.value.fault == "unreachable"
        assert mapped_segments() == 0 and names_in_shared_memory() == named  # the kernel has it all back

    # The name it left is taken over, and the link goes on by itself once it has said Hello.
    service = make_service()
    transport = ShmTransport(service, path)
    transport.start()
    with pytest.raises(FeedError) as other:
        link.get(request(welcome, 0), 10.0)
    assert other.value.code == "mismatch"
    welcome = link.hello(hello, 10.0)
    local = LocalConnection(service)
    for step, answer in enumerate(held):
        again = link.get(request(welcome, step), 10.0)
        for name, tensor in local.get(request(welcome, step), 10.0).tensors.items():
            assert torch.equal(answer.tensors[name], tensor) and torch.equal(again.tensors[name], tensor)
    link.close()
    transport.stop(0.0)
    assert open_segments() == 0 and mapped_segments() == 0 and not path.exists()


def test_a_killed_client_gives_its_slot_back_and_disturbs_nobody(
    make_service: Callable[..., TeacherService], tmp_path: Path, hello: Hello
) -> None:
    service = make_service()
    transport = ShmTransport(service, tmp_path / "t.sock")
    transport.start()
    link = ShmConnection(transport.endpoint)
    welcome = link.hello(hello, 10.0)
    link.get(request(welcome, 0), 10.0)
    segment_bytes = transport.num_bytes
    files = open_files()
    with running(CLIENT, transport.path, pack(request(welcome, 3)).decode()) as (client, said):
        assert said == f"holds {segment_bytes}" and transport.num_bytes == 2 * segment_bytes
        for step in range(5):
            assert link.get(request(welcome, step), 10.0).head.start == 4 * step
        assert transport.num_bytes == 2 * segment_bytes  # its slot is kept for it, ours did for all
        client.kill()
        client.wait(10)
        end = time.monotonic() + 5
        while transport.num_bytes > segment_bytes and time.monotonic() < end:
            time.sleep(0.01)
        assert transport.num_bytes == segment_bytes and transport.num_lanes == 1
    assert open_files() <= files
    assert link.get(request(welcome, 9), 10.0).head.start == 36
    link.close()
    transport.stop(0.0)
    assert open_segments() == 0
