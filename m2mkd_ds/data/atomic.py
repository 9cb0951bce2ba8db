"""Files of the data room that are either whole and on disk, or not there; and checksums of whole files."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path
from typing import BinaryIO


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


def file_sha256(path: Path) -> str:
    """SHA-256 of the file's bytes, in hex."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
