"""Files that are either whole and on disk, or not there; folders with one writer at a time; checksums of whole files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

logger = logging.getLogger("m2mkd_ds")


class AtomicFile:
    """Context manager: a binary file that appears under `path` complete and on disk, or not at all.

    Raises OSError naming `path` when it cannot be written (full disk, no permission); nothing is left behind.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")

    def __enter__(self) -> BinaryIO:
        self._file = self._temporary.open("wb")
        return self._file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self._path)
                _sync_folder(self._path.parent)
        except OSError as err:
            error = err
        if error is None:
            return
        with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed by close
            self._file.close()
        self._temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = f"{error.strerror}; nothing was left under this name, free space or choose another folder"
            raise OSError(error.errno, reason, str(self._path)) from error


def _sync_folder(folder: Path) -> None:
    """Make the rename itself survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def only_writer(folder: Path, in_use: Exception) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when a process is killed. Raises `in_use` when another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise in_use from err
        except OSError as err:
            if err.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF, errno.ENOSYS):
                raise
            logger.warning("%s: this file system has no locks (%s); do not write into the folder twice at a time", folder, err.strerror)
        yield
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
