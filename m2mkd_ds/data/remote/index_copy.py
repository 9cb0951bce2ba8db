"""An index that lies elsewhere: fetched once to this machine, checked, and read from there by every process.

ROOT/index/FINGERPRINT-ADDRESS/index.npy, index.json (last)     ROOT: data.cache_dir, or m2mkd_ds in the user's cache folder
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from m2mkd_ds.data.atomic import AtomicFile, file_sha256
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.remote.addresses import join, redact, scheme
from m2mkd_ds.data.remote.retry import Retrier
from m2mkd_ds.data.remote.transports import chunks, http_client, open_transport
from m2mkd_ds.data.shard_files import Access

MAX_JSON_BYTES = 1 << 28


def local_copy(address: str, access: Access, *, json_name: str, table_name: str, fingerprint: str = "") -> Path:
    """Folder with index.json and index.npy of `address`. With `fingerprint`, a copy that is there is taken without asking the source.

    Raises ShardError when there is no index or it is damaged, SampleError(kind="io") when it cannot be had in time.
    """
    root = _root(access)
    if fingerprint and (found := root / _folder_name(address, fingerprint)).joinpath(json_name).is_file():
        return found
    text = _fetch_json(join(address, json_name), access)
    tree = _parse(text, redact(join(address, json_name)))
    folder = root / _folder_name(address, tree["fingerprint"])
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / "lock"):
        path = folder / json_name
        table = folder / table_name
        whole = table.is_file() and file_sha256(table) == tree["table_sha256"]
        if not (whole and path.is_file() and path.read_bytes() == text):
            if not whole:
                _fetch_table(join(address, table_name), table, tree["table_sha256"], access)
            with AtomicFile(path) as file:
                file.write(text)
    return folder


def _root(access: Access) -> Path:
    if access.cache_dir:
        return Path(access.cache_dir) / "index"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "m2mkd_ds" / "index"


def _folder_name(address: str, fingerprint: str) -> str:
    """By data and by place, because an index also says where its shards are. What may be secret in the address is left out."""
    if scheme(address) != "pipe":
        parts = urlsplit(address)
        address = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{fingerprint[:32]}-{hashlib.sha256(address.encode()).hexdigest()[:12]}"


def _source(address: str, access: Access) -> Iterator[bytes]:
    return chunks(open_transport(address, access, http_client(address, access)), Retrier(access.deadline_s), redact(address))


def _fetch_json(address: str, access: Access) -> bytes:
    text = bytearray()
    for chunk in _source(address, access):
        text += chunk
        if len(text) > MAX_JSON_BYTES:
            raise ShardError(f"{redact(address)}: is larger than {MAX_JSON_BYTES} bytes, which no index is; check the address")
    return bytes(text)


def _parse(text: bytes, shown: str) -> dict[str, Any]:
    """What is needed to fetch the rest; data/index.py checks all of it."""
    try:
        tree = json.loads(text)
    except ValueError:
        raise ShardError(f"{shown}: is not JSON but begins with {text[:40]!r}; check the address") from None
    for key in ("fingerprint", "table_sha256"):
        value = tree.get(key) if isinstance(tree, dict) else None
        # They become names of files: nothing but hex.
        if not (isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value)):
            raise ShardError(f"{shown}: has no {key}, so it is no index of shards; make one with `m2mkd shards index`")
    assert isinstance(tree, dict)
    return tree


def _fetch_table(address: str, path: Path, sha256: str, access: Access) -> None:
    """Once more when other bytes came; never kept when they are wrong."""
    for second_try in (False, True):
        digest = hashlib.sha256()
        try:
            with AtomicFile(path) as file:
                for chunk in _source(address, access):
                    digest.update(chunk)
                    file.write(chunk)
                if digest.hexdigest() != sha256:
                    raise _Damaged
            return
        except _Damaged:
            if second_try:
                raise ShardError(
                    f"{redact(address)}: other bytes came than its index.json says (sha256 differs), twice; it is damaged or of other "
                    "shards, make the index again"
                ) from None


class _Damaged(Exception):  # noqa: N818
    """Makes AtomicFile drop the file."""


@contextmanager
def _held(path: Path) -> Iterator[None]:
    """Ranks of a host load at the same time: one fetches, the others wait. The lock ends with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
