"""Servers die, hang, lie, drain, join and leave: every slot is trained on once, in order, with the bytes of an undisturbed run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2mkd_ds.teacher.client.links import TeacherLostError
from m2mkd_ds.teacher.client.remote import RemoteFeed
from m2mkd_ds.teacher.protocol import codec
from m2mkd_ds.teacher.protocol.wire import Answer, ErrorCode, FeedError, GetBatch, LinkError
from tests.teacher.conftest import LIMITS
from tests.teacher.town import (
    PACE,
    Once,
    Setting,
    assert_same,
    requests,
    run_out,
    teacher_config,
    wait_until,
)

OpenFeed = Callable[..., RemoteFeed]


@pytest.mark.parametrize("sticky", [False, True])
def test_a_server_that_is_replaced_by_a_new_one_is_greeted_again(setting: Setting, open_feed: OpenFeed, sticky: bool) -> None:
    town = setting.town("a:1")
    town.is_sticky = sticky
    proven = []
    first = town.services["a:1"].instance

    def replaced(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        got = answer()
        if request.start >= 40 and town.services["a:1"].instance == first:
            town.start("a:1")
        return got

    town.fault = replaced
    feed = open_feed(town, teacher_config(), golden=lambda connection, welcome: proven.append(welcome.instance))
    run_out(feed, setting.expected())
    assert proven == [first, town.services["a:1"].instance] and first != town.services["a:1"].instance
    assert feed.metrics()["teacher/failovers"] >= 1


def test_a_killed_server_is_waited_for(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    feed = open_feed(town, teacher_config())
    for request, batch in list(zip(requests(), setting.expected(), strict=True))[:4]:
        assert_same(feed.batch(request), batch)
    town.kill("a:1")
    threading.Timer(0.15, town.start, ["a:1"]).start()
    run_out(feed, setting.expected(), first=4)
    assert town.greeted == ["a:1", "a:1"]


def test_a_slow_server_is_waited_for_and_counted(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")

    def slow(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        time.sleep(0.03)
        return answer()

    town.fault = slow
    feed = open_feed(town, teacher_config(prefetch=1))
    run_out(feed, setting.expected())
    told = feed.metrics()
    # 10 micro-batches of 5 steps, one asked for at a time: each step waits, 30 ms and more a micro-batch.
    assert told["teacher/starved_steps"] == 5 and told["teacher/wait_s"] > 0.2 and told["teacher/retries"] == 0
    assert feed.metrics()["teacher/wait_s"] == 0  # counted since the last call


def test_an_answer_past_its_deadline_is_asked_for_elsewhere_and_dropped_when_it_comes(setting: Setting, open_feed: OpenFeed) -> None:
    """A frozen server: calls end by their deadline, and afterwards its connection gives what the abandoned calls had asked for."""
    town = setting.town("a:1", "b:1")
    frozen, late, fell = Once(), list[Answer](), threading.Lock()

    def freeze(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        with fell:
            if endpoint == "a:1" and frozen(request.start) and len(late) < 2 and request.attempt == 0:
                late.append(answer())
                raise LinkError("deadline", "a:1: no answer in time")
            if late and endpoint == "a:1":
                return late.pop()
        return answer()

    town.fault = freeze
    feed = open_feed(town, teacher_config("a:1", "b:1"))
    run_out(feed, setting.expected())
    told = feed.metrics()
    assert told["teacher/retries"] >= 2 and town.asked["b:1"] > 0


def test_damaged_answers_are_counted_and_asked_for_again(setting: Setting, open_feed: OpenFeed) -> None:
    town, spoil = setting.town("a:1"), Once(2)

    def damaged(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        got = answer()
        if spoil(request.start):
            if request.attempt:
                raise LinkError("corrupt", "a checksum does not match")
            return Answer(got.head, {name: tensor for name, tensor in got.tensors.items() if name != "logits.1"})
        return got

    town.fault = damaged
    feed = open_feed(town, teacher_config())
    run_out(feed, setting.expected())
    told = feed.metrics()
    assert (told["teacher/corrupt"], told["teacher/retries"]) == (20, 20)  # twice for each of 10


def test_answers_to_other_questions_are_dropped_and_counted(setting: Setting, open_feed: OpenFeed) -> None:
    """Duplicates (the answer before, again), two swapped ones, and attempt 1 after attempt 2."""
    town, given, lie = setting.town("a:1"), list[Answer](), Once()

    def lying(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        got = answer()
        given.append(got)
        if not lie(request.start):
            return got
        kind = request.start // 4 % 3
        if kind == 0 and len(given) > 1:
            return given[-2]  # delivered before
        if kind == 1:
            return Answer(replace(got.head, start=got.head.start + 4), got.tensors)  # the neighbour's
        return Answer(replace(got.head, attempt=got.head.attempt + 1), got.tensors)  # of another attempt

    town.fault = lying
    feed = open_feed(town, teacher_config())
    run_out(feed, setting.expected())
    told = feed.metrics()
    assert told["teacher/duplicates"] == told["teacher/retries"] == 10 and told["teacher/corrupt"] == 0


def test_what_a_head_announces_is_judged_before_there_is_memory_for_it(
    setting: Setting, open_feed: OpenFeed, monkeypatch: pytest.MonkeyPatch
) -> None:
    town, huge, made = setting.town("a:1"), Once(), list[int]()
    make = codec.FrameReader._made

    def counted(self: codec.FrameReader, specs: Sequence[codec.TensorSpec]) -> dict[str, torch.Tensor]:
        made.append(max(spec.num_bytes for spec in specs))
        return make(self, specs)

    def swollen(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        got = answer()
        # Fewer bytes than were agreed at most, and nothing that was asked for.
        return Answer(got.head, got.tensors | {"extra": torch.zeros(2**19)}) if huge(request.start) else got

    monkeypatch.setattr(codec.FrameReader, "_made", counted)
    town.fault = swollen
    feed = open_feed(town, teacher_config())
    run_out(feed, setting.expected())
    assert feed.metrics()["teacher/corrupt"] == 10 and max(made) < 2**21


def test_a_draining_server_ends_what_it_has_and_the_one_that_it_names_goes_on(
    setting: Setting, open_feed: OpenFeed, caplog: pytest.LogCaptureFixture
) -> None:
    town = setting.town("a:2", "b:1")
    leaving = town.start("a:1", others=("b:1", "a:2", "not an endpoint"))
    feed = open_feed(town, teacher_config("a:1"))
    for request, batch in list(zip(requests(), setting.expected(), strict=True))[:3]:
        assert_same(feed.batch(request), batch)
    assert town.asked["a:2"] == 0
    leaving.drain()
    run_out(feed, setting.expected(), first=3)
    assert town.asked["a:2"] >= 3 and "b:1" not in town.greeted
    assert "a:1 names another that cannot be asked: b:1 is on a host that teacher.endpoints does not name" in caplog.text
    assert feed.metrics()["teacher/corrupt"] == 0


def test_servers_join_and_leave_during_an_epoch(
    setting: Setting, open_feed: OpenFeed, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = setting.expected(total_steps=30)
    town, listed = setting.town("a:1", "b:1", "c:1"), tmp_path / "servers"
    listed.write_text("a:1  # the first\n")
    feed = open_feed(town, teacher_config(f"file:{listed}", prefetch=1), total_steps=30)
    at = iter(zip(requests(total_steps=30), expected, strict=True))

    def advance(num: int) -> dict[str, int]:
        time.sleep(3 * PACE.poll_s)  # the list is read and whoever joined is greeted
        town.asked.clear()
        for _ in range(num):
            request, batch = next(at)
            assert_same(feed.batch(request), batch)
        return dict(town.asked)

    assert advance(10).keys() == {"a:1"}
    listed.write_text("a:1\nb:1\n\nc:1\n")
    shares = advance(30)
    # Rendezvous hashing deals 30 keys to 3 servers about evenly: none gets fewer than 3, none more than 20.
    assert shares.keys() == {"a:1", "b:1", "c:1"} and all(3 <= n <= 20 for n in shares.values())
    listed.write_text("a:1\nb:")
    assert advance(6).keys() - {"a:1", "b:1", "c:1"} == set() and "half written" in caplog.text
    listed.write_text("c:1\n")
    advance(3)
    assert advance(11).keys() == {"c:1"}


def test_all_jobs_ask_the_same_server_for_the_same_images(setting: Setting, open_feed: OpenFeed) -> None:
    town, asked = setting.town("a:1", "b:1", "c:1"), dict[int, set[str]]()

    def noted(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        asked.setdefault(request.start, set()).add(endpoint)
        return answer()

    town.fault = noted
    for num_jobs, pairs in enumerate(((0,), (1, 2)), start=1):
        feed = open_feed(town, teacher_config("a:1", "b:1", "c:1", prefetch=1), pairs=pairs)
        feed.batch(requests(pairs=pairs)[0])
        wait_until(lambda: len(town.greeted) == 3 * num_jobs)  # noqa: B023
        time.sleep(0.05)
        for request in requests(pairs=pairs)[1:]:
            feed.batch(request)
    # The first two were asked for before all servers were greeted, perhaps.
    assert [len(asked[r.slots.start]) for r in requests()[2:]] == [1] * 8


@pytest.mark.parametrize(
    ("policy", "tried"), [("wait", "none did within teacher.patience_s=0.3"), ("fail", "each was tried")]
)  # fmt: skip
def test_without_any_server_the_run_stops_with_the_cause(setting: Setting, open_feed: OpenFeed, policy: str, tried: str) -> None:
    town = setting.town("a:1", "b:1")
    feed = open_feed(town, teacher_config("a:1", "b:1", on_teacher_loss=policy, patience_s=0.3, deadline_s=0.2, prefetch=1))
    began = list(zip(requests(), setting.expected(), strict=True))
    for request, batch in began[:4]:
        assert_same(feed.batch(request), batch)
    town.kill("a:1"), town.kill("b:1")
    started = time.monotonic()
    with pytest.raises(TeacherLostError, match=rf"{tried}.*a:1: nobody listens; b:1: nobody listens"):
        for request, _ in began[4:]:
            feed.batch(request)
    assert time.monotonic() - started < 1.5
    if policy == "wait":
        assert time.monotonic() - started > 0.29


def test_a_server_that_is_away_while_nobody_waits_is_no_loss(setting: Setting, open_feed: OpenFeed) -> None:
    """With on_teacher_loss=fail; what was asked ahead when it went is asked for again when it is back."""
    town, gone = setting.town("a:1"), threading.Event()
    third = requests()[2].slots.start

    def cut(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if request.start == third and not gone.is_set():
            assert gone.wait(5)
            raise LinkError("closed", "a:1: the connection was closed")
        return answer()

    town.fault = cut
    feed = open_feed(town, teacher_config(patience_s=0.2, deadline_s=0.1, on_teacher_loss="fail"))
    wait_until(lambda: town.asked["a:1"] == 3 and feed._answers._prefetcher.num_under_way() == 1)
    town.kill("a:1")
    gone.set()
    wait_until(lambda: "nobody listens" in feed._answers._keeper.describe())
    run = list(zip(requests(), setting.expected(), strict=True))
    assert_same(feed.batch(run[0][0]), run[0][1])
    assert_same(feed.batch(run[1][0]), run[1][1])
    time.sleep(0.2)  # an evaluation, say
    town.start("a:1")
    wait_until(lambda: len(town.greeted) == 2 and town.asked["a:1"] > 3)
    run_out(feed, setting.expected(), first=2)


@pytest.mark.parametrize("stop_after", [0, 5])
def test_colocate_goes_on_with_the_same_bytes_in_the_middle_of_a_step(
    setting: Setting, open_feed: OpenFeed, caplog: pytest.LogCaptureFixture, stop_after: int
) -> None:
    town = setting.town("a:1")
    if not stop_after:
        town.kill("a:1")
    else:
        limit = requests()[stop_after].slots.start

        def dies(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
            if request.start >= limit:
                town.services.pop("a:1", None)
            return answer()

        town.fault = dies
    config = teacher_config(on_teacher_loss="colocate", prefetch=1)
    feed = open_feed(town, config, fallback=setting.colocated)
    run_out(feed, setting.expected())
    assert feed.is_colocated and feed.metrics()["teacher/colocated"] == 1
    moved = [record.getMessage() for record in caplog.records if "moves into this process" in record.getMessage()]
    assert len(moved) == 1 and f"at step {stop_after // 2} " in moved[0]


@pytest.mark.parametrize("code", ["retry_later", "unauthenticated"])
def test_a_busy_server_is_left_alone_as_long_as_it_asks(setting: Setting, open_feed: OpenFeed, code: ErrorCode) -> None:
    town, busy, times = setting.town("a:1"), Once(), list[float]()

    def refuse(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        times.append(time.monotonic())
        if busy("once"):
            raise FeedError(code, "too much at once", retry_after_s=0.15)
        return answer()

    town.fault = refuse
    feed = open_feed(town, teacher_config(prefetch=1))
    run_out(feed, setting.expected())
    assert times[1] - times[0] >= 0.15 and town.greeted == ["a:1"]


def test_an_idle_server_that_is_gone_is_found_by_heartbeats_before_it_is_asked(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1", "b:1", limits=replace(LIMITS, heartbeat_s=0.03))
    feed = open_feed(town, teacher_config("a:1", "b:1", prefetch=1))
    assert_same(feed.batch(requests()[0]), setting.expected()[0])
    wait_until(lambda: town.beats["a:1"] >= 1 and town.beats["b:1"] >= 1)
    town.kill("a:1")
    beats, town.asked["a:1"] = town.beats["a:1"], 0
    wait_until(lambda: town.beats["a:1"] >= beats + 3)
    # Three go without an answer; from then on it is greeted, in vain, and no longer asked how it is.
    time.sleep(0.1)
    assert town.beats["a:1"] <= beats + 4  # one may have been under way at the kill
    run_out(feed, setting.expected(), first=1)
    assert town.asked["a:1"] == 0


def test_a_frozen_server_with_a_request_under_way_is_given_up_by_heartbeats_before_the_deadline(
    setting: Setting, open_feed: OpenFeed
) -> None:
    town = setting.town("a:1", "b:1", limits=replace(LIMITS, heartbeat_s=0.02))
    over, begun = threading.Event(), time.monotonic()

    def hang(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if endpoint == "a:1" and request.start >= 16:
            while "a:1" in town.services and not over.is_set():
                over.wait(0.01)
            raise LinkError("closed", "a:1: the connection was closed")
        return answer()

    def deaf(endpoint: str) -> None:
        if endpoint == "a:1":
            raise LinkError("deadline", "a:1: no answer in time")

    class Closing(type(town.connect("a:1"))):  # type: ignore[misc]
        def close(self) -> None:
            super().close()
            if self.endpoint == "a:1":
                over.set()

    town.fault, town.status_fault = hang, deaf
    town.connect = lambda endpoint: Closing(town, endpoint)  # type: ignore[method-assign]
    feed = open_feed(town, teacher_config("a:1", "b:1", deadline_s=20.0, patience_s=30.0))
    run_out(feed, setting.expected())
    assert time.monotonic() - begun < 5


def test_pairs_at_different_speeds_do_not_block_each_other(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    slow = open_feed(town, teacher_config(prefetch=2), pairs=(2,))
    slow.batch(requests(pairs=(2,))[0])
    fast = open_feed(town, teacher_config(), pairs=(0, 1))
    for request, batch in zip(requests(pairs=(0, 1)), setting.expected(), strict=True):
        ours = fast.batch(request)
        wanted = {i: batch.hidden[i] for i in (0, 1)}
        assert_same(ours, replace(batch, hidden=wanted, teacher_logits={i: batch.teacher_logits[i] for i in (0, 1)}))
    for request, batch in list(zip(requests(pairs=(2,)), setting.expected(), strict=True))[1:]:
        only = replace(batch, hidden={2: batch.hidden[2]}, teacher_logits={2: batch.teacher_logits[2]})
        assert_same(slow.batch(request), only)
