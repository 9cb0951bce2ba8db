"""A teacher server's numbers and health over HTTP: /metrics (Prometheus text), /live, /ready.

Numbers only, no weights and no images, but no authentication either: it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from m2mkd_ds.teacher.wire import Status

PREFIX = "m2mkd_teacher_"
REQUEST_TIMEOUT_S = 5.0


class _Handler(BaseHTTPRequestHandler):
    """GET alone; anything else is 501 by the base class."""

    timeout = REQUEST_TIMEOUT_S
    page: MetricsPage
    server_version, sys_version = "m2mkd", ""

    def do_GET(self) -> None:
        code, kind, body = self.page.answer(self.path)
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """A line for every scrape would drown the log."""


class MetricsPage:
    """Serves `counters()` and `status()` from a thread of its own until `close`. `facts` are labels of the gauge `info`.

    Raises OSError when `listen` (HOST:PORT; port 0: any) cannot be had, ModuleNotFoundError without prometheus-client.
    """

    def __init__(
        self, listen: str, counters: Callable[[], Mapping[str, float]], status: Callable[[], Status], facts: Mapping[str, str]
    ) -> None:
        from prometheus_client import CollectorRegistry

        self._counters, self._status, self._facts = counters, status, dict(facts)
        self._registry = CollectorRegistry()
        self._registry.register(self)  # a collector is anything with `collect`
        host, _, port = listen.rpartition(":")
        handler = type("Handler", (_Handler,), {"page": self})
        self._server = ThreadingHTTPServer((host, int(port)), handler)
        self._server.daemon_threads = True
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics-page", daemon=True)
        self._thread.start()

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """HTTP code, content type and body for a path."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        plain = "text/plain; charset=utf-8"
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/live":
            return 200, plain, b"live\n"
        if path == "/ready":
            status = self._status()
            return (200, plain, b"ready\n") if status.ready else (503, plain, b"draining\n" if status.draining else b"not ready\n")
        return 404, plain, b"/metrics, /live and /ready are here\n"

    def collect(self) -> Iterator[Any]:
        """What prometheus-client calls for every scrape. Names ending in _total are counters, the others gauges."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        yield InfoMetricFamily(f"{PREFIX}server", "Versions and fingerprints of this server", value=self._facts)
        families: dict[str, Any] = {}
        for name, value in sorted(self._counters().items()):
            base, _, label = name.partition("{")  # at most one label: errors_total{code=draining}
            key, _, word = label.rstrip("}").partition("=")
            kind = CounterMetricFamily if base.endswith("_total") else GaugeMetricFamily
            if base not in families:
                families[base] = kind(PREFIX + base, base.replace("_", " "), labels=[key] if label else [])
            families[base].add_metric([word] if label else [], value)
        yield from families.values()

    def close(self) -> None:
        """Stop listening; ends within a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)
