"""Every test runs on a CPU, offline, and says what it left out.

Environment is set here, before any test file imports torch or deepspeed, and child processes inherit it. Tests marked
`slow` or `multinode` are deselected unless `--all` or an own `-m` expression asks for them; the closing summary counts them.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.left_over import running

ROOT = Path(__file__).resolve().parent.parent
DEFERRED_MARKERS = ("slow", "multinode")
OUR_THREADS = ("teacher-", "m2mkd-", "shm-", "flight ", "shards ahead", "metrics-page", "finish ", "checksums", "export_", "checkpoint_")
"""How the names of the threads that the package starts begin."""
DEAD_PROXY = "http://127.0.0.1:9"  # the discard port: a child process that tries the network fails at once

os.environ.setdefault("DS_ACCELERATOR", "cpu")
if os.environ["DS_ACCELERATOR"] == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # our kernels run on the CPU; triton looks once, when it is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
    os.environ[_name] = DEAD_PROXY
for _name in ("no_proxy", "NO_PROXY"):
    os.environ[_name] = "localhost,127.0.0.1,::1"
# Child processes must import this checkout, not an installed copy of the package.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])

_left_out: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="also run the tests marked slow or multinode")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what is deferred; skip, with the reason, what this machine cannot run."""
    if not config.getoption("--all") and not config.getoption("markexpr"):
        kept: list[pytest.Item] = []
        gone: list[pytest.Item] = []
        for item in items:
            marker = next((name for name in DEFERRED_MARKERS if item.get_closest_marker(name)), None)
            if marker:
                _left_out[marker] += 1
            (gone if marker else kept).append(item)
        if gone:
            config.hook.pytest_deselected(items=gone)
            items[:] = kept
    if any(item.get_closest_marker("gpu") for item in items):
        import torch  # costs a second: only where a test asks

        if not torch.cuda.is_available():
            _skip_marked(items, "gpu", "no CUDA device")
    if importlib.util.find_spec("tutel") is None:
        _skip_marked(items, "tutel", "tutel is not installed (it is not on PyPI)")


def _skip_marked(items: list[pytest.Item], marker: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for marker, count in sorted(_left_out.items()):
        terminalreporter.write_line(f"DESELECTED [{count}] marked {marker}: run them with `scripts/test.sh --all` or `pytest -m {marker}`")


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # a Unix socket's path
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] in ("localhost", socket.gethostname())


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Any connection that leaves this machine is an error that names its target."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if not _is_local(address):
            raise ConnectionRefusedError(f"tests run without a network, and something connects to {address}")
        connect(self, address)

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Every test meets the package's logger as an import leaves it; a command run in this process sets it up for good."""
    _reset_log()
    yield
    _reset_log()


@pytest.fixture(autouse=True)
def no_thread_left() -> Iterator[None]:
    """A thread that outlives its test works on in those that follow, and is counted in them."""
    before = running()
    yield
    until = time.monotonic() + 5
    while left := [thread for thread in running() - before if thread.name.startswith(OUR_THREADS)]:
        assert time.monotonic() < until, f"threads outlive the test: {[thread.name for thread in left]}"
        time.sleep(0.01)


def _reset_log() -> None:
    log = logging.getLogger("m2mkd_ds")
    log.handlers[:] = []
    log.setLevel(logging.NOTSET)
    log.propagate = True


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT
