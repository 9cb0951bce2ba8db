"""The Unix socket's name: made for its owner only, taken over from a dead server, never from a live one, removed at the end."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

MAX_PATH_BYTES = 107
"""What the kernel has room for in a socket's address."""
_BACKLOG = 128
_TURN_S = 5.0
"""How long a server waits for others that start or end in the same folder; each takes a few milliseconds."""
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
        with _turn(path):
            if os.path.lexists(path):
                _remove_stale(path)
            sock.bind(path)
            sock.listen(_BACKLOG)
    except OSError as err:
        sock.close()
        raise ValueError(f"teacher socket {path}: {err.strerror}; give a path in a folder of your own") from err
    except BaseException:
        sock.close()
        raise
    return sock


def release(path: str, identity: tuple[int, int]) -> None:
    """Remove the socket's name if it still is the one of `identity`: another server may have taken the path since."""
    try:
        with _turn(path):
            if identity_of(path) == identity:
                os.unlink(path)
    except (FileNotFoundError, ValueError):
        pass  # gone, with its folder or alone; or there is no turn to be had: the next server removes what is left


def identity_of(path: str) -> tuple[int, int]:
    """Which file this is, whatever it is called."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def peer_uid(sock: socket.socket) -> int:
    """User id of the process at the other end, as the kernel noted it."""
    _, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return int(uid)


@contextmanager
def _turn(path: str) -> Iterator[None]:
    """One server at a time in the folder of `path`: between its bind and its listen, a socket looks like that of a dead server, and
    another must not take it for one. Raises ValueError without the folder, or when others do not get done."""
    try:
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        raise ValueError(f"teacher socket {path}: its folder does not exist; make it first") from None
    except OSError as err:
        raise ValueError(f"teacher socket {path}: its folder cannot be read ({err.strerror}); take one of your own") from err
    try:
        deadline = time.monotonic() + _TURN_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"teacher socket {path}: another process has held a lock on its folder for {_TURN_S:g} s; give another folder"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)  # and with it, the lock


def _remove_stale(path: str) -> None:
    """Remove a socket at which nobody listens. Raises ValueError when somebody does, or when it is another kind of file."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ValueError(f"teacher socket {path}: there is a file that is no socket; give another path, or remove it")
    if _is_live(path):
        raise ValueError(f"teacher socket {path}: a server is running there already; stop it, or give this one another path")
    os.unlink(path)


def _is_live(path: str) -> bool:
    """Whether somebody listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full backlog, a socket of another user: somebody is there
            pass
        return True
