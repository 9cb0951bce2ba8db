"""What waiting does not mend, certificates and data of one server: told at once, and the other servers are used where there are any."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.teacher.client.links import TeacherLostError, TeacherRefusedError
from m2mkd_ds.teacher.client.remote import RemoteFeed
from m2mkd_ds.teacher.flight.client import FlightConnection
from m2mkd_ds.teacher.flight.security import ClientSecurity
from m2mkd_ds.teacher.flight.server import FlightTransport
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, LinkError
from tests.teacher.flight_tools import TOKEN, make_pki
from tests.teacher.town import PACE, Setting, Town, TownConnection, requests, run_out, teacher_config, wait_until

OpenFeed = Callable[..., RemoteFeed]
SHARD = "shard-000003.tar, sample 17: other bytes than were indexed"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[str], list[str]]]:
    """lines(level) -> messages of that level."""
    with caplog.at_level(logging.INFO, logger="m2mkd_ds"):
        yield lambda level: [record.getMessage() for record in caplog.records if record.levelname == level]


class Strangers(Town):
    """Servers whose certificates do not fit at the endpoints `strange`."""

    strange: tuple[str, ...] = ()

    def connect(self, endpoint: str) -> TownConnection:
        if endpoint in self.strange:
            raise LinkError("untrusted", f"{endpoint}: the server's certificate is refused: certificate has expired")
        return super().connect(endpoint)


def strangers(setting: Setting, *endpoints: str, strange: tuple[str, ...]) -> Strangers:
    town = Strangers(setting.producer, setting.prints, *endpoints)
    town.strange = strange
    return town


@pytest.mark.parametrize("policy", ["wait", "colocate"])
def test_a_certificate_that_does_not_fit_stops_the_run_at_once_where_there_is_no_other_server(
    setting: Setting, open_feed: OpenFeed, policy: str
) -> None:
    began = time.monotonic()
    config = teacher_config("a:1", "b:1", patience_s=60.0, on_teacher_loss=policy)
    feed = open_feed(strangers(setting, "a:1", "b:1", strange=("a:1", "b:1")), config, fallback=setting.colocated)
    with pytest.raises(TeacherRefusedError, match="teacher server [ab]:1: the server's certificate is refused: certificate has expired"):
        feed.batch(requests()[0])
    assert time.monotonic() - began < 3.0


class Network(Town):
    """Reached over Flight."""

    security = ClientSecurity()

    def connect(self, endpoint: str) -> FlightConnection:  # type: ignore[override]
        return FlightConnection(endpoint, self.security)


def test_a_real_server_of_another_authority_stops_the_run_within_seconds(setting: Setting, open_feed: OpenFeed, tmp_path: Path) -> None:
    ours, theirs = make_pki(tmp_path / "ours"), make_pki(tmp_path / "theirs")
    town = Network(setting.producer, setting.prints, "a:1")
    transport = FlightTransport(town.services["a:1"], "127.0.0.1:0", theirs.server())
    transport.start()
    try:
        for security, told in (
            (ours.client(), "the server's certificate is refused"),
            (ClientSecurity(theirs.ca, *ours.issue("other"), token=TOKEN), "the server refused this side's certificate"),
            (ClientSecurity(theirs.ca, token=TOKEN), "the server asks for a certificate"),
        ):
            town.security = security
            began = time.monotonic()
            with pytest.raises(TeacherRefusedError, match=f"teacher server {transport.endpoint}: {told}"):
                open_feed(town, teacher_config(transport.endpoint, patience_s=60.0)).batch(requests()[0])
            assert time.monotonic() - began < 5.0
        town.security = theirs.client()
        assert open_feed(town, teacher_config(transport.endpoint)).batch(requests()[0]).slot_ids_B.tolist() == list(requests()[0].slots)
    finally:
        transport.stop(0.0)


def test_with_another_server_the_one_whose_certificate_does_not_fit_is_named_once(
    setting: Setting, open_feed: OpenFeed, lines: Callable[[str], list[str]]
) -> None:
    pace = replace(PACE, refused_pause_s=0.02)
    town = strangers(setting, "a:1", "b:1", strange=("a:1",))
    feed = open_feed(town, teacher_config("a:1", "b:1", prefetch=1), pace=pace)
    expected = setting.expected()
    run_out(feed, expected)
    time.sleep(0.2)  # it is greeted again meanwhile
    errors = lines("ERROR")
    assert len(errors) == 1 and "a:1: the server's certificate is refused" in errors[0] and "the others go on" in errors[0]
    assert town.asked["a:1"] == 0


def test_a_server_that_is_refused_first_does_not_end_the_run_before_the_others_were_tried(
    setting: Setting, open_feed: OpenFeed
) -> None:
    town = strangers(setting, "a:1", strange=("a:1",))
    feed = open_feed(town, teacher_config("a:1", "b:1"))
    wait_until(lambda: bool(feed._answers._keeper.links["a:1"].refused))
    town.start("b:1")
    run_out(feed, setting.expected())


@pytest.mark.parametrize("code", ["bad_request", "unauthenticated"])
def test_a_server_that_refuses_requests_is_left_alone_while_another_answers(
    setting: Setting, open_feed: OpenFeed, lines: Callable[[str], list[str]], code: str
) -> None:
    town = setting.town("a:1", "b:1")

    def refuse(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if endpoint == "a:1":
            raise FeedError(code, "not from you")  # type: ignore[arg-type]
        return answer()

    town.fault = refuse
    feed = open_feed(town, teacher_config("a:1", "b:1", prefetch=1))
    wait_until(lambda: len(town.greeted) == 2)
    run_out(feed, setting.expected())
    errors = lines("ERROR")
    assert len(errors) == 1 and f"a:1 refuses ({code}): not from you" in errors[0]
    # The batch ahead may have been asked for before the first refusal was heard; after it, never again.
    assert 1 <= town.asked["a:1"] <= 2 < len(requests()) and town.asked["b:1"] == len(requests())


def test_threads_that_wait_for_earlier_batches_hear_of_the_refusal(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")

    def refuse(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if request.start == requests()[0].slots.start:
            time.sleep(0.2)  # the later ones are refused first
        raise FeedError("bad_request", "not from you")

    town.fault = refuse
    began = time.monotonic()
    with pytest.raises(TeacherRefusedError, match="a:1 refuses .bad_request.: not from you"):
        open_feed(town, teacher_config(prefetch=4, patience_s=60.0, deadline_s=10.0)).batch(requests()[0])
    assert time.monotonic() - began < 3.0


def unreadable(town: Town, bad: tuple[str, ...], *, as_answer: bool) -> Counter[tuple[str, int]]:
    """Servers at `bad` cannot read their data, and say so by an error or by an answer without images; how often each was asked for what."""
    asked: Counter[tuple[str, int]] = Counter()

    def fault(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        asked[endpoint, request.start] += 1
        if endpoint not in bad:
            return answer()
        if not as_answer:
            raise FeedError("data", SHARD)
        given = answer()
        return replace(given, head=replace(given.head, lost=SHARD))

    town.fault = fault
    return asked


@pytest.mark.parametrize("as_answer", [False, True])
def test_what_one_server_cannot_read_another_is_asked_for(
    setting: Setting, open_feed: OpenFeed, lines: Callable[[str], list[str]], as_answer: bool
) -> None:
    town = setting.town("a:1", "b:1")
    asked = unreadable(town, ("a:1",), as_answer=as_answer)
    feed = open_feed(town, teacher_config("a:1", "b:1", prefetch=1))
    wait_until(lambda: len(town.greeted) == 2)
    run_out(feed, setting.expected())
    assert max(asked.values()) == 1  # a damaged shard does not heal by asking again
    told = [line for line in lines("WARNING") if SHARD in line]
    assert len(told) == town.asked["a:1"] > 0 and all("teacher server a:1" in line for line in told)


def test_what_no_server_can_read_ends_the_run_at_once_naming_shard_and_servers(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1", "b:1")
    asked = unreadable(town, ("a:1", "b:1"), as_answer=False)
    feed = open_feed(town, teacher_config("a:1", "b:1", patience_s=60.0, prefetch=1))
    wait_until(lambda: len(town.greeted) == 2)
    began = time.monotonic()
    with pytest.raises(TeacherRefusedError, match=rf"teacher server a:1: .*{SHARD}.*teacher server b:1: .*{SHARD}|b:1: .*a:1: "):
        feed.batch(requests()[0])
    assert time.monotonic() - began < 3.0 and asked == {("a:1", 0): 1, ("b:1", 0): 1}


def test_a_batch_without_images_is_handed_on_with_the_servers_name(setting: Setting, open_feed: OpenFeed) -> None:
    """So that all ranks stop at the same step."""
    town = setting.town("a:1")
    unreadable(town, ("a:1",), as_answer=True)
    batch = open_feed(town, teacher_config(prefetch=1)).batch(requests()[0])
    assert batch.lost == f"teacher server a:1: {SHARD}"


def test_patience_for_a_server_that_is_away_ends_with_what_the_other_could_not_read(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    asked = unreadable(town, ("a:1",), as_answer=False)
    feed = open_feed(town, teacher_config("a:1", "b:1", patience_s=0.5, deadline_s=0.3, prefetch=1))
    began = time.monotonic()
    with pytest.raises(TeacherRefusedError, match=f"a:1: it cannot read its data: {SHARD}"):
        feed.batch(requests()[0])
    assert 0.4 < time.monotonic() - began < 3.0 and asked["a:1", 0] == 1


def test_a_trainer_that_waits_says_now_and_then_for_whom_and_how_long_still(
    setting: Setting, open_feed: OpenFeed, lines: Callable[[str], list[str]]
) -> None:
    town = setting.town()
    feed = open_feed(town, teacher_config("a:1", patience_s=1.0, deadline_s=0.5), pace=replace(PACE, told_s=0.3))
    with pytest.raises(TeacherLostError):
        feed.batch(requests()[0])
    told = [line for line in lines("WARNING") if line.startswith("still trying")]
    assert len(told) == 3 and told[0] == "still trying a:1: nobody listens; 1 s of patience left (teacher.patience_s)"
    assert told[2].endswith("; 0 s of patience left (teacher.patience_s)")


def test_both_sides_log_a_greeting_once(setting: Setting, open_feed: OpenFeed, lines: Callable[[str], list[str]]) -> None:
    town = setting.town("a:1")
    feed = open_feed(town, teacher_config(prefetch=1))
    instance = town.services["a:1"].instance[:8]
    run_out(feed, setting.expected())
    feed._answers._keeper.lost_link(link := feed._answers._keeper.links["a:1"], link.session, "cut")  # type: ignore[arg-type]
    wait_until(lambda: len(town.greeted) == 2 and link.session is not None)
    ours = [line for line in lines("INFO") if line.startswith("teacher server a:1: greeted")]
    theirs = [line for line in lines("INFO") if line.startswith(f"teacher server {instance}: greeted client")]
    assert len(ours) == len(theirs) == 1
    version = setting.prints["version.m2mkd_ds"]
    assert ours[0] == (
        f"teacher server a:1: greeted instance {instance} over calls in this process: payload hidden as fp32, m2mkd_ds {version} there, "
        "protocol 2"
    )
    assert theirs[0].endswith("of this process: rank 0 of 2, pairs [0, 1, 2], payload hidden as fp32")
