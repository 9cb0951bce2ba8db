"""A teacher server's numbers and health over HTTP: /metrics (Prometheus text), /live, /ready.

Numbers only, no weights and no images, but no authentication either: it listens on loopback unless told otherwise.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from m2mkd_ds.teacher.protocol.wire import Status

PREFIX = "m2mkd_teacher_"
REQUEST_TIMEOUT_S = 5.0
GAUGES = ("in_flight", "in_flight_bytes", "clients", "cache_bytes", "capacity_images_per_s", "draining")
"""Numbers that go up and down; all others only grow."""
_LABELLED = (("errors_", "errors_total", "code"), ("hits_", "cache_hits_total", "level"), ("misses_", "cache_misses_total", "level"))


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
    """A page that is not ready until `attach` gives it a service; from a thread of its own until `close`.

    Raises OSError when `listen` (HOST:PORT; port 0: any) cannot be had, ModuleNotFoundError without prometheus-client.
    """

    def __init__(self, listen: str) -> None:
        from prometheus_client import CollectorRegistry

        self._counters: Callable[[], Mapping[str, float]] = dict
        self._status: Callable[[], Status] | None = None
        self._facts: dict[str, str] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)  # a collector is anything with `collect`
        host, _, port = listen.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        handler = type("Handler", (_Handler,), {"page": self})
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        kind = type("Server", (ThreadingHTTPServer,), {"address_family": family, "daemon_threads": True})
        self._server: ThreadingHTTPServer = kind((host, int(port)), handler)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, name="metrics-page", daemon=True)
        self._thread.start()

    def attach(self, counters: Callable[[], Mapping[str, float]], status: Callable[[], Status], facts: Mapping[str, str]) -> None:
        """From now on the page tells of this service. `facts` are labels of the gauge `info`."""
        self._counters, self._facts, self._status = counters, dict(facts), status

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """HTTP code, content type and body for a path."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        plain = "text/plain; charset=utf-8"
        if path == "/metrics":
            return 200, CONTENT_TYPE_LATEST, generate_latest(self._registry)
        if path == "/live":
            return 200, plain, b"live\n"
        if path == "/ready":
            if self._status is None:
                return 503, plain, b"not ready\n"
            status = self._status()
            return (200, plain, b"ready\n") if status.ready else (503, plain, b"draining\n" if status.draining else b"not ready\n")
        return 404, plain, b"/metrics, /live and /ready are here\n"

    def collect(self) -> Iterator[Any]:
        """What prometheus-client calls for every scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily

        yield InfoMetricFamily(f"{PREFIX}server", "Versions and fingerprints of this server", value=self._facts)
        families: dict[str, Any] = {}
        for name, value in sorted(self._counters().items()):
            base, key, word = exported(name)
            kind = CounterMetricFamily if base.endswith("_total") else GaugeMetricFamily
            if base not in families:
                families[base] = kind(PREFIX + base, base.replace("_", " "), labels=[key] if key else [])
            families[base].add_metric([word] if key else [], value)
        yield from families.values()

    def close(self) -> None:
        """Stop listening; ends within a second."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=2.0)


def exported(name: str) -> tuple[str, str, str]:
    """(Prometheus name, label, its value) of one of the service's numbers: `errors_draining` -> errors_total{code="draining"}."""
    for start, base, label in _LABELLED:
        if name.startswith(start):
            return base, label, name.removeprefix(start)
    if name in GAUGES:
        return name, "", ""
    return (f"{name.removesuffix('_s')}_seconds_total" if name.endswith("_s") else f"{name}_total"), "", ""
