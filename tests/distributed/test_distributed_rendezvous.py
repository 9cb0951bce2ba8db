"""The roll-call before a job is joined. Ranks are threads here: each has a connection of its own, and rank 0 the server."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from m2mkd_ds.distributed.start.launched import Place
from m2mkd_ds.distributed.start.rendezvous import GivenUpError, MissingRanksError, meet
from tests.launching import free_port

HERE = socket.gethostname()


def never() -> bool:
    return False


def roll_call(ranks: Sequence[int], size: int, timeout_s: float, give_up: Callable[[], bool] = never) -> dict[int, str]:
    """What each of these ranks of a job of `size` is told; empty: all have come."""
    port = free_port()
    everybody_has_heard = threading.Barrier(len(ranks))

    def come(rank: int) -> str:
        text = ""
        try:
            store = meet(Place(rank, size, rank, size, "127.0.0.1", port, "environment"), timeout_s, give_up)
            everybody_has_heard.wait(30)
            del store
        except (MissingRanksError, GivenUpError) as err:
            text = f"{type(err).__name__}: {err}".replace(str(port), "PORT")
        return text

    with ThreadPoolExecutor(len(ranks)) as pool:
        return dict(zip(ranks, pool.map(come, ranks), strict=True))


def test_all_ranks_meet_and_soon() -> None:
    began = time.monotonic()
    assert roll_call((0, 1, 2), 3, 60) == {0: "", 1: "", 2: ""}
    assert time.monotonic() - began < 20


def test_every_rank_that_is_there_is_told_who_is_missing() -> None:
    text = (
        f"MissingRanksError: ranks 1, 3 of 4 did not come to 127.0.0.1:PORT within 1 s; here are 0 on {HERE}, 2 on {HERE}: see the logs of "
        "the other hosts"
    )
    assert roll_call((0, 2), 4, 1) == {0: text, 2: text}


def test_a_rank_that_cannot_reach_rank_0_says_where_it_looked() -> None:
    told = roll_call((1,), 2, 0.5)[1]
    assert told.startswith(f"MissingRanksError: rank 1 on {HERE} cannot reach rank 0 at 127.0.0.1:PORT within 0.5 s (")
    assert "check MASTER_ADDR" in told


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_a_request_to_stop_ends_the_wait_at_once(ranks: tuple[int, ...]) -> None:
    asked_at = time.monotonic() + 0.5
    told = roll_call(ranks, 3, 120, lambda: time.monotonic() > asked_at)
    assert set(told.values()) == {"GivenUpError: stopped before the job was joined"}
    assert time.monotonic() < asked_at + 20
