"""Who may call a Flight server: the token of a call, and how often a peer may show a wrong one.

gRPC runs a middleware before it reads a call's stream, but tells it no peer. So it notes whether the token was right, and refuses methods
that we do not have at once; the handlers, who know the peer, refuse the rest before they look at what was asked.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from typing import Any

from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.flight.parts import TOKEN_HEADER, TOKEN_PREFIX, import_flight
from m2mkd_ds.teacher.flight.security import Keys
from m2mkd_ds.teacher.protocol.wire import FeedError

MAX_FAILURES = 10
WINDOW_S = 60.0
MAX_PEERS = 1024
"""Remembered hosts; the one whose last failure is oldest is forgotten first."""


class FailureLimit:
    """Counts wrong tokens by host. After MAX_FAILURES within WINDOW_S its next ones are told to wait until the window ends.

    For calls without the right token only: a host may run several jobs, and one with a wrong token must not lock the others out.
    """

    def __init__(self) -> None:
        self._failures: OrderedDict[str, tuple[int, float]] = OrderedDict()
        """Count and end of its window by host."""
        self._lock = threading.Lock()

    def check(self, peer: str) -> None:
        """Raises FeedError(unauthenticated) with the time to wait."""
        host = host_of(peer)
        with self._lock:
            count, end = self._failures.get(host, (0, 0.0))
        wait_s = end - time.monotonic()
        if count >= MAX_FAILURES and wait_s > 0:
            raise FeedError(
                "unauthenticated", f"{count} calls with a wrong token came from {host}: wait {wait_s:.0f} s", retry_after_s=wait_s
            )

    def count(self, peer: str) -> None:
        """One more wrong token from that host; the first and the last of a window are logged."""
        host, now = host_of(peer), time.monotonic()
        with self._lock:
            count, end = self._failures.pop(host, (0, 0.0))
            count, end = (count + 1, end) if now < end else (1, now + WINDOW_S)
            self._failures[host] = (count, end)
            while len(self._failures) > MAX_PEERS:
                self._failures.popitem(last=False)
        if count in (1, MAX_FAILURES):
            logger.warning("teacher server: wrong or no token from %s (%d in this minute)", host, count)


def make_middleware(keys: Keys) -> dict[str, Any]:
    """For FlightServerBase: `gate` notes whether a call's token is right and refuses methods that are not ours."""
    flight = import_flight()
    ours = {flight.FlightMethod.DO_GET, flight.FlightMethod.DO_ACTION}

    class Gate(flight.ServerMiddleware):  # type: ignore[name-defined]
        def __init__(self, authorised: bool) -> None:
            self.authorised = authorised

    class GateFactory(flight.ServerMiddlewareFactory):  # type: ignore[name-defined]
        def start_call(self, info: Any, headers: dict[str, list[str | bytes]]) -> Gate:
            if info.method not in ours:
                raise flight.FlightUnauthorizedError("this server answers DoGet and DoAction only")
            return Gate(not keys.token or _shown_right(keys, headers))

    return {"gate": GateFactory()}


def _shown_right(keys: Keys, headers: dict[str, list[str | bytes]]) -> bool:
    values = headers.get(TOKEN_HEADER, [])
    shown = values[0].encode() if len(values) == 1 and isinstance(values[0], str) else b""
    return shown.startswith(TOKEN_PREFIX) and keys.has_token(shown.removeprefix(TOKEN_PREFIX))


def host_of(peer: str) -> str:
    """`ipv4:10.0.0.7:51234` -> `10.0.0.7`."""
    return peer.partition(":")[2].rpartition(":")[0] or peer
