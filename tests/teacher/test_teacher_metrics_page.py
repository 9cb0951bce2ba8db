"""The server's page of numbers, read as Prometheus would."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from m2mkd_ds.config import ConfigError
from m2mkd_ds.teacher.flight.security import ServerSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol.wire import Status
from m2mkd_ds.teacher.server.metrics_page import MetricsPage
from m2mkd_ds.teacher.server.options import ServerOptions
from m2mkd_ds.train.teacher.serve import open_page, start_transport

COUNTERS = {"requests": 7.0, "errors_draining": 2.0, "errors_poisoned": 1.0, "in_flight": 3.0, "decode_s": 1.5, "hits_prefix": 4.0}


class Page:
    """A page over counters that a test can change."""

    def __init__(self) -> None:
        self.counters = dict(COUNTERS)
        self.draining = False
        self.page = MetricsPage("127.0.0.1:0")
        assert self.get("/ready") == (503, "not ready\n") and self.get("/live")[0] == self.get("/metrics")[0] == 200
        self.page.attach(lambda: self.counters, self._status, {"instance": "abc"})

    def _status(self) -> Status:
        return Status(instance="abc", ready=not self.draining, draining=self.draining, in_flight=0, clients=0)

    def get(self, path: str) -> tuple[int, str]:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"http://127.0.0.1:{self.page.port}{path}", timeout=5) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as err:
            return err.code, err.read().decode()


@pytest.fixture
def page() -> Iterator[Page]:
    made = Page()
    yield made
    made.page.close()


def test_prometheus_reads_every_number_with_its_label(page: Page) -> None:
    code, text = page.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert code == 200
    assert families["m2mkd_teacher_requests"].samples[0].value == 7.0
    assert families["m2mkd_teacher_in_flight"].type == "gauge" and families["m2mkd_teacher_in_flight"].samples[0].value == 3.0
    errors = {sample.labels["code"]: sample.value for sample in families["m2mkd_teacher_errors"].samples}
    assert errors == {"draining": 2.0, "poisoned": 1.0}
    assert text.count("# TYPE m2mkd_teacher_errors_total counter") == 1  # a second one is not allowed
    assert families["m2mkd_teacher_decode_seconds"].samples[0].value == 1.5
    assert 'm2mkd_teacher_cache_hits_total{level="prefix"} 4.0' in text
    assert families["m2mkd_teacher_server_info"].samples[0].labels["instance"] == "abc"
    page.counters["requests"] = 8.0
    assert "m2mkd_teacher_requests_total 8.0" in page.get("/metrics")[1]


def test_a_draining_server_lives_and_is_not_ready(page: Page) -> None:
    assert (page.get("/live")[0], page.get("/ready")[0]) == (200, 200)
    page.draining = True
    assert page.get("/live")[0] == 200
    assert page.get("/ready") == (503, "draining\n")


def test_other_paths_and_methods_are_refused(page: Page) -> None:
    assert page.get("/etc/passwd")[0] == 404
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="501"):
        opener.open(urllib.request.Request(f"http://127.0.0.1:{page.page.port}/metrics", data=b"x", method="POST"), timeout=5)


def test_an_address_that_cannot_be_had_names_its_flag(page: Page) -> None:
    taken = f"127.0.0.1:{page.page.port}"
    with pytest.raises(ConfigError, match=rf"--metrics {taken}: cannot listen there \(Address already in use\); give --metrics HOST:OTHER"):
        open_page(taken)
    with pytest.raises(ConfigError, match=rf"--listen {taken}: cannot listen on .*Address already in use"):
        start_transport(FlightTransport(None, taken, ServerSecurity()))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"--metrics unix:/x: the page is on TCP only"):
        ServerOptions(metrics="unix:/x").check()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_the_page_listens_on_ipv6() -> None:
    ServerOptions(metrics="[::1]:9815").check()
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 loopback here")
    page = MetricsPage("[::1]:0")
    try:
        assert page._server.server_address[0] == "::1"
    finally:
        page.close()
