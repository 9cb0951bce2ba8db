"""From an endpoint to a connection over the transport that it names."""

from __future__ import annotations

from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.teacher.client.endpoints import check_endpoint, check_endpoints
from m2mkd_ds.teacher.protocol.connection import Connection

__all__ = ["check_endpoints", "connect"]


def connect(endpoint: str, config: TeacherConfig) -> Connection:
    """A connection to `unix:PATH` (shared memory) or `HOST:PORT` (Arrow Flight); nothing has been said on it yet.

    Raises ValueError for anything else, LinkError where nobody listens, ImportError with the line that installs an absent package.
    """
    check_endpoint(endpoint, config.feed)
    if endpoint.startswith("unix:"):
        from m2mkd_ds.teacher.shm.client import ShmConnection

        return ShmConnection(endpoint.removeprefix("unix:"))
    from m2mkd_ds.teacher.flight.client import FlightConnection
    from m2mkd_ds.teacher.flight.security import ClientSecurity

    return FlightConnection(endpoint, ClientSecurity(config.tls_ca, config.tls_cert, config.tls_key, config.token_file))
