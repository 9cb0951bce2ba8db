"""What a server's process does first: it takes its addresses, and only then loads its models."""

from __future__ import annotations

import signal
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from m2mkd_ds.cli.resolve import resolve
from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.teacher.client.connect import connect
from m2mkd_ds.teacher.protocol.wire import FeedError
from m2mkd_ds.teacher.server.options import ServerOptions
from m2mkd_ds.train.teacher import serve as teacher_serve
from tests.launching import free_port


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run that was never made: whatever loads it fails."""
    return resolve(None, "tiny", str(tmp_path / "run"), ())


@pytest.fixture(autouse=True)
def signals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own process keeps its handlers."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)


@pytest.mark.parametrize("transport", ["flight", "shm"])
def test_an_address_that_is_taken_is_told_before_anything_is_loaded(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setattr(teacher_serve, "open_teacher", lambda config: pytest.fail("it loads"))
    with socket.socket(socket.AF_UNIX if transport == "shm" else socket.AF_INET) as taken:
        taken.bind(str(tmp_path / "t.sock") if transport == "shm" else ("127.0.0.1", 0))
        taken.listen()
        listen = f"unix:{tmp_path}/t.sock" if transport == "shm" else f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"--listen {listen}: .*(in use|running there already)"):
            teacher_serve.serve(config, ServerOptions(listen=(listen,), metrics=""))


def test_while_models_load_the_server_lives_and_asks_trainers_to_wait(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    port, page = free_port(), free_port()
    seen = []

    def get(path: str) -> tuple[int, str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{page}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as err:
            return err.code, err.read().decode()

    def load(config: RunConfig) -> None:
        seen.extend([get("/live"), get("/ready")])
        link = connect(f"127.0.0.1:{port}", config.teacher)
        with pytest.raises(FeedError, match="still loading its models"):
            link.status(5.0)
        link.close()
        raise ConfigError("loading failed")

    monkeypatch.setattr(teacher_serve, "open_teacher", load)
    with pytest.raises(ConfigError, match="loading failed"):
        teacher_serve.serve(config, ServerOptions(listen=(f"127.0.0.1:{port}",), metrics=f"127.0.0.1:{page}"))
    assert seen == [(200, "live\n"), (503, "not ready\n")]
    for given_back in (port, page):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", given_back), 5.0)
