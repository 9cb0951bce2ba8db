"""Ends TCP connections that a library holds and gives no handle to, found by their peer. Linux only."""

from __future__ import annotations

import os
import socket
from urllib.parse import unquote


def cut_connection(peer: str) -> bool:
    """Shut down this process's connection to `peer`, as gRPC writes it: `ipv4:10.0.0.7:51234`, `ipv6:[::1]:51234`. False: none there.

    The descriptor stays with its owner, who sees the connection reset.
    """
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    if not port.isdecimal():
        return False
    wanted = (host.strip("[]"), int(port))
    return any([_shut(int(name), wanted) for name in os.listdir("/proc/self/fd")])


def _shut(descriptor: int, wanted: tuple[str, int]) -> bool:
    try:
        copy = os.dup(descriptor)
    except OSError:
        return False  # closed meanwhile
    try:
        held = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)  # no socket
        return False
    with held:
        try:
            if held.family not in (socket.AF_INET, socket.AF_INET6) or held.type != socket.SOCK_STREAM:
                return False
            host, port = held.getpeername()[:2]
            if (host.removeprefix("::ffff:"), port) != wanted:
                return False
            held.shutdown(socket.SHUT_RDWR)
        except OSError:
            return False  # listens, or ended by itself
        return True
