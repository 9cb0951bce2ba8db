"""All teacher servers of a stream as one: whoever is alive answers, and which one it was changes nothing but the time.

Only servers that were greeted (keeper.py) are asked, so a host that hangs costs the trainer no time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import NoReturn, Protocol

from m2mkd_ds.config import TeacherConfig
from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.client.endpoints import by_preference
from m2mkd_ds.teacher.client.greet import asks_to_wait, named, refusal
from m2mkd_ds.teacher.client.keeper import Keeper
from m2mkd_ds.teacher.client.links import Counts, Link, Pace, Session, StoppedError, TeacherLostError, TeacherRefusedError
from m2mkd_ds.teacher.protocol.codec import TensorSpec
from m2mkd_ds.teacher.protocol.wire import Answer, AnswerHead, FeedError, GetBatch, Hello, LinkError

Receive = Callable[[Answer, GetBatch], Answer]
"""Checks an answer's tensors; raises LinkError(corrupt)."""
Expect = Callable[[AnswerHead, Sequence[TensorSpec], GetBatch], None]
"""Checks what an answer's head announces, before there is memory for it; raises LinkError(corrupt)."""


class Wanted(Protocol):
    """What is fetched: `needed_at` says since when the trainer stands still for it."""

    needed_at: float | None


class _MissedError(Exception):
    """This try gave nothing; another may."""


class _UnreadError(Exception):
    """The server cannot read the images of this micro-batch; another one may."""


@dataclass
class _Unread:
    """Who could not read the images of one micro-batch."""

    told: dict[str, str] = field(default_factory=dict)
    """By endpoint, why."""
    answer: Answer | None = None
    """One that says so instead of images."""

    def add(self, endpoint: str, why: str, answer: Answer | None = None) -> None:
        self.told[endpoint] = why
        self.answer = answer or self.answer
        logger.warning("teacher server %s; others are asked, where there are any", named(endpoint, why))

    def outcome(self) -> Answer:
        """What the trainer gets once nobody is left to ask: an answer without images, which stops all ranks at one step, or an error."""
        sentence = "; ".join(f"teacher server {named(endpoint, why)}" for endpoint, why in self.told.items())
        if self.answer is not None:
            return replace(self.answer, head=replace(self.answer.head, lost=sentence))
        raise TeacherRefusedError(f"{sentence}. Check the server's shards with `m2mkd shards verify`")


