"""Walking a tar from front to back, with everything that can be wrong in it named.

Python's tarfile takes a damaged header in the middle, and an archive that was cut between two members, for the end of
the archive: samples would be missing without a word. This walk reads ustar, GNU and PAX headers, needs no seeking (so a
download can be walked while it arrives), holds no member that is not asked for, and sums every byte.
"""

from __future__ import annotations

import hashlib
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple, Protocol

BLOCK = 512
_CHUNK = 1 << 20
_MAX_NAME_RECORD = 1 << 20
"""Longest long-name or PAX record that is believed, in bytes; a damaged size field may say anything."""
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}

TarFaultKind = Literal["truncated", "damaged_tar", "not_tar", "unsupported"]


class ForwardFile(Protocol):
    """What is walked: anything with a blocking `read` (fewer bytes than asked for are fine; none means the end)."""

    def read(self, size: int, /) -> bytes: ...


class TarWalkError(ValueError):
    """The walk cannot go on: whatever follows in this tar is lost."""

    def __init__(self, kind: TarFaultKind, message: str, member: str = "") -> None:
        super().__init__(message)
        self.kind: TarFaultKind = kind
        self.member = member
        """Name of the member that it happened in; empty between members."""


class Member(NamedTuple):
    """One file of the archive."""

    name: str
    offset: int
    """Of the first byte of its content."""
    size: int
    crc32: int
    data: bytes | None
    """The content, where it was asked for."""
    refused: str
    """Why it is no plain file (link, device, name that is not UTF-8), or empty."""


class SummedReader:
    """Forward reads of exact sizes; counts and hashes what passes."""

    def __init__(self, file: ForwardFile) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.position = 0

    @property
    def sha256(self) -> str:
        """Of all bytes read so far, in hex."""
        return self._sha256.hexdigest()

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer only at the end of the file."""
        parts = []
        missing = size
        while missing and (part := self._file.read(min(missing, _CHUNK))):
            self._sha256.update(part)
            self.position += len(part)
            missing -= len(part)
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def chunks(self, size: int) -> Iterator[bytes]:
        """`size` bytes in pieces; fewer at the end of the file."""
        while size and (part := self.read(min(size, _CHUNK))):
            size -= len(part)
            yield part

    def drain(self) -> bool:
        """Read to the end; true when all of the rest was zeros."""
        zeros = True
        while part := self.read(_CHUNK):
            zeros = zeros and part.count(0) == len(part)
        return zeros


def walk_tar(reader: SummedReader, keep: Callable[[str], bool]) -> Iterator[Member]:
    """The files of a tar in order; `keep(name)` says whose bytes are wanted. Reads to the very end of the file.

    Raises TarWalkError where the archive is cut off, damaged, compressed or of a kind that cannot be read by offset.
    """
    general: dict[str, str] = {}
    special: dict[str, str] = {}
    while (header := _next_header(reader)) is not None:
        # 1. Records about the next member (or, with `g`, about all that follow).
        if header.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            text = _record(reader, header).split(b"\0", 1)[0]
            if header.type == tarfile.GNUTYPE_LONGNAME:
                special["path"] = _text(text)
            continue
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            special |= _pax(_record(reader, header))
            continue
        if header.type == tarfile.XGLTYPE:
            general |= _pax(_record(reader, header))
            continue
        # 2. A member.
        words = general | special
        special = {}
        name = words.get("path", header.name)
        if header.type == tarfile.GNUTYPE_SPARSE or any(word.startswith("GNU.sparse.") for word in words):
            raise TarWalkError("unsupported", f"member {name} is a sparse file; pack it without --sparse")
        is_file = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        size = _size(words, header) if is_file else 0
        if header.isdir():
            continue
        yield _member(reader, header, name, size, keep)
    if not reader.drain():
        raise TarWalkError("damaged_tar", "more data follows behind the end mark, where readers stop; were archives joined?")


def _next_header(reader: SummedReader) -> tarfile.TarInfo | None:
    """The next header block, or None at the end mark."""
    start = reader.position
    block = reader.read(BLOCK)
    if len(block) < BLOCK:
        if start == 0:
            raise TarWalkError("not_tar", f"only {len(block)} bytes; a tar has at least 1,024")
        raise TarWalkError("truncated", f"it ends at byte {reader.position} without an end mark")
    if block.count(0) == BLOCK:
        return None
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as err:
        packed = next((name for magic, name in _COMPRESSED.items() if block.startswith(magic)), "")
        if start == 0:
            reason = f"compressed with {packed}, decompress it, samples are read by offset" if packed else f"{err} at byte 0"
            raise TarWalkError("not_tar", reason) from None
        raise TarWalkError("damaged_tar", f"damaged header at byte {start} ({err})") from None


def _member(reader: SummedReader, header: tarfile.TarInfo, name: str, size: int, keep: Callable[[str], bool]) -> Member:
    offset = reader.position
    kept: list[bytes] | None = [] if keep(name) else None
    crc32 = 0
    for part in reader.chunks(size):
        crc32 = zlib.crc32(part, crc32)
        if kept is not None:
            kept.append(part)
    padding = -size % BLOCK
    if reader.position - offset < size or len(reader.read(padding)) < padding:
        raise TarWalkError("truncated", f"it ends at byte {reader.position}, inside of member {name}", name)
    refused = "" if header.isreg() else f"a {_TYPES.get(header.type, f'member of type {header.type!r}')}, not a plain file"
    if any("\udc80" <= letter <= "\udcff" for letter in name):
        refused = "a file whose name is not UTF-8"
    return Member(name, offset, size, crc32, None if kept is None else b"".join(kept), refused)


_TYPES = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "named pipe",
}


def _record(reader: SummedReader, header: tarfile.TarInfo) -> bytes:
    """The content of a long-name or PAX member."""
    if not 0 <= header.size <= _MAX_NAME_RECORD:
        raise TarWalkError("damaged_tar", f"a name record of {header.size} bytes at byte {reader.position}")
    padded = header.size + -header.size % BLOCK
    data = reader.read(padded)
    if len(data) < padded:
        raise TarWalkError("truncated", f"it ends at byte {reader.position}, inside of a name record")
    return data[: header.size]


def _pax(data: bytes) -> dict[str, str]:
    """`12 path=a.png\\n...` -> {"path": "a.png", ...}: each record begins with its own length."""
    words = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        end = int(length) if length.isdigit() and len(length) < 8 else 0
        key, equals, value = data[len(length) + 1 : end - 1].partition(b"=")
        if not space or not equals or not len(length) < end <= len(data):
            raise TarWalkError("damaged_tar", f"a PAX record that cannot be read: {data[:40]!r}")
        words[_text(key)] = _text(value)
        data = data[end:]
    return words


def _size(words: dict[str, str], header: tarfile.TarInfo) -> int:
    text = words.get("size", str(header.size))
    if not text.isdigit() or len(text) > 18:
        raise TarWalkError("damaged_tar", f"member {header.name} has the size {text!r}")
    return int(text)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")
