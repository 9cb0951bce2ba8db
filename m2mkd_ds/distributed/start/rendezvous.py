"""The roll-call before a job is joined: who does not come is named after `timeout_s`, on every rank that is there.

    rank r: here/<r> = host name      rank 0: verdict = "" when all are there, else the sentence that names the missing ones

Through a store of its own at the job's meeting point: the process group's store counts who has come, and knows no names.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed

from m2mkd_ds.distributed.start.launched import Place

_log = logging.getLogger("m2mkd_ds")

_POLL_S = 0.1
_FIRST_WORD_S = 30.0
"""Seconds before the first warning about ranks that are still missing."""
_LINGER_S = 2.0
"""How long rank 0 keeps the store up, so that the others can read its verdict."""
_GIVEN_UP = "stopped before the job was joined"


class MissingRanksError(RuntimeError):
    """Some rank did not come in time; the message names the missing ranks, or the address that could not be reached."""

    exit_code = 1


class GivenUpError(RuntimeError):
    """The start was given up because `give_up` said so."""


@dataclass(frozen=True)
class _Call:
    rank: int
    size: int
    host: str
    port: int
    timeout_s: float
    deadline: float
    """time.monotonic()."""
    give_up: Callable[[], bool]

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"

    def check(self) -> None:
        """Raises GivenUpError."""
        if self.give_up():
            raise GivenUpError(_GIVEN_UP)


def meet(place: Place, timeout_s: float, give_up: Callable[[], bool]) -> torch.distributed.Store:
    """Wait until all ranks have come. Keep what is returned until the process group has been made.

    Raises MissingRanksError on every rank that is there when some are missing after `timeout_s`, and GivenUpError.
    """
    deadline = time.monotonic() + timeout_s
    call = _Call(place.rank, place.size, place.master_addr, place.master_port, timeout_s, deadline, give_up)
    store = torch.distributed.PrefixStore(_attempt(), _open(call))
    store.set(f"here/{place.rank}", socket.gethostname())
    if place.rank == 0:
        _call_the_roll(store, call)
    else:
        _await_verdict(store, call)
    return store


def _attempt() -> str:
    """A prefix of its own for every restart: torchrun keeps one store for all of them."""
    return f"m2mkd-roll-call-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _open(call: _Call) -> torch.distributed.Store:
    """The store, on rank 0 its server too (torchrun brings its own)."""
    is_master = call.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_master:
        _await_server(call)
    wait = timedelta(seconds=max(call.timeout_s, 1.0))
    try:
        return torch.distributed.TCPStore(call.host, call.port, None, is_master, wait, wait_for_workers=False, multi_tenant=True)
    except torch.distributed.DistNetworkError as err:
        what = "listen" if is_master else "speak to rank 0"
        raise MissingRanksError(f"rank {call.rank} on {socket.gethostname()} cannot {what} at {call.address} ({_short(err)})") from None


def _await_server(call: _Call) -> None:
    """Until somebody listens there. Asked by plain connections: the store's own tries print a page of frames each, and hear no signal."""
    while True:
        try:
            socket.create_connection((call.host, call.port), timeout=2.0).close()
            return
        except OSError as err:
            if time.monotonic() > call.deadline:
                raise MissingRanksError(
                    f"rank {call.rank} on {socket.gethostname()} cannot reach rank 0 at {call.address} within {call.timeout_s:g} s "
                    f"({err}); check MASTER_ADDR, MASTER_PORT, the network interface, and the log of rank 0's host"
                ) from None
        call.check()
        time.sleep(_POLL_S)


def _call_the_roll(store: torch.distributed.Store, call: _Call) -> None:
    spoken = False
    while missing := [rank for rank in range(call.size) if not store.check([f"here/{rank}"])]:
        now = time.monotonic()
        if call.give_up():
            _tell(store, _GIVEN_UP)
            raise GivenUpError(_GIVEN_UP)
        if now > call.deadline:
            here = [f"{rank} on {store.get(f'here/{rank}').decode()}" for rank in range(call.size) if rank not in missing]
            text = (
                f"{_names(missing, call.size)} did not come to {call.address} within {call.timeout_s:g} s; here are "
                f"{', '.join(here[:8])}: see the logs of the other hosts"
            )
            _tell(store, text)
            raise MissingRanksError(text)
        if not spoken and now > call.deadline - call.timeout_s + _FIRST_WORD_S:
            spoken = True
            _log.warning("still waiting for %s at %s", _names(missing, call.size), call.address)
        time.sleep(_POLL_S)
    store.set("verdict", "")


def _tell(store: torch.distributed.Store, text: str) -> None:
    store.set("verdict", text)
    time.sleep(_LINGER_S)


def _names(missing: list[int], size: int) -> str:
    """`ranks 2, 3 of 4`."""
    more = ", ..." if len(missing) > 8 else ""
    return f"{'rank' if len(missing) == 1 else 'ranks'} {', '.join(map(str, missing[:8]))}{more} of {size}"


def _await_verdict(store: torch.distributed.Store, call: _Call) -> None:
    try:
        while not store.check(["verdict"]):
            call.check()
            # Rank 0 may have begun to wait a little before us, or a whole time-out after us; its verdict has the names.
            if time.monotonic() > call.deadline + call.timeout_s + 2 * _LINGER_S:
                raise MissingRanksError(f"rank 0 at {call.address} did not end its roll-call; see the log of its host")
            time.sleep(_POLL_S)
        text = store.get("verdict").decode()
    except torch.distributed.DistNetworkError as err:
        raise MissingRanksError(
            f"rank 0 at {call.address} has gone before all ranks had come ({_short(err)}); see the log of its host"
        ) from None
    if text == _GIVEN_UP:
        raise GivenUpError(text)
    if text:
        raise MissingRanksError(text)


def _short(err: Exception) -> str:
    return str(err).strip().splitlines()[0][:160]
