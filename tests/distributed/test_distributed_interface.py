"""The interface towards the meeting point: read from the kernel, checked against iproute2 where it is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from m2mkd_ds.distributed.start.interface import addresses_by_interface, interface_towards, local_address_towards

needs_ip = pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")


@needs_ip
def test_every_address_that_iproute2_shows_is_found() -> None:
    shown = json.loads(subprocess.run(["ip", "-json", "address"], capture_output=True, text=True, check=True).stdout)
    expected = {link["ifname"]: {a["local"] for a in link["addr_info"]} for link in shown if link["addr_info"]}
    ours = {name: set(known) for name, known in addresses_by_interface().items()}
    assert ours == expected


def test_loopback_is_its_own_interface() -> None:
    assert local_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1", spans_hosts=False) == "lo"


def test_an_unknown_name_says_so() -> None:
    with pytest.raises(ValueError, match="MASTER_ADDR no-such-host.invalid: .* give an address that every host knows"):
        interface_towards("no-such-host.invalid", spans_hosts=True)


PROBE = """
from m2mkd_ds.distributed.start.interface import interface_towards
for target, spans in {targets}:
    try:
        print(interface_towards(target, spans_hosts=spans))
    except ValueError as err:
        print(err)
"""
NETWORKS = """
set -e
ip link set lo up
ip link add name eth0 type veth peer name far0; ip link set far0 up; ip address add 10.1.0.5/24 dev eth0; ip link set eth0 up
{second}
exec "$0" -c "$1"
"""
SECOND = """ip link add name ib0 type veth peer name far1; ip link set far1 up; ip link set ib0 up
ip address add 10.2.0.5/24 dev ib0; ip address add 10.3.0.5/24 dev ib0"""


def in_own_network(second: str, targets: list[tuple[str, bool]]) -> list[str]:
    """What `interface_towards` says in a network name space with eth0 and perhaps another interface."""
    script = ["sh", "-c", NETWORKS.format(second=second), sys.executable, PROBE.format(targets=targets)]
    done = subprocess.run(["unshare", "--net", *script], env=os.environ, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode and "ermi" in done.stderr:
        pytest.skip(f"no network name spaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_ip
def test_the_route_decides_between_two_networks() -> None:
    targets = [("10.1.0.9", True), ("10.2.0.9", True), ("10.3.0.9", True), ("10.2.0.5", True), ("127.0.1.1", True), ("10.9.0.1", True)]
    eth, ib, second, own, loopback, nowhere = in_own_network(SECOND, targets)
    assert (eth, ib, second, own) == ("eth0", "ib0", "ib0", "ib0")
    assert "MASTER_ADDR 127.0.1.1 means" in loopback and "its interfaces are eth0, ib0" in loopback
    assert "MASTER_ADDR 10.9.0.1: Network is unreachable" in nowhere


@needs_ip
def test_where_the_own_name_means_loopback_the_only_network_is_taken() -> None:
    assert in_own_network("", [("127.0.1.1", True), ("127.0.1.1", False)]) == ["eth0", "lo"]
