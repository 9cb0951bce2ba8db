"""A teacher server's process: listen, load, check, serve until told to stop, drain, leave.

First SIGTERM or Ctrl-C: no new answers, running ones end within the grace time, exit code 0. The second: at once, exit code 1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch

from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.distill.pairs import parse_pairs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.protocol.wire import Limits
from m2mkd_ds.teacher.server.coming import ComingService, Service
from m2mkd_ds.teacher.server.metrics_page import MetricsPage
from m2mkd_ds.teacher.server.options import ServerOptions
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import ServiceOptions, TeacherService
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.nodes import versions
from m2mkd_ds.train.teacher.run import run_fingerprints, teacher_parts

SERVED_PHASE = "m2mkd"
"""The phase that has a teacher."""


class Transport(Protocol):
    """Something that listens and calls the service."""

    @property
    def endpoint(self) -> str:
        """What trainers write into teacher.endpoints."""
        ...

    def start(self) -> None:
        """Listen and serve, in threads of its own. Raises ConfigError or OSError when the address cannot be had."""
        ...

    def stop(self, grace_s: float) -> object:
        """End within about `grace_s`; answers that are then still running are cut off."""
        ...


def serve(config: RunConfig, options: ServerOptions, pairs: str = "all") -> None:
    """Run a server until it is told to stop. Raises ConfigError before anything listens."""
    options.check()
    stop = _Stop()
    with ExitStack() as stack:
        # Before the models are loaded, which takes minutes: whether the addresses can be had; trainers that come meanwhile are asked to
        # wait, and the page says `not ready`.
        coming = ComingService(service_options(options))
        transports = [make_transport(coming, address, options) for address in options.addresses]
        for transport in transports:
            start_transport(transport)
            stack.callback(transport.stop, 0.0)
        page = stack.enter_context(closing(open_page(options.metrics))) if options.metrics else None
        logger.info("teacher server: listening at %s; loading", ", ".join(transport.endpoint for transport in transports))
        ctx = open_teacher(config)
        service = stack.enter_context(closing(make_service(ctx, options, pairs)))
        coming.open(service)
        facts = {"instance": service.instance, **{f"version_{k}": v for k, v in versions().items()}}
        if page is not None:
            page.attach(service.counters, service.status, facts)
            logger.info("metrics: http://%s:%d/metrics", options.metrics.rpartition(":")[0], page.port)
        for transport in transports:
            logger.info("teacher server %s: ready at %s", service.instance[:8], transport.endpoint)
        stop.wait()
        logger.info("draining: no new answers; %d running may take %g s", service.status().in_flight, options.grace_s)
        service.drain()
        deadline = time.monotonic() + options.grace_s
        service.wait_idle(options.grace_s)
        for transport in transports:
            transport.stop(max(0.0, deadline - time.monotonic()))
    logger.info("stopped")


def open_page(address: str) -> MetricsPage:
    """The page of numbers at HOST:PORT. Raises ConfigError naming --metrics when the address cannot be had."""
    try:
        return MetricsPage(address)
    except OSError as err:
        raise ConfigError(
            f"--metrics {address}: cannot listen there ({err.strerror or err}); give --metrics HOST:OTHER, or --metrics '' for no page"
        ) from err


def start_transport(transport: Transport) -> None:
    """Listen. Raises ConfigError naming --listen when the address cannot be had."""
    try:
        transport.start()
    except ConfigError:
        raise
    except (OSError, ValueError) as err:
        raise ConfigError(f"--listen {transport.endpoint}: {err}") from err


def open_teacher(config: RunConfig) -> RunContext:
    """The run as one process sees it, on the accelerator if there is one; no job is joined."""
    device = torch.device(torch.accelerator.current_accelerator() or "cpu") if torch.accelerator.is_available() else torch.device("cpu")
    ctx = open_run(config, World(0, 1, 0, 1, device))
    return replace(ctx, root=Path(config.run_dir))


def make_service(ctx: RunContext, options: ServerOptions, pairs: str = "all") -> TeacherService:
    """Load what the pairs need and check it. Raises ConfigError when the run has not made it yet."""
    phase = getattr(ctx.config, SERVED_PHASE)
    chosen = tuple(ctx.pairs[i] for i in parse_pairs(pairs, len(ctx.pairs)))
    parts = teacher_parts(ctx, phase, chosen)
    producer = Producer(parts, cache_bytes=int(options.cache_gb * 1e9))
    return TeacherService(producer, run_fingerprints(ctx, phase, chosen), service_options(options))


def service_options(options: ServerOptions) -> ServiceOptions:
    """The operator's bounds, as a service takes them."""
    limits = Limits(
        max_count=options.max_images, max_answer_bytes=int(options.max_gb * 1e9), max_in_flight=options.max_in_flight,
        heartbeat_s=options.heartbeat_s,
    )  # fmt: skip
    return ServiceOptions(limits=limits, max_bytes=int(options.max_gb * 1e9), endpoints=options.others)


def make_transport(service: Service, address: str, options: ServerOptions) -> Transport:
    """A transport by its address. Raises ConfigError for security that does not fit."""
    if address.startswith("unix:"):
        from m2mkd_ds.teacher.shm.server import ShmTransport

        return ShmTransport(service, address.removeprefix("unix:"))
    from m2mkd_ds.teacher.flight.security import ServerSecurity
    from m2mkd_ds.teacher.flight.server import FlightTransport

    security = ServerSecurity(
        tls_cert=options.tls_cert, tls_key=options.tls_key, client_ca=options.client_ca, token_file=options.token_file,
        insecure=options.insecure,
    )  # fmt: skip
    return FlightTransport(service, address, security)


class _Stop:
    """Waits for SIGTERM or SIGINT; the second one ends the process at once."""

    def __init__(self) -> None:
        self._asked = threading.Event()
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError("a teacher server runs in the main thread of its process: signals arrive there")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked.is_set():
            sys.stderr.write("second signal: stopping at once\n")
            os._exit(1)
        self._asked.set()

    def wait(self) -> None:
        """Until the first signal."""
        while not self._asked.wait(0.2):  # a wait without time-out would not let the handler run
            pass

