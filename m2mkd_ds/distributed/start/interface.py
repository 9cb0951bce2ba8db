"""The network interface over which a host reaches the meeting point of the job.

Left alone, gloo takes the address that the host's own name stands for, which on many machines is 127.0.1.1, and NCCL the first
interface that it likes. On a host with several networks both may be one that the others cannot reach. So the route to the meeting
point is looked up on each host. Linux only; elsewhere nothing is chosen.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import sys
from pathlib import Path

_SIOCGIFCONF = 0x8912
_IFREQ_BYTES = 40
"""Name (16 bytes) and address (24) of an entry, on 64-bit Linux."""


def interface_towards(master_addr: str, *, spans_hosts: bool) -> str | None:
    """Name of the interface through which this host reaches `master_addr`; None where interfaces cannot be listed.

    `spans_hosts`: whether other hosts take part; then the loopback interface is of no use, and where a host's own name stands for
    127.0.1.1 the only other interface is taken. Raises ValueError when the address is unknown, unreachable, or several could be meant.
    """
    addresses = addresses_by_interface()
    if not addresses:
        return None
    local = local_address_towards(master_addr)
    if ipaddress.ip_address(local).is_loopback and spans_hosts:
        others = [name for name, known in addresses.items() if any(_is_for_others(address) for address in known)]
        if len(others) == 1:
            return others[0]
        raise ValueError(
            f"MASTER_ADDR {master_addr} means {local} on this host ({socket.gethostname()}), which no other host can reach, and its "
            f"interfaces are {', '.join(others) or 'none'}: give an address of it that the others reach, or set GLOO_SOCKET_IFNAME here"
        )
    return next((name for name, known in addresses.items() if local in known), None)


def _is_for_others(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    return not parsed.is_loopback and not parsed.is_link_local


def local_address_towards(host: str) -> str:
    """The address of this host that packets to `host` carry. Nothing is sent. Raises ValueError when there is no route."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    except socket.gaierror as err:
        raise ValueError(f"MASTER_ADDR {host}: {err.strerror} on {socket.gethostname()}; give an address that every host knows") from None
    with socket.socket(family, kind, protocol) as probe:
        try:
            probe.connect(target)  # of a datagram socket: looks up the route, no more
        except OSError as err:
            raise ValueError(f"MASTER_ADDR {host}: {err.strerror} from {socket.gethostname()}") from None
        return str(probe.getsockname()[0]).partition("%")[0]


def addresses_by_interface() -> dict[str, list[str]]:
    """{interface: its addresses}, of interfaces that are up. Empty on systems other than Linux."""
    found: dict[str, list[str]] = {}
    if sys.platform != "linux":
        return found
    for name, address in [*_ipv4_addresses(), *_ipv6_addresses()]:
        found.setdefault(name, []).append(address)
    return found


def _ipv4_addresses() -> list[tuple[str, str]]:
    import array
    import fcntl

    room = 128 * _IFREQ_BYTES
    buffer = array.array("B", bytes(room))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        answer = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iL", room, buffer.buffer_info()[0]))
    entries = buffer.tobytes()[: struct.unpack("iL", answer)[0]]
    rows = [entries[start : start + _IFREQ_BYTES] for start in range(0, len(entries), _IFREQ_BYTES)]
    # A second address of an interface may be listed under a label such as eth0:1.
    return [(row[:16].rstrip(b"\0").decode().partition(":")[0], socket.inet_ntoa(row[20:24])) for row in rows]


def _ipv6_addresses() -> list[tuple[str, str]]:
    table = Path("/proc/net/if_inet6")
    rows = [line.split() for line in table.read_text().splitlines()] if table.exists() else []
    return [(row[5], str(ipaddress.IPv6Address(int(row[0], 16)))) for row in rows]
