"""The Unix socket's name: made for its owner only, taken over from a dead server, never from a live one, removed at the end."""

from __future__ import annotations

import os
import secrets
import socket
import stat
import struct
import time

MAX_PATH_BYTES = 107
"""What the kernel has room for in a socket's address."""
_BACKLOG = 128
_PROBES, _PROBE_PAUSE_S = 3, 0.05
_CREDENTIALS = struct.Struct("3i")


def check_path(path: str) -> None:
    """Refuse what cannot name a socket. Raises ValueError."""
    size = len(os.fsencode(path))
    if not 0 < size <= MAX_PATH_BYTES or "\0" in path:
        raise ValueError(
            f"teacher socket {path!r}: the path has {size} bytes, a socket's may have 1 to {MAX_PATH_BYTES}; give server and trainers a "
            "shorter one, for example unix:/tmp/teacher.sock"
        )


def listen(path: str) -> socket.socket:
    """A socket that listens at `path`, mode 0600; one that a dead server left is replaced.

    Raises ValueError for a path that is too long, in no folder, in use by a live server, or no socket.
    """
    check_path(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # before it has a name: at no time may others connect
        for _ in range(_PROBES):
            try:
                sock.bind(path)
            except FileNotFoundError:
                raise ValueError(f"teacher socket {path}: its folder does not exist; make it first") from None
            except OSError as err:
                if not os.path.lexists(path):
                    raise ValueError(f"teacher socket {path}: {err.strerror}; give a path in a folder of your own") from None
                _put_stale_away(path)
                continue
            sock.listen(_BACKLOG)
            return sock
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise ValueError(f"teacher socket {path}: other servers start at this path at the same time; give each a path of its own")


def release(path: str, identity: tuple[int, int]) -> None:
    """Remove the socket's name if it still is the one of `identity`: another server may have taken the path since."""
    try:
        if identity_of(path) == identity:
            os.unlink(path)
    except FileNotFoundError:
        pass


def identity_of(path: str) -> tuple[int, int]:
    """Which file this is, whatever it is called."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end, as the kernel noted it."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


def _put_stale_away(path: str) -> None:
    """Remove a socket at which nobody listens. Raises ValueError when somebody does, or when it is another kind of file."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ValueError(f"teacher socket {path}: there is a file that is no socket; give another path, or remove it")
        identity = identity_of(path)
        if _is_live(path):
            raise ValueError(f"teacher socket {path}: a server is running there already; stop it, or give this one another path")
        # Of several servers that start at once, one gets the name out of the way; had it caught another's new socket, it puts that back.
        aside = f"{path}.{secrets.token_hex(4)}"
        os.rename(path, aside)
        if identity_of(aside) != identity:
            os.link(aside, path)
        os.unlink(aside)
    except (FileNotFoundError, FileExistsError):
        pass  # another server was faster; bind tells what it did


def _is_live(path: str) -> bool:
    """Whether somebody listens; asked more than once, because a socket has its name a moment before it listens."""
    for attempt in range(_PROBES):
        if attempt:
            time.sleep(_PROBE_PAUSE_S)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(path)
            except (ConnectionRefusedError, FileNotFoundError):
                continue
            except OSError:  # a full backlog, a socket of another user: somebody is there
                pass
            return True
    return False
