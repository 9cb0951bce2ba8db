"""The hosts of a job and their meeting point: what DeepSpeed's launcher is told so that it need not guess.

By itself the launcher takes as meeting point the first address that `hostname -I` prints on the first host, on a machine with several
networks perhaps the wrong one, and it starts the ranks on this host when a filter leaves one other host. So both are always settled here.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import zlib
from dataclasses import replace
from pathlib import Path

from m2mkd_ds.config import ConfigError, LaunchConfig
from m2mkd_ds.distributed.start.interface import local_address_towards
from m2mkd_ds.distributed.start.launched import derived_port

_FILTERS = ("-i", "--include", "-e", "--exclude")


def read_hostfile(file: Path) -> dict[str, int]:
    """{host: slots} in the order of the file. Raises ConfigError naming the line that is not `NAME slots=N`."""
    if file.is_dir():
        raise ConfigError(f"launch.hostfile {file}: a folder; name a file of lines `NAME slots=RANKS` (scripts/hostfile.example)")
    if not file.is_file():
        raise ConfigError(f"launch.hostfile {file}: no such file; scripts/hostfile.example shows one")
    hosts: dict[str, int] = {}
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)\s+slots=([1-9]\d*)", text)
        if not match:
            raise ConfigError(f"launch.hostfile {file}, line {number}: {line!r}; expected `NAME slots=RANKS`, such as node1 slots=8")
        if match[1] in hosts:
            raise ConfigError(f"launch.hostfile {file}, line {number}: {match[1]} stands there twice; a host has one line")
        hosts[match[1]] = int(match[2])
    if not hosts:
        raise ConfigError(f"launch.hostfile {file} names no host; expected lines such as `node1 slots=8`")
    return hosts


def with_meeting_point(launch: LaunchConfig, run: str) -> LaunchConfig:
    """For a job over a hostfile: master address, port and `--force_multi` as launcher flags; `launch` itself for a job of this host.

    The port follows from `run` (any text that is the run's own), so that a second run on the same hosts seldom meets the first.
    Raises ConfigError when the address of the first host cannot be told from here.
    """
    if not launch.hostfile:
        if launch.master_addr:
            raise ConfigError(f"launch.master_addr is {launch.master_addr}, but launch.hostfile is empty: ranks of this host need none")
        return launch
    # The launcher itself would start so many ranks whatever the slots say.
    short = [f"{host} slots={slots}" for host, slots in read_hostfile(Path(launch.hostfile)).items() if slots < launch.num_gpus]
    if short:
        raise ConfigError(f"launch.num_gpus is {launch.num_gpus}, but {launch.hostfile} has {short[0]}; 0 means as many as slots")
    given = {word.partition("=")[0] for word in launch.extra}
    flags: list[str] = []
    if "--master_addr" in given:
        if launch.master_addr:
            raise ConfigError(f"launch.master_addr is {launch.master_addr} and launch.extra has --master_addr; give one of them")
    else:
        flags += ["--master_addr", launch.master_addr or first_address(launch, given)]
    if "--master_port" not in given:
        flags += ["--master_port", str(derived_port(zlib.crc32(run.encode())))]
    if "--force_multi" not in given:
        flags += ["--force_multi"]
    return replace(launch, extra=(*flags, *launch.extra))


def first_address(launch: LaunchConfig, flags: set[str]) -> str:
    """The address of the hostfile's first host, as the other hosts reach it. Raises ConfigError when it cannot be told from here."""
    hosts = list(read_hostfile(Path(launch.hostfile)))
    if flags & set(_FILTERS):
        raise ConfigError(
            f"launch.extra has {', '.join(sorted(flags & set(_FILTERS)))}, so the first host is not known here: "
            "set launch.master_addr to the address of the first host that it leaves"
        )
    first = hosts[0]
    address = _resolve(first)
    if not ipaddress.ip_address(address).is_loopback:
        return address
    # A host's own name often stands for 127.0.1.1, and so it does here if this is the first host.
    if first not in ("localhost", socket.gethostname(), socket.getfqdn()):
        here = socket.gethostname()
        raise ConfigError(f"{first} means {address} here, and this host is {here}: set launch.master_addr to the address of {first}")
    if len(hosts) == 1:
        return address
    try:
        return local_address_towards(_resolve(hosts[1]))
    except ValueError as err:
        raise ConfigError(f"launch.hostfile: {first} cannot tell its own address, for {err}; set launch.master_addr") from None


def _resolve(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_UNSPEC, socket.SOCK_STREAM)[0][4][0])
    except socket.gaierror as err:
        raise ConfigError(f"launch.hostfile {host}: {err.strerror}; name the host as ssh and the other hosts know it") from None
