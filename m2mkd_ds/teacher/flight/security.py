"""Who may listen where, and who may ask: TLS with certificates of both sides, and a token. Rules are checked before a port opens.

Loopback is the default and needs nothing. Any other address needs the server's certificate and key, the authority that signs trainers'
certificates, and a token; `insecure` lifts this with a warning. A token comes from a file that nobody else can read, or from the
environment: command lines and logs are read by others.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import stat
from dataclasses import dataclass, field

from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.flight.certificates import read_authority, read_pair

TOKEN_VARIABLE = "M2MKD_TEACHER_TOKEN"
MIN_TOKEN_CHARS = 16
MAX_TOKEN_CHARS = 1024


@dataclass(frozen=True)
class Keys:
    """What one side of a link proves itself with and checks the other by; empty: not used. Never shown in a log."""

    cert: bytes = field(default=b"", repr=False)
    key: bytes = field(default=b"", repr=False)
    authority: bytes = field(default=b"", repr=False)
    token: str = field(default="", repr=False)

    def has_token(self, shown: bytes) -> bool:
        """Whether `shown` is the token, in a time that does not tell how much of it is right."""
        return hmac.compare_digest(shown, self.token.encode())


@dataclass(frozen=True, kw_only=True)
class ServerSecurity:
    """As the flags --tls-cert, --tls-key, --client-ca, --token-file and --insecure of `m2mkd teacher-server`."""

    tls_cert: str = ""
    tls_key: str = ""
    client_ca: str = ""
    token_file: str = ""
    token: str = field(default="", repr=False)
    """The token itself, for a caller that has it; else the file, else the environment."""
    insecure: bool = False

    def load(self, host: str) -> Keys:
        """Read and check everything for listening on `host`. Raises ConfigError naming flags."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("--tls-cert and --tls-key belong together: give both or neither")
        if self.client_ca and not self.tls_cert:
            raise ConfigError("--client-ca without --tls-cert: certificates are shown over TLS only; give --tls-cert and --tls-key, too")
        token = find_token(self.token_file, self.token, "--token-file")
        self._check_bind(host, token)
        cert, key = b"", b""
        if self.tls_cert:
            cert, key = read_pair(self.tls_cert, self.tls_key, role="server", cert_field="--tls-cert", key_field="--tls-key")
        authority = read_authority(self.client_ca, "--client-ca") if self.client_ca else b""
        return Keys(cert, key, authority, token)

    def _check_bind(self, host: str, token: str) -> None:
        given = {"--tls-cert": self.tls_cert, "--tls-key": self.tls_key, "--client-ca": self.client_ca, "--token-file": token}
        missing = [flag for flag, value in given.items() if not value]
        if is_loopback(host) or not missing:
            return
        flags = ", ".join(missing).replace("--token-file", f"--token-file (or {TOKEN_VARIABLE} in the environment)")
        if not self.insecure:
            raise ConfigError(
                f"--listen {host} is open to other hosts and lacks {flags}: give them, or listen on 127.0.0.1, or accept by --insecure "
                "that anybody who reaches the port can read images and hidden states"
            )
        logger.warning("listening on %s with --insecure and without %s: whoever reaches the port may read what is served", host, flags)


@dataclass(frozen=True)
class ClientSecurity:
    """As the fields teacher.tls_ca, tls_cert, tls_key and token_file of a run's config."""

    tls_ca: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    token: str = field(default="", repr=False)

    def load(self) -> Keys:
        """Read and check everything. Raises ConfigError naming fields."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigError("teacher.tls_cert and teacher.tls_key belong together: give both or neither")
        if self.tls_cert and not self.tls_ca:
            raise ConfigError("teacher.tls_cert without teacher.tls_ca: give the authority that signed the servers' certificates, too")
        cert, key = b"", b""
        if self.tls_cert:
            names = {"cert_field": "teacher.tls_cert", "key_field": "teacher.tls_key"}
            cert, key = read_pair(self.tls_cert, self.tls_key, role="client", **names)
        authority = read_authority(self.tls_ca, "teacher.tls_ca") if self.tls_ca else b""
        return Keys(cert, key, authority, find_token(self.token_file, self.token, "teacher.token_file"))


def find_token(path: str, token: str, field_name: str) -> str:
    """The token given, or in the file, or in the environment, or none. Raises ConfigError; no text of the token gets into it."""
    where = field_name
    if not token and path:
        token, where = _read_token(path, field_name), f"{field_name} {path}"
    elif not token:
        token, where = os.environ.get(TOKEN_VARIABLE, ""), TOKEN_VARIABLE
        if not token:
            return ""
    if not MIN_TOKEN_CHARS <= len(token) <= MAX_TOKEN_CHARS or not all("!" <= char <= "~" for char in token):
        raise ConfigError(
            f"{where}: a token has {MIN_TOKEN_CHARS} to {MAX_TOKEN_CHARS} ASCII characters without spaces; "
            "make one with `openssl rand -hex 32`"
        )
    return token


def _read_token(path: str, field_name: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            mode = os.fstat(file.fileno()).st_mode
            if mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise ConfigError(f"{field_name} {path} can be opened by others (mode {mode & 0o777:03o}): run `chmod 600` on it")
            return file.read(MAX_TOKEN_CHARS + 2).strip()
    except OSError as err:
        raise ConfigError(f"{field_name} {path} cannot be read ({err.strerror}): give a file with one line, the token") from None


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 host stands in brackets. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    if not colon or not host or not port.isdecimal() or int(port) > 65535 or (":" in host) != bracketed:
        raise ConfigError(f"{address!r} is no address: give HOST:PORT, for example 127.0.0.1:8815 or [::1]:8815")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only processes of this host reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name of another kind may resolve to anything
