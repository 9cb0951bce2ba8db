"""TCP connections that a library holds and gives no handle to, found by their peer: are they open, and an end to them. Linux only."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from urllib.parse import unquote


def cut_connection(peer: str) -> bool:
    """Shut down this process's connection to `peer`, as gRPC writes it: `ipv4:10.0.0.7:51234`, `ipv6:[::1]:51234`. False: none there.

    The descriptor stays with its owner, who sees the connection reset.
    """
    return any([_at_peer(number, wanted, _shut) for wanted in _address(peer) for number in _descriptors()])


def is_connected(peer: str) -> bool:
    """Whether this process has a connection to `peer`."""
    return any(_at_peer(number, wanted, lambda held: None) for wanted in _address(peer) for number in _descriptors())


def _address(peer: str) -> list[tuple[str, int]]:
    """Host and port; none for what is no address."""
    host, _, port = unquote(peer).partition(":")[2].rpartition(":")
    return [(host.strip("[]"), int(port))] if port.isdecimal() else []


def _descriptors() -> list[int]:
    return [int(name) for name in os.listdir("/proc/self/fd")]


def _shut(held: socket.socket) -> None:
    held.shutdown(socket.SHUT_RDWR)


def _at_peer(descriptor: int, wanted: tuple[str, int], act: Callable[[socket.socket], None]) -> bool:
    """Whether a descriptor is a connection to `wanted`; then `act` is done with it."""
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
            act(held)
        except OSError:
            return False  # listens, or ended by itself
        return True
