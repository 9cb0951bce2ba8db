"""Several hosts on one machine, for tests of what a cluster does: launchers over ssh, a host that dies, a link that is cut.

Each host has name spaces of its own for network, host name, processes and mounts, an address `10.77.0.K` on a bridge, and an sshd
that takes one key. The bridge lives in a network name space too, so that no address of the lab exists outside it: labs do not meet,
and nothing but this process reaches their hosts. Files are shared, as on a cluster with one file system. What a host sees under
/etc/hosts and /etc/ssh, and root's home, is its own by mounts in its mount name space; outside nothing is written but the lab's folder.

    with Lab.start(folder, hosts=2) as lab:
        lab.ssh("node1", "hostname")            from outside, through the bridge
        job = lab.launch("node1", ["python", "train.py"], log)
        lab.link_down("node2"); lab.kill_host("node2"); lab.start_host("node2")
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

NEEDED = ("ip", "ssh", "ssh-keygen", "sshd", "pdsh", "hostname", "unshare", "nsenter", "setpriv", "mount")
START_LIMIT_S = 20.0

# Runs as process 1 of a host. $1: the host's folder, $2: its name, $3: its address.
BOOT = """
set -eu
hostname "$2"
mount -t tmpfs none /run
mkdir /run/sshd
mount --bind "$1/hosts" /etc/hosts
mount --bind "$1/ssh" /etc/ssh
mount --bind "$1/passwd" /etc/passwd
ip link set lo up
ip address add "$3/24" dev eth0
ip link set eth0 up
exec "$(command -v sshd)" -D -e
"""

SSHD = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 50:30:100
"""

SSH = """
IdentityFile {here}/key
IdentitiesOnly yes
BatchMode yes
UserKnownHostsFile {here}/known_hosts
GlobalKnownHostsFile /dev/null
StrictHostKeyChecking yes
ConnectTimeout 10
LogLevel ERROR
"""


def why_no_lab() -> str:
    """The reason why this machine cannot make a lab, for a skip; empty when it can."""
    if os.geteuid() != 0:
        return "a lab of hosts needs root"
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in NEEDED if shutil.which(name, path=path) is None]
    if absent:
        return f"a lab of hosts needs {', '.join(absent)} (Debian: iproute2 openssh-server openssh-client pdsh hostname util-linux)"
    links = "ip link add name br0 type bridge && ip link add name port1 type veth peer name eth0"
    trial = [*_UNSHARE, "--net", "sh", "-c", f"{links} && hostname trial && mount -t tmpfs none /run"]
    rights = subprocess.run(trial, env=_environment(), capture_output=True, text=True, check=False, timeout=30)
    return f"name spaces, bridges or mounts are not allowed here: {rights.stderr.strip()}" if rights.returncode else ""


# A host ends with the process that made it, however that one ends.
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")


