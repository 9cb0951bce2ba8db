"""What an operator decides when starting a teacher server: addresses, security, bounds. No part of a run's config: no bit depends on it."""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_ds.config import ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Options of `m2mkd teacher-server`."""

    listen: tuple[str, ...] = ()
    """HOST:PORT (port 0: any free one) for trainers elsewhere, unix:PATH for trainers on this host; repeat it for both at once.
    By default 127.0.0.1:8815."""
    tls_cert: str = ""
    """PEM file of this server's certificate; needed to listen beyond loopback, as the next three are."""
    tls_key: str = ""
    """PEM file of its private key."""
    client_ca: str = ""
    """PEM file of the authority that signs trainers' certificates; trainers without one are turned away."""
    token_file: str = ""
    """File with the token that trainers must show, readable by its owner alone; or M2MKD_TEACHER_TOKEN in the environment."""
    insecure: bool = False
    """Listen beyond loopback without all of that: anybody who reaches the port can read images and hidden states."""
    metrics: str = "127.0.0.1:9815"
    """HOST:PORT of the Prometheus page (/metrics, /live, /ready); empty: none."""
    cache_gb: float = 1.0
    """Decoded images and hidden states that are kept for other pairs, in 10^9 bytes."""
    max_gb: float = 4.0
    """Answers that are being made or sent, in 10^9 bytes; trainers are asked to wait beyond it."""
    max_in_flight: int = 8
    """Requests of one trainer at a time."""
    max_images: int = 4096
    """Images of one micro-batch."""
    heartbeat_s: float = 5.0
    """A trainer that is silent for several of these is forgotten."""
    grace_s: float = 30.0
    """After SIGTERM: how long running answers may take. A second SIGTERM, or Ctrl-C twice, ends at once."""
    others: tuple[str, ...] = ()
    """Another teacher server, named to trainers when this one drains; repeat it for several."""

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where to listen."""
        return self.listen or ("127.0.0.1:8815",)

    def check(self) -> None:
        """Raises ConfigError with one sentence."""
        for address in self.addresses:
            check_address(address)
        if self.metrics.startswith("unix:"):
            raise ConfigError(f"--metrics {self.metrics}: the page is on TCP only; give HOST:PORT, or --metrics '' for none")
        if self.metrics:
            check_address(self.metrics)
        positive = ("cache_gb", "max_gb", "max_in_flight", "max_images", "heartbeat_s", "grace_s")
        for name in positive:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name != "cache_gb"):
                raise ConfigError(f"--{name.replace('_', '-')} is {value:g}; give more than 0")


def check_address(address: str) -> None:
    """Raises ConfigError unless `address` is HOST:PORT or unix:PATH."""
    if address.startswith("unix:") and len(address) > len("unix:"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{address!r} is no address: give HOST:PORT, for example 127.0.0.1:8815, or unix:PATH")
