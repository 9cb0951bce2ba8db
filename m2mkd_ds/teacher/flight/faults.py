"""From pyarrow's and gRPC's errors to one sentence that says what is wrong and what to do.

gRPC says "Socket closed" for most of what can be wrong with TLS. So after a call that nobody answered, the endpoint is asked once more by
Python's own ssl module, with the same certificates; its errors name the reason. Only what such a handshake proves is told as `untrusted`,
which ends a run; a connection that just breaks off may be a server that stops or starts.
"""

from __future__ import annotations

import os
import re
import socket
import ssl
import time

from m2mkd_ds.teacher.flight.parts import import_flight
from m2mkd_ds.teacher.flight.security import Keys, join_address
from m2mkd_ds.teacher.protocol.wire import FeedError, LinkError

PROBE_S = 2.0
"""How long the second look may take; less where less of the deadline is left."""
LOOKS, LOOK_PAUSE_S = 3, 0.2
"""How often a server must hang up after a good handshake to be believed to mean it."""
MAX_TOLD_CHARS = 300
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
"""What OpenSSL says to bytes that are no TLS; which, depends on its version."""


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
        for look in range(LOOKS):
            with socket.create_connection((host, port), timeout_s) as plain:
                mistake = _mistake(plain, host, keys)
            if not isinstance(mistake, _HungUp):
                break
            time.sleep(LOOK_PAUSE_S if look + 1 < LOOKS else 0.0)
    except socket.gaierror:
        return LinkError("unreachable", f"{endpoint}: the name {host} has no address here; correct teacher.endpoints or the name service")
    except TimeoutError:
        return LinkError("unreachable", f"{endpoint}: no answer to a connection within {timeout_s:.1f} s; is the host up?")
    except OSError as err:
        return LinkError("unreachable", f"{endpoint}: {err.strerror or err}; is a teacher server running there?")
    if mistake:
        return LinkError("untrusted", f"{endpoint}: {mistake}")
    return LinkError("unreachable", f"{endpoint}: it takes connections and answers nothing of ours; is it a teacher server?")


class _HungUp(str):
    """A mistake that one look does not prove: the server proved who it is, took our certificate, and said nothing more. gRPC tells in no
    other way that it refuses; a server that stops does so too, but its port is closed at the next look."""


def _mistake(plain: socket.socket, host: str, keys: Keys) -> str:
    """What a TLS handshake on a fresh connection proves to be wrong with the settings of either side; empty: nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    if keys.authority:
        context.load_verify_locations(cadata=keys.authority.decode("ascii", "ignore"))
    else:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    if keys.cert:
        _show(context, keys)
    try:
        with context.wrap_socket(plain, server_hostname=host) as wrapped:
            if not keys.authority:
                return "the server speaks TLS: give teacher.tls_ca (and teacher.tls_cert and teacher.tls_key if it asks for certificates)"
            return "" if _says_something(wrapped) else _HungUp(_refused("it broke the connection off", keys))
    except ssl.SSLCertVerificationError as err:
        return f"the server's certificate is refused: {err.verify_message}; compare teacher.tls_ca and teacher.endpoints with it"
    except ssl.SSLError as err:
        return _told_by(str(err.reason), keys)
    except OSError:  # cut or silent: proves nothing
        pass
    return ""


def _told_by(reason: str, keys: Keys) -> str:
    """The mistake that an error of OpenSSL proves; empty: none."""
    if "ALERT" in reason:  # a server with TLS that answered us in TLS
        if not keys.authority:
            return "the server speaks TLS: give teacher.tls_ca (and teacher.tls_cert and teacher.tls_key if it asks for certificates)"
        return _refused(reason.lower().replace("_", " "), keys)
    if keys.authority and reason in _NO_TLS:
        return "the server does not speak TLS: start it with --tls-cert and --tls-key, or leave teacher.tls_ca empty"
    return ""


def _refused(said: str, keys: Keys) -> str:
    if not keys.cert:
        return f"the server asks for a certificate ({said}; it was started with --client-ca): give teacher.tls_cert and teacher.tls_key"
    return f"the server refused this side's certificate ({said}): its --client-ca must be what signed teacher.tls_cert, in date"


def _says_something(wrapped: ssl.SSLSocket) -> bool:
    """Whether the server goes on after the handshake: in TLS 1.3 what it thinks of our certificate comes then. Raises ssl.SSLError."""
    try:
        return bool(wrapped.recv(1))
    except ssl.SSLError:
        raise
    except ConnectionError:
        return False
    except TimeoutError:
        return True  # it waits for us, as a server that is content may


def _show(context: ssl.SSLContext, keys: Keys) -> None:
    """Let the handshake show our certificate. Python takes files only: one without a name, so that the key is on no disk."""
    descriptor = os.memfd_create("m2mkd_keys", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(keys.cert + b"\n" + keys.key)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def seconds_left(deadline: float) -> float:
    """Until a moment of time.monotonic()."""
    return deadline - time.monotonic()
