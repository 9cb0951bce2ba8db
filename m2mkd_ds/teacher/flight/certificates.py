"""PEM files of TLS, checked before anything listens or connects: readable, belonging together, in date. Standard library only."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Literal

from m2mkd_ds.config import ConfigError

Role = Literal["server", "client"]


def read_pair(cert: str, key: str, *, role: Role, cert_field: str, key_field: str) -> tuple[bytes, bytes]:
    """Certificate chain and private key, after a handshake with itself in memory. Raises ConfigError naming the field that is wrong."""
    cert_pem, key_pem = read_pem(cert, cert_field), read_pem(key, key_field)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    owner, judge = (server, client) if role == "server" else (client, server)
    try:
        server.load_cert_chain(cert, key, password=_no_password)
        client.load_cert_chain(cert, key, password=_no_password)
        judge.load_verify_locations(cert)
    except (ssl.SSLError, ValueError) as err:
        if "KEY_VALUES_MISMATCH" in str(err):
            raise ConfigError(f"{key_field} {key} is not the private key of {cert_field} {cert}: give files that belong together") from None
        raise ConfigError(f"{cert_field} {cert} with {key_field} {key} cannot be used ({_reason(err)}): give plain PEM files") from None
    judge.verify_mode = ssl.CERT_REQUIRED
    judge.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # the certificate vouches for itself here: what is asked is date and purpose
    assert owner is not judge
    try:
        _handshake(server, client)
    except ssl.SSLError as err:
        raise ConfigError(f"{cert_field} {cert} is of no use as a {role}'s certificate: {_reason(err)}; have it signed anew") from None
    return cert_pem, key_pem


def read_authority(path: str, field: str) -> bytes:
    """Certificates of the authorities that are trusted. Raises ConfigError when none is in date."""
    pem = read_pem(path, field)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as err:
        raise ConfigError(f"{field} {path} cannot be used ({_reason(err)}): give a PEM file of certificates") from None
    found = context.get_ca_certs()
    if not found:
        raise ConfigError(f"{field} {path} holds no authority's certificate: give the one that signed the other side's")
    ends = [str(cert["notAfter"]) for cert in found]
    if all(ssl.cert_time_to_seconds(end) < time.time() for end in ends):
        raise ConfigError(f"{field} {path} has expired ({ends[0]}): give an authority's certificate that is in date")
    return pem


def read_pem(path: str, field: str) -> bytes:
    """A file's bytes. Raises ConfigError when it cannot be read or holds no PEM block."""
    try:
        pem = Path(path).read_bytes()
    except OSError as err:
        raise ConfigError(f"{field} {path} cannot be read ({err.strerror}): give a PEM file that this user may read") from None
    if b"-----BEGIN " not in pem:
        raise ConfigError(f"{field} {path} is no PEM file: it has no line `-----BEGIN ...-----`")
    return pem


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
    """A whole handshake without a socket. Raises ssl.SSLError."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = (client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True))
    waiting = set(sides)
    for _ in range(8):  # flights of a handshake; TLS 1.3 needs three
        for side in tuple(waiting):
            try:
                side.do_handshake()
                waiting.discard(side)
            except ssl.SSLWantReadError:
                pass
        if not waiting:
            return
    raise ssl.SSLError("the handshake did not end")


def _reason(err: Exception) -> str:
    if isinstance(err, ssl.SSLCertVerificationError):
        return err.verify_message
    return (getattr(err, "reason", None) or str(err)).replace("_", " ").lower()


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, and a server started by a script would wait there.
    raise ValueError("the key is encrypted")
