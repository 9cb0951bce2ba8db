"""The first words with one teacher server: connect, Hello, compare, and golden outputs where the process there is new to us.

What a refusal means for the run is keeper.py's matter; here it only gets its sentence.
"""

from __future__ import annotations

from collections.abc import Callable

from m2mkd_ds.logs import logger
from m2mkd_ds.teacher.client.links import Link, Session, TeacherRefusedError
from m2mkd_ds.teacher.protocol.connection import Connection
from m2mkd_ds.teacher.protocol.handshake import check_welcome
from m2mkd_ds.teacher.protocol.wire import FeedError, Hello, Welcome

Greeting = Callable[[Connection, Welcome], None]
"""Compares golden outputs of a server that was just greeted; raises RuntimeError where they differ."""


class Greeter:
    """Greets servers with `hello`. Safe from several threads."""

    def __init__(
        self, hello: Hello, connect: Callable[[str], Connection], golden: Greeting | None, *, deadline_s: float, may_decode: bool
    ) -> None:
        """`may_decode`: this trainer may come to make images itself, so its decoder's version must be the servers'."""
        self._hello, self._connect, self._golden = hello, connect, golden
        self._deadline_s, self._decodes = deadline_s, may_decode or hello.payload == "logits"
        self._proven: set[str] = set()
        """Instances whose golden outputs were right."""

    def greet(self, link: Link, opened: Callable[[Connection], None]) -> Session:
        """A session with the server of `link`. `opened` is given the connection before anything is said on it.

        Raises FeedError for the server's refusal, LinkError, TeacherRefusedError and what `golden` raises for one that cannot serve the
        run. The connection is closed where it raises.
        """
        connection = self._connect(link.endpoint)
        try:
            opened(connection)
            welcome = connection.hello(self._hello, self._deadline_s)
            self._check_welcome(link, welcome)
            is_new = welcome.instance not in self._proven
            if self._golden is not None and is_new:
                self._golden(connection, welcome)
        except BaseException:
            connection.close()
            raise
        self._proven.add(welcome.instance)
        if is_new:
            logger.info(
                "teacher server %s: greeted instance %s over %s: payload %s as %s, m2mkd_ds %s there, protocol %d", link.endpoint,
                welcome.instance[:8], connection.carrier, self._hello.payload, self._hello.wire_dtype,
                welcome.fingerprints.get("version.m2mkd_ds", "of unknown version"), welcome.protocol,
            )  # fmt: skip
        return Session(connection, welcome)

    def _check_welcome(self, link: Link, welcome: Welcome) -> None:
        """Whether the server serves this stream: it has compared, but an odd one may have compared less."""
        instance, sentence = link.contradicted
        if welcome.instance == instance:
            raise refusal(link.endpoint, FeedError("mismatch", sentence))
        if not self._hello.oldest_protocol <= welcome.protocol <= self._hello.newest_protocol:
            raise refusal(link.endpoint, FeedError("mismatch", f"protocol: it chose {welcome.protocol}, which this trainer does not speak"))
        try:
            differences = check_welcome(welcome, self._hello.fingerprints, decodes=self._decodes)
        except FeedError as err:
            raise refusal(link.endpoint, err) from None
        for sentence in differences:
            logger.warning("teacher server %s: %s; images may differ by rounding", link.endpoint, sentence)


def named(endpoint: str, why: str) -> str:
    """`why` with the endpoint in front, once."""
    return why if why.startswith(endpoint) else f"{endpoint}: {why}"


def asks_to_wait(err: FeedError) -> bool:
    """Whether the same request may be granted later. A host that showed wrong tokens, perhaps another job on it, has to wait as well."""
    return err.code == "retry_later" or (err.code == "unauthenticated" and err.retry_after_s > 0)


def refusal(endpoint: str, err: FeedError) -> TeacherRefusedError:
    """The error that ends the run, with the server's sentence."""
    if err.code == "poisoned":
        return TeacherRefusedError(
            f"teacher server {endpoint}: its output is not finite for slots {list(err.slots[:16])}{'...' if len(err.slots) > 16 else ''}: "
            f"{err}. This rank stops here, and the launcher ends the others; look at the teacher's weights and precision"
        )
    return TeacherRefusedError(f"teacher server {endpoint} refuses ({err.code}): {err}")
