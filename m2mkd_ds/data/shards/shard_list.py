"""Which shards are meant, and opening one from its start: folders, globs, brace patterns, local paths and URLs.

data/train                         every *.tar of a folder
data/train-*.tar                   a glob
data/train-{0000..1023}.tar        braces, as webdataset expands them; also in URLs
https://host/data/x-{00..63}.tar   remote
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.remote.addresses import is_remote, redact
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.data.shards.tar_stream import ForwardFile

OpenShard = Callable[[str, Access], "ShardStream"]
"""`open_shard_stream`, or another function of its kind."""


@dataclass(frozen=True)
class ShardList:
    """Shards under one address: `base` + name is where a shard lies."""

    base: str
    """Folder (absolute, with / at its end) or URL."""
    names: tuple[str, ...]
    """Sorted."""

    @property
    def is_local(self) -> bool:
        """Whether base is a folder of this file system."""
        return not is_remote(self.base)

    def address(self, name: str) -> str:
        """Path or URL of a shard."""
        return self.base + name


class ShardStream:
    """A shard opened at its start. `stamp` changes when the file does; empty: that cannot be known."""

    def __init__(self, file: ForwardFile, stamp: str, close: Callable[[], None], num_bytes: int = 0) -> None:
        self._file, self.stamp, self.close, self.num_bytes = file, stamp, close, num_bytes

    def read(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end. Raises OSError."""
        return self._file.read(size)


def list_shards(patterns: Sequence[str]) -> ShardList:
    """The shards that folders, globs, brace patterns, paths and URLs name; each once, in an order of their names alone.

    Raises ShardError for a pattern without shards, a missing file, and shards that have no common address.
    """
    found: set[str] = set()
    for pattern in patterns:
        plain = pattern.removeprefix("file://").removeprefix("file:")
        found.update(_expand(plain) if is_remote(plain) else (os.path.abspath(path) for path in _local(plain)))
    if not found:
        raise ShardError("no shards were named; give a folder, a glob or a pattern such as 'data/train-{0000..1023}.tar'")
    folders = {address.rpartition("/")[0] for address in found}
    if len({is_remote(folder) for folder in folders}) > 1:
        raise ShardError("some shards are local and some remote; an index has one base address, index them apart")
    base = _common_folder(folders)
    return ShardList(base, tuple(sorted(address.removeprefix(base) for address in found)))


def check_packages(patterns: Sequence[str]) -> None:
    """Raises ShardError where an address needs a package that is not there, before any of its files is looked for."""
    for pattern in filter(is_remote, patterns):
        from m2mkd_ds.data.remote.transports import check_package

        check_package(pattern)


def _common_folder(folders: set[str]) -> str:
    """The longest address, cut at a /, that all begin with; with its / at the end."""
    parts = [folder.split("/") for folder in sorted(folders)]
    count = len(os.path.commonprefix(parts))
    base = "/".join(parts[0][:count]) + "/"
    if is_remote(parts[0][0] + "//") and count < 3:
        raise ShardError(f"the shards lie under {len(folders)} addresses with nothing in common; an index has one base, index them apart")
    return base


def _local(pattern: str) -> list[str]:
    path = Path(pattern)
    if path.is_dir():
        found = sorted(map(str, path.glob("*.tar")))
        if not found:
            raise ShardError(f"{pattern}: the folder holds no *.tar; name the folder of the shards, or a pattern")
        return found
    if path.is_file():
        return [pattern]
    expanded = _expand(pattern)
    paths = [match for word in expanded for match in (sorted(glob.glob(word)) if glob.has_magic(word) else [word])]
    missing = [word for word in paths if not Path(word).is_file()]
    if missing or not paths:
        what = f"{len(missing)} of {len(paths)} shards are not there, the first is {missing[0]}" if missing else "matches no file"
        raise ShardError(f"{pattern}: {what}; correct the pattern or copy the shards")
    return paths


def _expand(pattern: str) -> list[str]:
    # Here, because webdataset imports torch, and the processes that walk shards need neither.
    from webdataset.shardlists import expand_urls

    if is_remote(pattern):
        refuse_secrets(pattern)
    try:
        expanded: list[str] = expand_urls(pattern)
    except ValueError as err:
        raise ShardError(f"{pattern}: braces cannot be expanded ({err}); write {{0000..1023}} or {{a,b}}") from err
    if not is_remote(pattern):
        return expanded
    if "*" in pattern or not all(url.endswith(".tar") for url in expanded):
        advice = "name every shard, for example 'https://host/x-{0000..1023}.tar', or a folder with _info.json by its / at the end"
        raise ShardError(f"{pattern}: a server cannot be asked for the names of its files; {advice}")
    return expanded


def refuse_secrets(url: str) -> None:
    """Raises ShardError, without repeating the address, for one that may hold a token: it would be written into the index."""
    if "?" in url or "@" in url.partition("://")[2].partition("/")[0]:
        raise ShardError("a shard's URL has a query or a password in it, which would be written into the index; give plain addresses")


@contextmanager
def opened(address: str, access: Access, open_shard: OpenShard) -> Iterator[ShardStream]:
    """The stream of a shard, closed at the end."""
    stream = open_shard(address, access)
    try:
        yield stream
    finally:
        stream.close()


def open_shard_stream(address: str, access: Access) -> ShardStream:
    """Open a shard, or a file beside it, at its start, for forward reads: a path, or any address that data/remote/ knows.

    Opening and reading raise OSError (FileNotFoundError when it is not there), after `access.deadline_s` of trying for remote ones.
    """
    if is_remote(address):
        return _open_remote(address, access)
    file = open(address, "rb", buffering=0)
    status = os.fstat(file.fileno())
    return ShardStream(file, f"{status.st_size} {status.st_mtime_ns}", file.close, status.st_size)


def _open_remote(address: str, access: Access) -> ShardStream:
    # Here, for the sake of the processes that walk local shards.
    from m2mkd_ds.data.remote.http_transport import HttpTransport
    from m2mkd_ds.data.remote.retry import Retrier
    from m2mkd_ds.data.remote.transports import http_client, open_stream, open_transport

    with _as_os_errors():
        transport = open_transport(address, access, http_client(address, access))
        size = Retrier(access.deadline_s).call(redact(address), transport.size)
        file = open_stream(address, access)
    tag = transport.tag if isinstance(transport, HttpTransport) else ""
    # Without a tag, a file of the same length could be another one.
    return ShardStream(_RemoteFile(file), f"{size} {tag}" if tag else "", file.close, size or 0)


class _RemoteFile:
    """Errors of a remote file as OSError, which is what readers of local ones know."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, size: int, /) -> bytes:
        with _as_os_errors():
            return self._file.read(size)


@contextmanager
def _as_os_errors() -> Iterator[None]:
    from m2mkd_ds.data.remote.http_transport import Refused

    try:
        yield
    except Refused as err:
        raise (FileNotFoundError if err.is_absent else OSError)(str(err)) from None
    except (ShardError, SampleError) as err:
        raise OSError(str(err)) from None
