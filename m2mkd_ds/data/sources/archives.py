"""Files from elsewhere: fetched by HTTP with a known checksum, and tar archives unpacked without trusting the names in them."""

from __future__ import annotations

import hashlib
import http.client
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from m2mkd_ds.data.atomic import AtomicFile
from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.logs import Progress

TIMEOUT_S = 30.0
"""Seconds without a byte."""
CHUNK = 1 << 20


def fetch(url: str, path: Path, algorithm: str, digest: str) -> Path:
    """Download `url` to `path`, which appears only when its `algorithm` (hashlib's name) hash is `digest` (hex).

    A file that is there already is checked and kept. Raises ShardError when it cannot be had or is another one.
    """
    if path.exists():
        check_digest(path, algorithm, digest)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    found = hashlib.new(algorithm)
    chunks = _chunks(url)
    size = int(next(chunks))  # the connection is there before a file is begun
    with AtomicFile(path) as file, Progress(size, f"fetching {path.name} (bytes)") as bar:
        for chunk in chunks:
            found.update(chunk)
            file.write(chunk)
            bar.advance(len(chunk))
        if found.hexdigest() != digest:
            raise ShardError(f"{url}: its {algorithm} is {found.hexdigest()}, expected {digest}; nothing was kept")
    return path


def fetch_text(url: str, limit: int = 1 << 22) -> str:
    """A short text. Raises ShardError when it cannot be had or has more than `limit` bytes."""
    text = b""
    chunks = _chunks(url)
    next(chunks)
    for chunk in chunks:
        text += chunk
        if len(text) > limit:
            raise ShardError(f"{url}: is longer than {limit} bytes; this is not what was asked for")
    return text.decode()


def _chunks(url: str) -> Iterator[bytes]:
    """The announced length in decimal digits (0: unknown), then the content piece by piece."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            yield str(int(answer.headers.get("Content-Length") or 0)).encode()
            while chunk := answer.read(CHUNK):
                yield chunk
    except (OSError, http.client.HTTPException, ValueError) as err:
        raise ShardError(f"{url}: cannot be fetched ({getattr(err, 'reason', err)}); fetch it elsewhere and name it with --path") from err


def check_digest(path: Path, algorithm: str, digest: str) -> None:
    """Raises ShardError unless the file's hash is the known one."""
    with path.open("rb") as file:
        found = hashlib.new(algorithm)
        while chunk := file.read(CHUNK):
            found.update(chunk)
    if found.hexdigest() != digest:
        raise ShardError(f"{path}: its {algorithm} is {found.hexdigest()}, expected {digest}; fetch it again")


@contextmanager
def open_archive(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar file, compressed or not. Raises ShardError when it is none or ends too early."""
    try:
        with tarfile.open(path) as tar:
            yield tar
    except (tarfile.TarError, EOFError, zlib.error) as err:
        raise ShardError(f"{path}: not a complete tar file ({err}); fetch it again") from err


def archive_files(path: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(name, content) of the regular files whose names are `wanted`, in the archive's order."""
    with open_archive(path) as tar:
        for member in tar:
            if member.isfile() and wanted(member.name):
                file = tar.extractfile(member)
                assert file is not None, "a regular file has content"
                yield member.name, file.read()


def unpack(archive: Path, folder: Path, wanted: Callable[[str], bool]) -> Path:
    """Write the wanted regular files of an archive below `folder`, which appears when all are there; a complete one is kept.

    Links and devices are not made, and a name that leads out of the folder raises ShardError.
    """
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        inside = Path(temporary) / "unpacked"
        inside.mkdir()
        for name, data in archive_files(archive, wanted):
            parts = PurePosixPath(name)
            if parts.is_absolute() or ".." in parts.parts:
                raise ShardError(f"{archive}: holds a file {name!r} that leads out of its folder; do not trust this archive")
            target = inside / parts
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        shutil.move(str(inside), str(folder))
    return folder
