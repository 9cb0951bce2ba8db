"""Addresses of shards: what kind they are, how a shard's name is appended, and how they are shown without their secrets.

/data/in1k, file:///data/in1k           a folder of this machine
https://host/in1k, s3://bucket/in1k     a folder elsewhere
pipe:COMMAND                            a shell command that prints the file; `{}` in it stands for the name, else it is appended
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit, urlunsplit

from m2mkd_ds.data.errors import ShardError

TOKEN_VARIABLES = ("HF_TOKEN", "M2MKD_HTTP_TOKEN")
"""Environment variables with tokens. The first goes to huggingface.co only, the second only to the host that the user named."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://|(pipe):")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s'\"<>)\]},]+")
_CREDENTIAL_IN_TEXT = re.compile(r"\b(Bearer|Basic)\s+[^\s'\",]+", re.IGNORECASE)
_SECRET_KEY = re.compile(r"sig|token|key|cred|secret|passw|auth|policy|jwt", re.IGNORECASE)


def scheme(address: str) -> str:
    """`https`, `s3`, `pipe`, ... in lower case; `file` for paths."""
    found = _SCHEME.match(address)
    return (found[1] or found[2]).lower() if found else "file"


def is_remote(address: str) -> bool:
    """Whether the address is anything else than a path or file:// URL."""
    return scheme(address) != "file"


def local_path(address: str) -> Path:
    """The path that a path or a file:// URL names. Raises ShardError for a URL with another host in it."""
    if not _SCHEME.match(address):
        return Path(address)
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise ShardError(f"{address}: a file:// address names a path of this machine; write file:///PATH or the path alone")
    return Path(unquote(parts.path))


def absolute(address: str) -> str:
    """A path made absolute, so that it means the same from any folder; other addresses, and the empty one, as they are."""
    return address if is_remote(address) or not address else str(local_path(address).resolve())


def join(base: str, name: str) -> str:
    """The address of the file `name` below `base`; a query string stays at the end. In a command the name is quoted for the shell."""
    kind = scheme(base)
    if kind == "pipe":
        quoted = shlex.quote(name)
        return base.replace("{}", quoted) if "{}" in base else f"{base.rstrip('/')}/{quoted}"
    if not _SCHEME.match(base):
        return str(Path(base) / name)
    if kind in ("http", "https", "file"):
        parts = urlsplit(base)
        return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))
    return f"{base.rstrip('/')}/{name}"


def resolve_base(address: str, base: str) -> str:
    """Where shards lie: `base` of an index that was read from `address`, relative to it where it is relative; empty base: `address`.

    Raises ShardError for an index from elsewhere that names a folder of this machine or a shell command.
    """
    if not base:
        return address
    kind = scheme(base)
    if is_remote(address) and (kind == "pipe" or os.path.isabs(base) or base.startswith("file:")):
        raise ShardError(
            f"{redact(address)}: its index says that the shards are at {redact(base)}; an index from elsewhere may not name a folder or "
            "a command of this machine, copy the index here to use it so"
        )
    return base if _SCHEME.match(base) else join(address, base)


def redact(address: str) -> str:
    """The address without user name, password and query values, and of a command the first word only: for messages and logs."""
    if scheme(address) == "pipe":
        program, _, rest = address.partition(":")[2].strip().partition(" ")
        if "=" in program:  # an assignment of a variable
            program, rest = "***", ""
        return f"pipe:{program} ***" if rest else f"pipe:{program}"
    if not _SCHEME.match(address):
        return address
    try:
        parts = urlsplit(address)
    except ValueError:
        return f"{scheme(address)}://***"
    host = f"***@{parts.netloc.rpartition('@')[2]}" if "@" in parts.netloc else parts.netloc
    return urlunsplit((parts.scheme, host, parts.path, "***" if parts.query else "", ""))


def scrub(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """A message of another library without credentials: its URLs redacted, tokens of the environment and headers blotted out."""
    text = _URL_IN_TEXT.sub(lambda found: redact(found[0]), text)
    text = _CREDENTIAL_IN_TEXT.sub(lambda found: f"{found[1]} ***", text)
    for variable in TOKEN_VARIABLES:
        token = environment.get(variable, "")
        if token:
            text = text.replace(token, "***")
    return text


def holds_secret(address: str) -> bool:
    """Whether credentials are written out in the address, so that it must not be kept in a file."""
    if scrub(address) != address and scheme(address) == "pipe":
        return True
    if not _SCHEME.match(address) or scheme(address) == "pipe":
        return False
    parts = urlsplit(address)
    return "@" in parts.netloc or any(_SECRET_KEY.search(key) for key, _ in parse_qsl(parts.query, keep_blank_values=True))
