"""A local http server that serves a folder and misbehaves to order."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

Fault = Callable[["Handler", bytes], bool]
"""Answers in place of the server and returns True, or returns False to let it answer. Gets the whole file's bytes."""


class FaultyServer(ThreadingHTTPServer):
    """`faults` are used up one a request, first to last; `always` acts when none is left. `requests` lists (path, headers)."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        self.only = ""
        """Faults act on paths that hold this."""
        self.ranges = True
        self.connections = 0
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def asked(self, part: str) -> int:
        """Requests whose path holds `part`."""
        return sum(part in path for path, _ in self.requests)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients hang up on purpose here."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = 10
    disable_nagle_algorithm = True  # headers and body are two writes; together they would wait for an acknowledgement
    server: FaultyServer

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        fault = None
        with self.server.lock:
            self.server.requests.append((self.path, dict(self.headers)))
            if self.server.only in path:
                fault = self.server.faults.pop(0) if self.server.faults else self.server.always
        file = self.server.folder / path.lstrip("/")
        body = file.read_bytes() if file.is_file() else b""
        if fault is not None and fault(self, body):
            return
        if not file.is_file():
            self.answer(404, b"nothing here")
        else:
            self.serve(body)

    def span(self, body: bytes) -> tuple[int, int] | None:
        """First and one past the last byte asked for; None: all."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not found or not self.server.ranges:
            return None
        return int(found[1]), min(len(body), int(found[2]) + 1 if found[2] else len(body))

    def serve(self, body: bytes) -> None:
        span = self.span(body)
        if span is None:
            self.answer(200, body)
        elif span[0] >= len(body):
            self.answer(416, b"", {"Content-Range": f"bytes */{len(body)}"})
        else:
            self.answer(206, body[slice(*span)], {"Content-Range": f"bytes {span[0]}-{span[1] - 1}/{len(body)}"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body) if length is None else length), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """A running server; stopped and closed afterwards."""
    server = FaultyServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def status(code: int, **headers: str) -> Fault:
    """Answer with this status."""

    def act(handler: Handler, body: bytes) -> bool:
        handler.answer(code, b"no", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return act


def redirect(target: str) -> Fault:
    """Send elsewhere: `target` + path."""

    def act(handler: Handler, body: bytes) -> bool:
        handler.answer(302, b"", {"Location": target + handler.path})
        return True

    return act


def cut(keep: int) -> Fault:
    """Promise all of what was asked for, send `keep` bytes, close in good order."""

    def act(handler: Handler, body: bytes) -> bool:
        first, last = handler.span(body) or (0, len(body))
        whole = handler.span(body) is None
        range_header = {} if whole else {"Content-Range": f"bytes {first}-{last - 1}/{len(body)}"}
        handler.answer(200 if whole else 206, body[first : first + keep], range_header, length=last - first)
        handler.close_connection = True
        return True

    return act


def reset(keep: int) -> Fault:
    """As `cut`, but with a TCP reset."""

    def act(handler: Handler, body: bytes) -> bool:
        cut(keep)(handler, body)
        handler.wfile.flush()
        time.sleep(0.05)  # lets the bytes arrive before the reset throws the rest away
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.connection.close()
        return True

    return act


def stall(seconds: float, keep: int = 0) -> Fault:
    """As `cut`, but with silence before the end."""

    def act(handler: Handler, body: bytes) -> bool:
        cut(keep)(handler, body)
        handler.wfile.flush()
        time.sleep(seconds)
        return True

    return act


def slow(seconds: float) -> Fault:
    """Answer properly, later."""

    def act(handler: Handler, body: bytes) -> bool:
        time.sleep(seconds)
        return False

    return act


def wrong_range(shift: int) -> Fault:
    """A 206 that says it begins elsewhere."""

    def act(handler: Handler, body: bytes) -> bool:
        first, last = handler.span(body) or (0, len(body))
        handler.answer(206, body[first:last], {"Content-Range": f"bytes {first + shift}-{last - 1 + shift}/{len(body)}"})
        return True

    return act


def flipped(at: int) -> Fault:
    """The file with one byte changed."""

    def act(handler: Handler, body: bytes) -> bool:
        handler.serve(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        return True

    return act
