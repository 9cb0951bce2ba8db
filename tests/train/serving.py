"""A real `m2mkd teacher-server` process for tests: started, waited for, asked, stopped by its own process id."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.launching import free_port, rank_environment


def m2mkd(words: list[str], scratch: Path, log: Path) -> subprocess.Popen[str]:
    """`m2mkd WORDS` as a child, its output in a file."""
    with log.open("a") as text:
        return subprocess.Popen(
            [sys.executable, "-m", "m2mkd_ds", *words], env=rank_environment(scratch), stdout=text, stderr=text, text=True
        )  # fmt: skip


class Server:
    """One server on a port of its own."""

    def __init__(self, config: Path, scratch: Path, name: str, *words: str, port: int = 0) -> None:
        self.port, self.metrics = port or free_port(), free_port()
        self.endpoint = f"127.0.0.1:{self.port}"
        self.log = scratch / f"server_{name}.txt"
        self.process = m2mkd(
            ["teacher-server", "--config", str(config), "--listen", self.endpoint, "--metrics", f"127.0.0.1:{self.metrics}", *words],
            scratch, self.log,
        )  # fmt: skip

    def ready(self, timeout_s: float = 120.0) -> Server:
        """Itself, once it answers."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                if self.get("/ready") == "ready\n":
                    return self
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.2)

    def get(self, path: str) -> str:
        """A page of it."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"http://127.0.0.1:{self.metrics}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def counters(self) -> dict[str, float]:
        """The numbers of /metrics by name, without the prefix."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics").splitlines() if not line.startswith("#")]
        return {name.removeprefix("m2mkd_teacher_"): float(value) for name, value in lines}

    def signal(self, number: int) -> None:
        """To this process alone."""
        self.process.send_signal(number)

    def end(self) -> None:
        """If it still runs."""
        self.process.kill()
        self.process.wait(10)
