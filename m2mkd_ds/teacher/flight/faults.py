"""From pyarrow's and gRPC's errors to one sentence that says what is wrong and what to do.

gRPC says "Socket closed" for most of what can be wrong with TLS. So after a call that nobody answered, the endpoint is asked once more by
Python's own ssl module, whose errors name the reason.
"""

from __future__ import annotations

import re
import socket
import ssl
import time

from m2mkd_ds.teacher.flight.parts import import_flight
from m2mkd_ds.teacher.flight.security import Keys, join_address
from m2mkd_ds.teacher.protocol.wire import FeedError, LinkError

PROBE_S = 2.0
"""How long the second look may take; less where less of the deadline is left."""
MAX_TOLD_CHARS = 300


def feed_or_link_error(err: Exception, endpoint: str, deadline_s: float) -> FeedError | LinkError:
    """What to raise for an error of pyarrow that is not about reaching the server."""
    flight = import_flight()
    if isinstance(err, flight.FlightTimedOutError):
        return LinkError("deadline", f"{endpoint}: no whole answer within {deadline_s:g} s (the server is slow, stopped or cut off)")
    if isinstance(err, (flight.FlightUnauthenticatedError, flight.FlightUnauthorizedError)):
        return FeedError("unauthenticated", f"{endpoint}: {told(err)}")
    if isinstance(err, flight.FlightUnavailableError):
        return LinkError("unreachable", f"{endpoint}: the connection broke off ({told(err)})")
    if isinstance(err, flight.FlightCancelledError):
        return LinkError("corrupt", f"{endpoint}: the stream ended within a part, or a part was larger than a server of ours sends")
    import pyarrow as pa

    if isinstance(err, (pa.ArrowInvalid, pa.ArrowSerializationError)):
        return LinkError("corrupt", f"{endpoint}: what came is no stream of parts ({told(err)})")
    return LinkError("unreachable", f"{endpoint}: the call failed ({told(err)}); is this a teacher server of the same version?")


def told(err: Exception) -> str:
    """What an error says, without gRPC's debugging appendix."""
    text = re.split(r"\.? (?:gRPC client debug context|Client context|Detail):", str(err).strip())[0]
    text = re.sub(r"^Flight .*?, with message: ", "", text).splitlines()
    return (text[0].strip().rstrip(".") if text else "")[:MAX_TOLD_CHARS] or type(err).__name__


def unreachable(host: str, port: int, keys: Keys, left_s: float) -> LinkError:
    """Why nobody answered at an address, found by one more connection within `left_s`."""
    endpoint = join_address(host, port)
    timeout_s = max(0.1, min(PROBE_S, left_s))
    try:
        with socket.create_connection((host, port), timeout_s) as plain:
            found = _look(plain, host, keys, timeout_s)
    except socket.gaierror:
        return LinkError("unreachable", f"{endpoint}: the name {host} has no address here; correct teacher.endpoints or the name service")
    except TimeoutError:
        return LinkError("unreachable", f"{endpoint}: no answer to a connection within {timeout_s:.1f} s; is the host up?")
    except OSError as err:
        return LinkError("unreachable", f"{endpoint}: {err.strerror or err}; is a teacher server running there?")
    return LinkError("unreachable", f"{endpoint}: {found}")


def _look(plain: socket.socket, host: str, keys: Keys, timeout_s: float) -> str:
    """What a TLS handshake on a fresh connection shows."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if keys.authority:
        context.load_verify_locations(cadata=keys.authority.decode("ascii", "ignore"))
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with context.wrap_socket(plain, server_hostname=host):
            speaks_tls = True
    except ssl.SSLCertVerificationError as err:
        return f"the server's certificate is refused: {err.verify_message}; compare teacher.tls_ca and teacher.endpoints with it"
    except (ssl.SSLError, OSError) as err:
        # A server with TLS answers any ClientHello in TLS, be it with an alert; one without cuts or answers in HTTP/2.
        speaks_tls = "ALERT" in str(getattr(err, "reason", "")) or isinstance(err, TimeoutError)
    if speaks_tls and not keys.authority:
        return "the server speaks TLS: give teacher.tls_ca (and teacher.tls_cert and teacher.tls_key if it asks for certificates)"
    if not speaks_tls and keys.authority:
        return "the server does not speak TLS: start it with --tls-cert and --tls-key, or leave teacher.tls_ca empty"
    if keys.authority and not keys.cert:
        return "the server broke the connection off: if it was started with --client-ca, give teacher.tls_cert and teacher.tls_key"
    if keys.authority:
        return "the server refused this side's certificate: its --client-ca must be what signed teacher.tls_cert, in date"
    return "it takes connections and answers nothing of ours; is it a teacher server?"


def seconds_left(deadline: float) -> float:
    """Until a moment of time.monotonic()."""
    return deadline - time.monotonic()
