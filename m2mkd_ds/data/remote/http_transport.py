"""Shards behind http(s): range reads on kept-alive connections, redirects without tokens, faults sorted into passing and final."""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import urllib3

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.remote.addresses import redact, scrub
from m2mkd_ds.data.remote.retry import TemporaryFault

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 30.0
"""Longest silence of a connection that is waited for."""
CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 5
_KEPT_CONNECTIONS = 32
_PASSING = {408, 425, 429}
_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


class Refused(ShardError):  # noqa: N818
    """The server answered, and trying again will not help. `is_absent`: because there is no such file."""

    def __init__(self, message: str, *, is_absent: bool = False) -> None:
        super().__init__(message)
        self.is_absent = is_absent


class _RedactQuery(logging.Filter):
    """urllib3 writes every request line to its debug log; queries may hold signatures."""

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.args, tuple):
            record.args = tuple(re.sub(r"\?\S*", "?***", item) if isinstance(item, str) else item for item in record.args)
        return True


_REDACT_QUERY = _RedactQuery()


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: tokens are for one of these."""
    parts = urlsplit(url)
    return parts.scheme.lower(), (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme.lower())


def is_hugging_face(url: str) -> bool:
    """Whether HF_TOKEN may go there: huggingface.co over TLS, nothing else."""
    return origin(url) == ("https", "huggingface.co", 443)


class HttpClient:
    """Connections, and who gets which token. `named` is the address that the user gave: M2MKD_HTTP_TOKEN goes to its origin only.

    Safe from threads: each takes a connection of the pool.
    """

    def __init__(self, named: str, *, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self._named = origin(named)
        self._read_timeout_s = read_timeout_s
        self._pools: dict[str, urllib3.PoolManager] = {}
        logging.getLogger("urllib3.connectionpool").addFilter(_REDACT_QUERY)  # adding it again changes nothing

    def get(self, url: str, headers: dict[str, str], limit_s: float) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer (200, 206 or 416, its body unread) and the URL it came from after redirects.

        Raises TemporaryFault for what may pass, Refused for the rest.
        """
        timeout = urllib3.Timeout(connect=min(CONNECT_TIMEOUT_S, limit_s), read=min(self._read_timeout_s, limit_s))
        for _ in range(MAX_REDIRECTS + 1):
            with passing_faults():
                # The request target must not hold the credentials of the URL, so they travel in the header.
                response = self._pool(url).request(
                    "GET", _without_credentials(url), headers={**headers, "Accept-Encoding": "identity", **self._authorization(url)},
                    preload_content=False, redirect=False, retries=False, timeout=timeout,
                )  # fmt: skip
            if response.status in (200, 206, 416):
                return response, url
            location = response.headers.get("Location")
            with contextlib.suppress(urllib3.exceptions.HTTPError, OSError):
                response.drain_conn()
            if not (300 <= response.status < 400 and location):
                raise self._fault(url, response)
            url = urljoin(url, location)
            if urlsplit(url).scheme not in ("http", "https"):
                raise Refused(f"redirected to {redact(url)}, which is no http address")
        raise Refused(f"more than {MAX_REDIRECTS} redirects, the last to {redact(url)}")

    def _pool(self, url: str) -> urllib3.PoolManager:
        """Connections, by the proxy that the environment names for this host."""
        kind, host, _ = origin(url)
        proxy = "" if proxy_bypass(host) else getproxies().get(kind, "")
        if proxy not in self._pools:
            sizes: dict[str, Any] = {"num_pools": 8, "maxsize": _KEPT_CONNECTIONS}
            user = _credentials(proxy)
            headers = urllib3.make_headers(proxy_basic_auth=user) if user else None
            self._pools[proxy] = (
                urllib3.ProxyManager(_without_credentials(proxy), proxy_headers=headers, **sizes) if proxy else urllib3.PoolManager(**sizes)
            )
        return self._pools[proxy]

    def _token_variable(self, url: str) -> str:
        """The variable whose token this URL may see; empty: none."""
        if is_hugging_face(url):
            return "HF_TOKEN"
        return "M2MKD_HTTP_TOKEN" if origin(url) == self._named else ""

    def _authorization(self, url: str) -> dict[str, str]:
        """Decided anew for every URL of a chain of redirects, so another host never sees a token."""
        user = _credentials(url)
        if user:
            return {"Authorization": f"Basic {base64.b64encode(user.encode()).decode()}"}
        variable = self._token_variable(url)
        token = os.environ.get(variable, "").strip() if variable else ""
        return {"Authorization": f"Bearer {token}"} if token else {}

    def _fault(self, url: str, response: urllib3.BaseHTTPResponse) -> TemporaryFault | Refused:
        status = response.status
        # The standard phrase, not the server's: that could repeat anything back.
        status_text = f"HTTP {status} {http.client.responses.get(status, '')}".rstrip()
        if status >= 500 or status in _PASSING:
            return TemporaryFault(status_text, retry_after_s=_retry_after_s(response.headers.get("Retry-After", "")))
        advice = "check the address and that the file is there"
        if status in (401, 403):
            variable = self._token_variable(url)
            if not variable:
                advice = f"{redact(url)} gets no token, because it is not the host that the data address names"
            elif os.environ.get(variable):
                advice = f"the token in the environment variable {variable} was not accepted; it needs read access to this data"
            else:
                advice = f"if a token is needed, put it into the environment variable {variable}"
        return Refused(f"{status_text}; {advice}", is_absent=status in (404, 410))