class Servers:
    """Answers for the stream that `hello` describes, from the servers that `keeper` keeps. Several threads may fetch."""

    def __init__(
        self, keeper: Keeper, hello: Hello, config: TeacherConfig, expect: Expect, receive: Receive, counts: Counts, pace: Pace
    ) -> None:
        self._keeper, self._hello, self._config = keeper, hello, config
        self._expect, self._receive, self._counts, self._pace = expect, receive, counts, pace
        self._told_at = 0.0
        """When it was last said that the trainer waits."""

    def fetch(self, start: int, wanted: Wanted) -> Answer:
        """The micro-batch at position `start`, whole and checked; without images (`lost`) where no server can read them.

        Raises TeacherLostError as `on_teacher_loss` and `patience_s` say, TeacherRefusedError, StoppedError. Patience begins when the
        trainer needs the micro-batch: a server that is away while nobody waits costs nothing.
        """
        attempt, first, unread = 0, None, _Unread()
        while True:
            chosen = self._choose(start, wanted, unread.told)
            if chosen is None:
                return unread.outcome()
            link, session = chosen
            asked = (link.endpoint, session.welcome.instance)
            first = first or asked
            try:
                answer = self._ask(link, session, start, attempt, wanted)
                if answer.head.lost:
                    unread.add(link.endpoint, answer.head.lost, answer)
                    continue
            except _UnreadError as err:
                unread.add(link.endpoint, str(err))
                continue
            except _MissedError as missed:
                attempt += 1
                self._counts.add("retries")
                with self._keeper.changed:
                    link.trouble = str(missed)
                    self._keeper.changed.notify_all()
                continue
            if asked != first:
                self._counts.add("failovers")
            with self._keeper.changed:
                link.failures = link.spoiled = 0
            return answer

    def _choose(self, start: int, wanted: Wanted, without: Collection[str]) -> tuple[Link, Session] | None:
        """The server that comes first for this micro-batch among those that may be asked now; waits for one.

        None: all that are left are among `without`, or patience for the others has ended.
        """
        # Every job of the same layout asks the same server for the same micro-batch, so decoding is shared in its cache.
        key = start // self._hello.layout.micro_batch_size
        with self._keeper.changed:
            while True:
                now = time.monotonic()
                left_s = self._left_s(wanted)
                if self._keeper.stopping:
                    raise StoppedError("the feed was closed")
                if self._keeper.fatal is not None:
                    raise self._keeper.fatal
                if without and (left_s <= 0 or all(link.refused or e in without for e, link in self._keeper.links.items())):
                    return None
                if left_s <= 0:
                    self._lose(start, f"none did within teacher.patience_s={self._config.patience_s:g}")
                if wanted.needed_at is not None and self._config.on_teacher_loss != "wait" and self._keeper.all_gone():
                    self._lose(start, "each was tried")
                able = {e: link for e, link in self._keeper.links.items() if link.session is not None and e not in without}
                ready = [e for e, link in able.items() if link.not_before <= now]
                for endpoint in by_preference(ready, key)[:1]:
                    link = self._keeper.links[endpoint]
                    assert link.session is not None
                    return link, link.session
                timeout_s = min([left_s, self._tell(wanted, now, left_s), *(link.not_before - now for link in able.values())])
                self._keeper.changed.wait(None if timeout_s == inf else timeout_s)

    def _tell(self, wanted: Wanted, now: float, left_s: float) -> float:
        """Say now and then that the trainer stands still, and for whom; seconds until the next time. `Keeper.changed` must be held."""
        if wanted.needed_at is None:
            return inf
        due_at = max(wanted.needed_at, self._told_at) + self._pace.told_s
        if now >= due_at:
            trying = [named(e, link.gone or link.trouble or "no answer yet") for e, link in self._keeper.links.items() if not link.refused]
            logger.warning("still trying %s; %.0f s of patience left (teacher.patience_s)", "; ".join(trying), left_s)
            self._told_at, due_at = now, now + self._pace.told_s
        return due_at - now

    def _left_s(self, wanted: Wanted) -> float:
        return inf if wanted.needed_at is None else wanted.needed_at + self._config.patience_s - time.monotonic()

    def _lose(self, start: int, why: str) -> NoReturn:
        raise TeacherLostError(
            f"no teacher server gave the micro-batch at stream position {start}: {why} "
            f"(teacher.on_teacher_loss={self._config.on_teacher_loss}). {self._keeper.describe()}"
        )

    def _ask(self, link: Link, session: Session, start: int, attempt: int, wanted: Wanted) -> Answer:
        """One try. Raises _MissedError where another may help."""
        hello, welcome = self._hello, session.welcome
        request = GetBatch(
            instance=welcome.instance, plan=welcome.plan, client=hello.client, layout=hello.layout, start=start, pairs=hello.pairs,
            payload=hello.payload, wire_dtype=hello.wire_dtype, with_teacher=hello.with_teacher, attempt=attempt,
        )  # fmt: skip
        fault = "corrupt"

        def accept(head: AnswerHead, specs: Sequence[TensorSpec]) -> None:
            nonlocal fault
            if not head.answers(request):
                fault = "duplicates"
                told = f"it gave position {head.start}, attempt {head.attempt}, for {start}, attempt {attempt}"
                raise LinkError("corrupt", told)
            self._expect(head, specs, request)

        try:
            answer = session.get(request, max(0.01, min(self._config.deadline_s, self._left_s(wanted))), accept)
            self._counts.add("bytes_in", answer.num_bytes)
            return self._receive(answer, request)
        except FeedError as err:
            raise self._refused(link, session, err) from err
        except LinkError as err:
            if err.fault == "corrupt":
                self._counts.add(fault)
                raise self._spoiled(link, session, str(err)) from err
            self._keeper.lost_link(link, session, str(err))
            raise _MissedError(str(err)) from err

    def _spoiled(self, link: Link, session: Session, why: str) -> _MissedError:
        """A damaged or wrong answer: asked again at once, on a new connection after a few."""
        with self._keeper.changed:
            link.spoiled += 1
            is_broken = link.spoiled >= self._pace.spoiled
            if is_broken:
                link.spoiled = 0
        logger.warning("teacher server %s; this answer was dropped", named(link.endpoint, why))
        if is_broken:
            self._keeper.lost_link(link, session, why)
        return _MissedError(why)

    def _refused(self, link: Link, session: Session, err: FeedError) -> _MissedError:
        """A server's refusal of a request: _MissedError where another try may help. Raises _UnreadError, TeacherRefusedError."""
        if err.code == "mismatch":
            # Perhaps a restarted server that was never greeted; greeting it tells.
            with self._keeper.changed:
                if link.session is session:
                    link.session, link.not_before = None, 0.0
                    link.contradicted = (session.welcome.instance, str(err))
                    self._keeper.changed.notify_all()
            session.retire()
        elif err.code == "draining":
            self._keeper.drained(link, session, err.endpoints)
        elif asks_to_wait(err):
            with self._keeper.changed:
                link.pause(self._pace, max(err.retry_after_s, self._pace.first_pause_s / 4))
        elif err.code == "internal":
            with self._keeper.changed:
                link.failures += 1
                link.pause(self._pace)
            logger.warning("teacher server %s: an error of its own: %s", link.endpoint, err)
        elif err.code == "data":
            raise _UnreadError(f"it cannot read its data: {err}")
        elif err.code in ("unauthenticated", "bad_request"):
            self._keeper.refuse(link, session, refusal(link.endpoint, err))
        else:
            raise refusal(link.endpoint, err)
        return _MissedError(str(err))
