"""Keeps the links to all teacher servers of a stream: greets them, sends heartbeats, follows the list of endpoints.

One thread looks who is due, and each server is greeted or asked in a short-lived thread of its own, so that one that hangs delays
nobody else.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Iterable
from math import inf

from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.client.endpoints import EndpointList
from m2mkd_ds.teacher.client.greet import Greeter, Greeting, asks_to_wait, named, refusal
from m2mkd_ds.teacher.client.links import Link, Pace, Session, StoppedError, TeacherRefusedError
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.wire import FeedError, Hello, LinkError


class Keeper:
    """Links to the servers of `endpoints`, greeted with `hello`."""

    def __init__(
        self,
        endpoints: EndpointList,
        hello: Hello,
        connect: Callable[[str], Connection],
        golden: Greeting | None,
        *,
        deadline_s: float,
        pace: Pace,
        may_decode: bool = False,
    ) -> None:
        """`may_decode`: this trainer may come to make images itself, so its decoder's version must be the servers'."""
        self._endpoints, self._deadline_s, self._pace = endpoints, deadline_s, pace
        self._greeter = Greeter(hello, connect, golden, deadline_s=deadline_s, may_decode=may_decode)
        self.changed = threading.Condition()
        """Guards all that follows, and the fields of links; told of every change."""
        self.links = {endpoint: Link(endpoint) for endpoint in endpoints.current}
        self.fatal: BaseException | None = None
        """What must stop the run, whoever met it."""
        self.stopping = False
        self._opening: set[Connection] = set()
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        """Also those that no link has any more and that end their last calls."""
        self._tending: set[threading.Thread] = set()
        self._thread = threading.Thread(target=self._tend, name="teacher-keeper", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Let whoever waits look again at who waits for what."""
        with self.changed:
            self.changed.notify_all()

    def all_gone(self) -> bool:
        """Whether the last greeting of every server failed, or it drains. `changed` must be held."""
        return all(link.gone for link in self.links.values())

    def describe(self) -> str:
        """Every server and what went wrong with it last."""
        with self.changed:
            told = {link.endpoint: link.gone or link.trouble or "no answer yet" for link in self.links.values()}
        return "; ".join(named(endpoint, why) for endpoint, why in told.items())

    def stop(self) -> None:
        """End all calls under way; whoever fetches gets StoppedError."""
        with self.changed:
            self.stopping = True
            sessions = list(self._sessions)
            opening = list(self._opening)
            self.changed.notify_all()
        for session in sessions:
            session.close()
        for connection in opening:
            connection.close()

    def join(self, timeout_s: float) -> int:
        """Wait for the threads after `stop`; how many are still there."""
        until = time.monotonic() + timeout_s
        with self.changed:
            threads = [self._thread, *self._tending]
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
        return sum(thread.is_alive() for thread in threads)

    def lost_link(self, link: Link, session: Session, why: str) -> None:
        """The connection is of no use any more; a thread makes a new one after a pause."""
        with self.changed:
            if link.session is session:  # else another thread was first to notice
                link.session, link.trouble = None, why
                link.failures += 1
                link.pause(self._pace)
                if not self.stopping:
                    logger.warning("teacher server %s; connecting again", named(link.endpoint, why))
                self.changed.notify_all()
        session.retire()

    def drained(self, link: Link, session: Session | None, others: Iterable[str]) -> None:
        """It answers what it has taken on, and nothing else: the others are asked, also those that it names."""
        with self.changed:
            if link.session is session:
                if not link.is_draining:
                    logger.warning("teacher server %s: it is about to stop; asking the others", link.endpoint)
                link.session, link.gone, link.is_draining = None, "it is about to stop", True
                link.not_before = time.monotonic() + self._pace.drained_pause_s
            for endpoint in others:
                if endpoint in self.links:
                    continue
                try:
                    self._endpoints.check_named(endpoint)
                except ValueError as err:
                    logger.warning("teacher server %s names another that cannot be asked: %s", link.endpoint, err)
                else:
                    self.links[endpoint] = Link(endpoint)
            self.changed.notify_all()
        if session is not None:
            session.retire()

    def _tend(self) -> None:
        """The keeper's thread: follow the list, and start a thread for every server that is due."""
        look_at = time.monotonic() + self._pace.poll_s if self._endpoints.is_watched else inf
        try:
            while True:
                with self.changed:
                    if self.stopping:
                        return
                    now = time.monotonic()
                    for link in [link for link in self.links.values() if link.due_at <= now and not link.is_tended]:
                        self._start_care(link)
                    due_at = min([look_at, *(link.due_at for link in self.links.values() if not link.is_tended)])
                    self.changed.wait(None if due_at == inf else max(0.0, due_at - time.monotonic()))
                if time.monotonic() >= look_at:
                    self._follow_list()
                    look_at = time.monotonic() + self._pace.poll_s
        except BaseException as err:  # noqa: BLE001  # raised again by whoever fetches
            self._fail(err)

    def _start_care(self, link: Link) -> None:
        link.is_tended = True
        thread = threading.Thread(target=self._care, args=(link,), name=f"teacher-care-{link.endpoint}", daemon=True)
        self._tending.add(thread)
        thread.start()

    def _fail(self, err: BaseException) -> None:
        with self.changed:
            self.fatal = self.fatal or err
            self.changed.notify_all()

    def _follow_list(self) -> None:
        """Servers that joined get a link, those that left no further request."""
        if not self._endpoints.refresh():
            return
        with self.changed:
            current = self._endpoints.current
            left = [link.session for endpoint, link in self.links.items() if endpoint not in current and link.session]
            self.links = {endpoint: self.links.get(endpoint) or Link(endpoint) for endpoint in current}
            logger.info("teacher servers now: %s", ", ".join(current))
            self.changed.notify_all()
        for session in left:
            session.retire()

    def _care(self, link: Link) -> None:
        """Greet a server, or send it a heartbeat."""
        try:
            session = link.session
            if session is None:
                try:
                    self._greet(link)
                except StoppedError:
                    raise
                except RuntimeError as err:
                    self._set_aside(link, err)
            else:
                self._beat(link, session)
        except StoppedError:
            pass
        except BaseException as err:  # noqa: BLE001  # raised again by whoever fetches
            self._fail(err)
        finally:
            with self.changed:
                link.is_tended = False
                self._tending.discard(threading.current_thread())
                self.changed.notify_all()

    def _greet(self, link: Link) -> None:
        """Greet it, and let the others ask. Raises RuntimeError of a server that cannot serve the run."""
        opened: list[Connection] = []

        def note(connection: Connection) -> None:
            opened.append(connection)
            with self.changed:
                self._opening.add(connection)
                if self.stopping:
                    raise StoppedError("the feed was closed")

        try:
            self._greeted(link, self._greeter.greet(link, note))
        except FeedError as err:
            self._not_greeted(link, err)
        except LinkError as err:
            if err.fault == "untrusted":
                raise TeacherRefusedError(f"teacher server {err}") from err
            with self.changed:
                if not link.failures:
                    logger.warning("teacher server %s", named(link.endpoint, str(err)))
                link.failures += 1
                link.gone, link.refused = str(err), ""
                link.pause(self._pace)
        finally:
            with self.changed:
                self._opening.difference_update(opened)

    def refuse(self, link: Link, session: Session, err: RuntimeError) -> None:
        """A server that cannot answer what is asked is left alone for long. Raises `err` where no other may serve the run."""
        session.retire()
        with self.changed:
            if link.session is not session:
                return  # another thread was first to notice
            link.session = None
        self._set_aside(link, err)

    def _set_aside(self, link: Link, err: RuntimeError) -> None:
        """Leave a server alone that cannot serve the run. Raises `err` where every other one is refused as well, or there is none."""
        with self.changed:
            link.refused, link.gone = str(err), str(err)
            link.not_before = time.monotonic() + self._pace.refused_pause_s
            is_listed = self.links.get(link.endpoint) is link
            if is_listed and all(other.refused for other in self.links.values()):
                self._fail(err)  # for the other threads that fetch
                raise err
            is_news, link.told = link.told != str(err), str(err)
            self.changed.notify_all()
        if is_news:
            why = named(link.endpoint, str(err))
            logger.error("teacher server %s; it is not asked, the others go on: correct it or take it off the list", why)

    def _greeted(self, link: Link, session: Session) -> None:
        with self.changed:
            self._opening.discard(session.connection)
            self._sessions.add(session)
            if self.stopping or self.links.get(link.endpoint) is not link:
                session.close()
                return
            if link.gone or link.failures:
                logger.warning("teacher server %s: it answers again", link.endpoint)
            link.session, link.gone, link.is_draining, link.not_before, link.contradicted = session, "", False, 0.0, ("", "")
            link.refused = ""

    def _not_greeted(self, link: Link, err: FeedError) -> None:
        """A refusal of Hello or Golden. Raises TeacherRefusedError where trying again would not help."""
        if err.code == "draining":
            self.drained(link, None, err.endpoints)
        elif err.code == "internal" or asks_to_wait(err):
            with self.changed:
                link.failures += err.code == "internal"
                link.gone = str(err) if err.code == "internal" else ""
                link.trouble = str(err)
                link.pause(self._pace, max(err.retry_after_s, self._pace.first_pause_s))
        else:
            raise refusal(link.endpoint, err)

    def _beat(self, link: Link, session: Session) -> None:
        """Ask an idle server how it is; one that misses a few is as good as dead, and calls that wait for it end."""
        heartbeat_s = session.welcome.limits.heartbeat_s
        session.due_at = time.monotonic() + heartbeat_s
        try:
            status = session.connection.status(min(heartbeat_s, self._deadline_s))
        except FeedError:
            session.heard()  # it refuses, so it lives
        except LinkError as err:
            session.misses += 1
            if session.misses >= self._pace.misses:
                self.lost_link(link, session, f"{session.misses} heartbeats without an answer ({err})")
                session.close()
        else:
            session.heard()
            if status.draining:
                self.drained(link, session, status.endpoints)
            elif status.instance != session.welcome.instance:
                self.lost_link(link, session, "it was started anew")