class HttpTransport:
    """One file behind http(s)."""

    def __init__(self, url: str, client: HttpClient) -> None:
        self.address = url
        self._client = client
        self._location = ""
        self._size: int | None = None
        self.tag = ""
        """What the server says to tell one version of the file from another; empty until it was asked, or when it says nothing."""

    def size(self, limit_s: float) -> int | None:
        """Bytes of the file, from a range read of one byte: signed addresses often allow no HEAD. None when the server does not say."""
        if self._size is None:
            response = self._get({"Range": "bytes=0-0"}, limit_s)
            with _released(response):
                if response.status == 200:
                    self._note_length(response)
                else:
                    self._check_range(response, 0, 1)
                    with passing_faults():
                        response.read1(1)
        return self._size

    def read(self, offset: int, size: int, limit_s: float) -> bytes:
        """`size` bytes at `offset`, fewer at the end. Raises TemporaryFault, or Refused where the server cannot read ranges."""
        if size == 0:
            return b""
        ends = time.monotonic() + limit_s
        response = self._get({"Range": f"bytes={offset}-{offset + size - 1}"}, limit_s)
        with _released(response):
            if response.status == 200:
                raise Refused(
                    "the server ignores Range and would send the whole file for every sample; set data.cache_dir, so that shards are "
                    "fetched once as a whole"
                )
            expected = self._check_range(response, offset, size)
            parts = []
            while expected > 0:
                with passing_faults():
                    part = response.read1(min(CHUNK_BYTES, expected))
                if not part or time.monotonic() > ends:
                    raise TemporaryFault("the body ended early" if not part else "the body came too slowly")
                parts.append(part)
                expected -= len(part)
        return b"".join(parts)

    def stream(self, offset: int, limit_s: float) -> Iterator[bytes]:
        """The bytes from `offset` to the end. A server without Range sends all, and the first ones are dropped here."""
        response = self._get({"Range": f"bytes={offset}-"} if offset else {}, limit_s)
        with _released(response):
            skip = offset
            if response.status != 200:
                if self._check_range(response, offset, None) == 0:
                    return
                skip = 0
            else:
                self._note_length(response)
            while True:
                with passing_faults():
                    part = response.read1(CHUNK_BYTES)
                if not part:
                    return
                kept, skip = part[skip:], max(0, skip - len(part))
                if kept:
                    yield kept

    def _get(self, headers: dict[str, str], limit_s: float) -> urllib3.BaseHTTPResponse:
        if self._location:
            try:
                return self._client.get(self._location, headers, limit_s)[0]
            except Refused:
                self._location = ""  # the place that a redirect named expires; ask again
            except TemporaryFault:
                self._location = ""  # and it may be the wrong one of several
                raise
        response, location = self._client.get(self.address, headers, limit_s)
        self._location = "" if location == self.address else location
        self.tag = " ".join(filter(None, (response.headers.get(name, "") for name in ("ETag", "Last-Modified"))))
        return response

    def _note_length(self, response: urllib3.BaseHTTPResponse) -> None:
        """Of an answer that holds the whole file."""
        length = response.headers.get("Content-Length", "")
        if length.isdigit():
            self._size = int(length)

    def _check_range(self, response: urllib3.BaseHTTPResponse, offset: int, size: int | None) -> int:
        """Bytes that the answer promises. Raises TemporaryFault when they are not the ones asked for."""
        header = response.headers.get("Content-Range", "")
        found = _RANGE.fullmatch(header)
        if found and found[3] != "*":
            self._size = int(found[3])
        if response.status == 416:
            if found and self._size is not None and offset >= self._size:
                return 0
            raise TemporaryFault("HTTP 416, although the range lies inside the file")
        first, last = (int(found[1]), int(found[2])) if found and found[1] else (-1, -1)
        promised = last - first + 1
        possible = [n for n in (size, None if self._size is None else self._size - offset) if n is not None]
        if first != offset or (possible and promised != min(possible)):
            raise TemporaryFault(f"asked for {size or 'all'} bytes at {offset}, the answer is for {header[:60]!r}")
        return promised


@contextlib.contextmanager
def _released(response: urllib3.BaseHTTPResponse) -> Iterator[None]:
    """Back to the pool when the body was read, closed when bytes are left in it."""
    try:
        yield
    finally:
        if getattr(response, "length_remaining", None) == 0:
            response.release_conn()
        else:
            response.close()


@contextlib.contextmanager
def passing_faults() -> Iterator[None]:
    """urllib3's errors as ours. Their texts may hold addresses, so they are scrubbed, and the chain is cut."""
    try:
        yield
    except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as err:
        reason: Any = err
        while getattr(reason, "args", None) and isinstance(reason.args[-1], Exception):
            reason = reason.args[-1]
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise Refused(f"the server's certificate is not accepted ({reason.verify_message})") from None
        raise TemporaryFault(f"{type(err).__name__}: {scrub(str(reason))[:200]}") from None


def _retry_after_s(header: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 for none."""
    if header.strip().isdigit():
        return float(header)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return 0.0


def _credentials(url: str) -> str:
    """`user:password` of a URL; empty when it has none."""
    user, found, _ = urlsplit(url).netloc.rpartition("@")
    return unquote(user) if found else ""


def _without_credentials(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
