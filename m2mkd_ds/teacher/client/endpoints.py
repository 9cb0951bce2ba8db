"""Where teacher servers are: the words for it, a list that may change while training goes on, and who is asked for what.

HOST:PORT   a server on the network; an IPv6 address in brackets
unix:PATH   a server on this host, through shared memory
file:PATH   a file that lists such endpoints, one a line, and is read again while training goes on
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.flight.security import is_loopback

MAX_FILE_BYTES = 64 * 1024
MAX_SOCKET_PATH_BYTES = 107
"""What a Unix socket's name may be long."""


def check_endpoints(endpoints: Sequence[str], feed: str = "remote") -> None:
    """Refuse what cannot be an endpoint of `teacher.feed=FEED`, without asking anybody. Raises ValueError with one sentence."""
    if not endpoints:
        raise ValueError("teacher.endpoints is empty: give at least one HOST:PORT or unix:PATH, or one file:PATH that lists them")
    files = [endpoint for endpoint in endpoints if endpoint.startswith("file:")]
    if files and len(endpoints) > 1:
        raise ValueError(f"teacher.endpoints holds {files[0]!r} beside others: a file:PATH stands alone, put the others into the file")
    for endpoint in endpoints:
        if files:
            if not endpoint.removeprefix("file:"):
                raise ValueError("teacher.endpoints is 'file:' without a path: give file:PATH")
        else:
            check_endpoint(endpoint, feed)


def check_endpoint(endpoint: str, feed: str = "remote") -> None:
    """Refuse one endpoint that is neither HOST:PORT nor unix:PATH. Raises ValueError."""
    if endpoint.startswith("unix:"):
        size = len(endpoint.removeprefix("unix:").encode())
        if not 0 < size <= MAX_SOCKET_PATH_BYTES:
            raise ValueError(
                f"teacher.endpoints: the path of {endpoint!r} has {size} bytes; a socket's path has 1 to {MAX_SOCKET_PATH_BYTES}, "
                "so use a shorter folder"
            )
        return
    host, port = split_host_port(endpoint)
    if feed == "shm":
        raise ValueError(
            f"teacher.endpoints: {host}:{port} is a network address, and teacher.feed=shm needs unix:PATH; use teacher.feed=remote"
        )


def split_host_port(endpoint: str) -> tuple[str, int]:
    """`teacher-3:8815` -> ("teacher-3", 8815); `[::1]:8815` -> ("::1", 8815). Raises ValueError."""
    host, colon, port = endpoint.rpartition(":")
    why = ""
    if "://" in endpoint:
        why = "leave out the scheme"
    elif not colon or not host:
        why = "the host or the port is missing"
    elif not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        why = f"the port is {port!r}, it must be a number from 1 to 65535"
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        why = "put an IPv6 address into brackets"
    if not why and (not host or any(c.isspace() or c in "/@[]," for c in host)):
        why = "the host cannot be a name or an address"
    if why:
        raise ValueError(f"teacher.endpoints: {endpoint!r} is not HOST:PORT, unix:PATH or file:PATH: {why}")
    return host, int(port)


class EndpointList:
    """The servers that are to be asked: a fixed list, or what a file says now.

    Raises ValueError when what it begins with cannot be used; later, a file that is empty, odd, gone or has a last line without an end
    (somebody is writing it) changes nothing and is warned of once.
    """

    def __init__(self, endpoints: Sequence[str], feed: str = "remote", *, is_encrypted: bool = False) -> None:
        check_endpoints(endpoints, feed)
        self._feed, self._is_encrypted = feed, is_encrypted
        self._file = Path(endpoints[0].removeprefix("file:")) if endpoints[0].startswith("file:") else None
        self._warned = ""
        self.current = self._read(self._file) if self._file is not None else tuple(dict.fromkeys(endpoints))
        """The endpoints in use, none twice."""

    @property
    def is_watched(self) -> bool:
        """Whether the list may change."""
        return self._file is not None

    def check_named(self, endpoint: str) -> None:
        """Refuse an endpoint that a server named and that the user of this list would not have meant. Raises ValueError."""
        check_endpoint(endpoint, self._feed)
        if endpoint.startswith("unix:") or self._is_encrypted:
            return
        # Without TLS nobody proves who he is: a server must not lead the trainer, and its token, to any host it likes.
        host, _ = split_host_port(endpoint)
        known = {split_host_port(own)[0] for own in self.current if not own.startswith("unix:")}
        if host not in known and not is_loopback(host):
            raise ValueError(f"{endpoint} is on a host that teacher.endpoints does not name, and no teacher.tls_ca is given to prove it")

    def refresh(self) -> bool:
        """Read the file again; whether the list has changed."""
        if self._file is None:
            return False
        try:
            now = self._read(self._file)
        except ValueError as err:
            if str(err) != self._warned:
                self._warned = str(err)
                logger.warning("%s; the %d teacher servers of before stay in use", err, len(self.current))
            return False
        self._warned = ""
        changed = now != self.current
        self.current = now
        return changed

    def _read(self, file: Path) -> tuple[str, ...]:
        try:
            with file.open("rb") as stream:
                text = stream.read(MAX_FILE_BYTES + 1).decode()
        except (OSError, UnicodeDecodeError) as err:
            raise ValueError(f"teacher.endpoints: file:{file} cannot be read ({err})") from None
        if len(text) > MAX_FILE_BYTES:
            raise ValueError(f"teacher.endpoints: file:{file} has more than {MAX_FILE_BYTES} bytes")
        if text and not text.endswith("\n"):
            raise ValueError(f"teacher.endpoints: file:{file}: the last line has no end, so it may be half written; end it with a newline")
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        listed = tuple(dict.fromkeys(line for line in lines if line))
        if not listed:
            raise ValueError(f"teacher.endpoints: file:{file} lists no endpoint")
        for endpoint in listed:
            try:
                check_endpoint(endpoint, self._feed)
            except ValueError as err:
                raise ValueError(f"file:{file}: {err}") from None
        return listed


def by_preference(endpoints: Iterable[str], key: int) -> list[str]:
    """The endpoints in the order in which they are asked for `key`: rendezvous hashing.

    Whoever has the same list asks the same server; when one joins or leaves, only the keys that it wins or held move.
    """

    def score(endpoint: str) -> bytes:
        return hashlib.blake2b(f"{key}\n{endpoint}".encode(), digest_size=8).digest()

    return sorted(endpoints, key=score, reverse=True)
