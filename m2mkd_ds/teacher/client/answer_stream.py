"""Answers to a row of requests, asked ahead and handed out in order, from whichever server is alive.

    numbers -> prefetch.py (a free place is a credit) -> failover.py (which server, again or elsewhere) -> keeper.py (links)
"""

from __future__ import annotations

from collections.abc import Callable

from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.client.endpoints import EndpointList
from m2mkd_ds.teacher.client.failover import Expect, Receive, Servers
from m2mkd_ds.teacher.client.greet import Greeting
from m2mkd_ds.teacher.client.keeper import Keeper
from m2mkd_ds.teacher.client.links import Counts, Pace, TeacherLostError
from m2mkd_ds.teacher.client.prefetch import Place, Prefetcher
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import Answer, Hello


class AnswerStream:
    """Answers for every number of `numbers`; `start_of` gives the stream position that a number's micro-batch begins at.

    Servers are asked from the moment this is made; every greeting says `hello`. One consumer thread.
    """

    def __init__(
        self,
        hello: Hello,
        numbers: range,
        start_of: Callable[[int], int],
        config: TeacherConfig,
        connect: Callable[[str], Connection],
        golden: Greeting | None,
        expect: Expect,
        receive: Receive,
        pace: Pace,
    ) -> None:
        self._config, self._pace = config, pace
        self.counts = Counts()
        self._keeper = Keeper(
            EndpointList(config.endpoints, config.feed, is_encrypted=bool(config.tls_ca)), hello, connect, golden,
            deadline_s=config.deadline_s, pace=pace, may_decode=config.on_teacher_loss == "colocate",
        )  # fmt: skip
        servers = Servers(self._keeper, hello, config, expect, receive, self.counts, pace)

        def work(place: Place[Answer]) -> Answer:
            return servers.fetch(start_of(place.number), place)

        self._prefetcher = Prefetcher(numbers, work, depth=config.prefetch, name="teacher-fetch", on_need=self._keeper.wake)

    def take(self) -> tuple[Answer, float]:
        """The next answer, and the seconds that it was waited for. Raises TeacherLostError and TeacherRefusedError."""
        try:
            return self._prefetcher.take(self._config.patience_s + self._pace.close_s)
        except TimeoutError:
            raise TeacherLostError(f"a connection did not keep its deadline. {self._keeper.describe()}") from None

    def num_under_way(self) -> int:
        """Requests that are being answered now."""
        return self._prefetcher.num_under_way()

    def close(self) -> None:
        """End threads and connections, within `Pace.close_s`."""
        self._prefetcher.stop()
        self._keeper.stop()
        left = self._prefetcher.join(self._pace.close_s) + self._keeper.join(self._pace.close_s)
        if left:
            logger.warning("%d threads of the teacher feed still wait for a connection that does not end its calls", left)