def alive(number: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has waited for does not."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _environment() -> dict[str, str]:
    """As bare as a login's: nothing of the test run's own environment reaches a host."""
    return {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass
class Host:
    """One host of the lab; `boot` is the process that holds its name spaces, None while it is off."""

    name: str
    address: str
    netns: str
    folder: Path
    boot: subprocess.Popen[bytes] | None = None
    init: int = 0
    """Process 1 of the host, by its number outside."""


@dataclass
class Lab:
    """Running hosts by name; made by `start`, ended by `close` or a `with` block."""

    folder: Path
    switch: str
    hosts: dict[str, Host] = field(default_factory=dict)

    @classmethod
    def start(cls, folder: Path, hosts: int) -> Lab:
        """`node1` to `nodeN`, reachable by name and by ssh from each other. Raises RuntimeError when one does not come up."""
        _remove_ownerless()
        lab = cls(folder, _new_name("sw"))
        _run(["ip", "netns", "add", lab.switch])
        try:
            lab._lay_bridge()
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")])
            for number in range(1, hosts + 1):
                lab._add_host(number)
            lab._introduce()
            for name in lab.hosts:
                lab.start_host(name)
        except BaseException:
            lab.close()
            raise
        return lab

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the lab and remove its name spaces."""
        for host in self.hosts.values():
            if host.boot is not None:
                self.kill_host(host.name)
            _run(["ip", "netns", "delete", host.netns])
        self.hosts.clear()
        _run(["ip", "netns", "delete", self.switch])

    def hostfile(self, slots: Mapping[str, int], file: Path) -> Path:
        """Write `name slots=N` lines."""
        file.write_text("".join(f"{name} slots={count}\n" for name, count in slots.items()))
        return file

    def ssh(self, host: str, command: str, *, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a shell command on the host over ssh, as a login would."""
        return subprocess.run(
            self._ssh_command(host, command),
            env=_environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=timeout_s,
        )  # fmt: skip

    def launch(
        self, host: str, argv: Sequence[str], log: Path, *, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start `argv` on the host over ssh; its output goes to `log`. The result is the ssh client, which ends with the command."""
        words = ["env", *(f"{name}={value}" for name, value in (env or {}).items()), *argv]
        command = f"cd {shlex.quote(str(cwd or self.folder))} && exec {shlex.join(words)}"
        with log.open("ab") as out:
            return subprocess.Popen(
                self._ssh_command(host, command), env=_environment(), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
            )

    def inside(self, host: str, argv: Sequence[str]) -> str:
        """Run `argv` in all name spaces of the host without ssh, for what an administrator at its console would do; gives stdout."""
        return _run(["nsenter", "--target", str(self.hosts[host].init), "--all", *argv])

    def processes(self, host: str) -> dict[int, str]:
        """{number outside: command line} of the host's processes, without its sshd and the shells that sshd started for a login."""
        init = self.hosts[host].init
        if self.hosts[host].boot is None or not alive(init):
            return {}
        space = os.readlink(f"/proc/{init}/ns/pid")
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != init:
                try:
                    if os.readlink(entry / "ns/pid") != space:
                        continue
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue  # it ended while we looked, or is the system's own
                if command and not command.startswith("sshd:"):
                    found[int(entry.name)] = command
        return found

    def kill_host(self, name: str) -> None:
        """SIGKILL to every process of the host at once, as a crash does. Its name stays known, its address answers no more."""
        host = self.hosts[name]
        assert host.boot is not None, f"{name} is off"
        # The kernel ends a process name space with its process 1; unshare itself would ignore SIGTERM.
        members = self.processes(name)
        os.kill(host.boot.pid, signal.SIGKILL)
        host.boot.wait(30)
        host.boot = None
        deadline = time.monotonic() + 10
        while any(alive(number) for number in (host.init, *members)):
            assert time.monotonic() < deadline, f"processes of {name} outlived it"
            time.sleep(0.02)

    def start_host(self, name: str) -> None:
        """Boot a host that is off and wait until it answers to ssh. Raises RuntimeError with its sshd's log when it does not."""
        host = self.hosts[name]
        assert host.boot is None, f"{name} runs"
        _run(["ip", "-n", host.netns, "address", "flush", "dev", "eth0"])
        boot = ["sh", "-c", BOOT, "boot", str(host.folder), name, host.address]
        with (host.folder / "boot.log").open("ab") as log:
            host.boot = subprocess.Popen(
                ["ip", "netns", "exec", host.netns, *_UNSHARE, *boot],
                env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        deadline = time.monotonic() + START_LIMIT_S
        while (answer := self.ssh(name, "true")).returncode != 0:
            if host.boot.poll() is not None or time.monotonic() > deadline:
                log_text = (host.folder / "boot.log").read_text()[-2000:]
                raise RuntimeError(f"{name} does not answer to ssh: {answer.stderr.strip()}; its log: {log_text}")
            time.sleep(0.1)
        (host.init,) = map(int, Path(f"/proc/{host.boot.pid}/task/{host.boot.pid}/children").read_text().split())

    def link_down(self, name: str) -> None:
        """Pull the host's cable: packets are lost without an error at either end."""
        _run(["ip", "-n", self.switch, "link", "set", self._port(name), "down"])

    def link_up(self, name: str) -> None:
        """Put the cable back."""
        _run(["ip", "-n", self.switch, "link", "set", self._port(name), "up"])

    # ---- making it

    def _lay_bridge(self) -> None:
        _run(["ip", "-n", self.switch, "link", "add", "name", "br0", "type", "bridge"])
        _run(["ip", "-n", self.switch, "address", "add", "10.77.0.254/24", "dev", "br0"])
        _run(["ip", "-n", self.switch, "link", "set", "br0", "up"])
        _run(["ip", "-n", self.switch, "link", "set", "lo", "up"])

    def _add_host(self, number: int) -> None:
        name = f"node{number}"
        host = Host(name, f"10.77.0.{number}", _new_name(f"h{number}"), self.folder / name)
        _run(["ip", "netns", "add", host.netns])
        self.hosts[name] = host
        port = self._port(name)
        _run(["ip", "-n", host.netns, "link", "add", "name", "eth0", "type", "veth", "peer", "name", port, "netns", self.switch])
        _run(["ip", "-n", self.switch, "link", "set", port, "master", "br0", "up"])
        (host.folder / "ssh").mkdir(parents=True)
        # A home of its own: what stands in this machine's .bashrc is no part of a test.
        (host.folder / "home").mkdir()
        users = Path("/etc/passwd").read_text().splitlines()
        own = f"root:x:0:0:root:{host.folder / 'home'}:/bin/bash"
        (host.folder / "passwd").write_text("\n".join(own if line.startswith("root:") else line for line in users) + "\n")
        _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "ssh/host_key")])

    def _introduce(self) -> None:
        """Give every host the names, host keys and login key of all."""
        hosts = "127.0.0.1 localhost\n" + "".join(f"{host.address} {host.name}\n" for host in self.hosts.values())
        known = "".join(f"{h.name},{h.address} {(h.folder / 'ssh/host_key.pub').read_text()}" for h in self.hosts.values())
        (self.folder / "known_hosts").write_text(known)
        (self.folder / "ssh_config").write_text(SSH.format(here=self.folder))
        for host in self.hosts.values():
            (host.folder / "hosts").write_text(hosts)
            folder = host.folder / "ssh"
            (folder / "sshd_config").write_text(SSHD)
            shutil.copy(self.folder / "key.pub", folder / "authorized_keys")
            for file in ("key", "known_hosts"):
                shutil.copy(self.folder / file, folder / file)
            (folder / "ssh_config").write_text(SSH.format(here="/etc/ssh"))

    def _port(self, name: str) -> str:
        return f"port-{name}"

    def _ssh_command(self, host: str, command: str) -> list[str]:
        config = str(self.folder / "ssh_config")
        return ["ip", "netns", "exec", self.switch, "ssh", "-F", config, self.hosts[host].address, command]


def _new_name(what: str) -> str:
    """A name of a network name space that no other lab, here or in another process, has."""
    return f"m2mkd-{os.getpid()}-{secrets.token_hex(3)}-{what}"


def _remove_ownerless() -> None:
    """Remove the names that a killed test run left; its hosts ended with it."""
    for line in _run(["ip", "netns", "list"]).splitlines():
        name = line.split()[0]
        if name.startswith("m2mkd-") and not Path("/proc", name.split("-")[1]).exists():
            _run(["ip", "netns", "delete", name])
