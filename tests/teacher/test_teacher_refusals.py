"""Servers that refuse a run, or that the run refuses: which refusal ends it, which is waited for, and what is told."""


from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.teacher.client.links import TeacherRefusedError
from m2mkd_ds.teacher.client.remote import RemoteFeed
from m2mkd_ds.teacher.protocol.wire import Answer, FeedError, GetBatch, Hello, Welcome
from tests.teacher.town import (
    Once,
    Setting,
    assert_same,
    requests,
    run_out,
    teacher_config,
    wait_until,
)

OpenFeed = Callable[..., RemoteFeed]


@pytest.mark.parametrize(
    ("refusal", "told"),
    [
        (FeedError("bad_request", "pairs: too many"), "a:1 refuses \\(bad_request\\): pairs: too many"),
        (FeedError("unauthenticated", "no token"), "a:1 refuses \\(unauthenticated\\): no token"),
        (FeedError("mismatch", "plan: another"), "a:1 refuses \\(mismatch\\): plan: another"),
        (FeedError("poisoned", "NaN", slots=(32, 33)), r"not finite for slots \[32, 33\]: NaN. This rank stops here"),
    ],
)  # fmt: skip
def test_a_refusal_that_asking_again_would_not_mend_stops_the_run_in_turn(
    setting: Setting, open_feed: OpenFeed, refusal: FeedError, told: str
) -> None:
    town = setting.town("a:1")

    def refuse(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if request.start == 32:  # step 2, micro-step 0 of rank 0
            raise refusal
        return answer()

    town.fault = refuse
    feed = open_feed(town, teacher_config(prefetch=2))
    run = list(zip(requests(), setting.expected(), strict=True))
    for request, batch in run[:4]:
        assert_same(feed.batch(request), batch)
    with pytest.raises(TeacherRefusedError, match=told):
        feed.batch(run[4][0])


def test_a_server_with_other_data_stops_the_run_before_a_batch(setting: Setting, open_feed: OpenFeed) -> None:
    other = Setting(replace(setting.config, seed=8), setting.index, setting.producer)
    feed = open_feed(other.town("a:1"), teacher_config())
    with pytest.raises(TeacherRefusedError, match="a:1 refuses .mismatch.: seed: the trainer has 7, the server has 8"):
        feed.batch(requests()[0])


def test_a_server_that_compares_nothing_is_found_out_by_its_welcome(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    service = town.services["a:1"]
    welcomed = service.hello
    service.hello = lambda hello: replace(welcomed(hello), fingerprints={**setting.prints, "seed": "8"})  # type: ignore[method-assign]
    feed = open_feed(town, teacher_config())
    with pytest.raises(TeacherRefusedError, match="seed: the trainer has 7, the server has 8"):
        feed.batch(requests()[0])


@pytest.mark.parametrize(("lost", "is_refused"), [("wait", False), ("colocate", True)])
def test_another_version_is_refused_only_where_the_trainer_may_come_to_make_images(
    setting: Setting, open_feed: OpenFeed, lost: str, is_refused: bool
) -> None:
    town = setting.town("a:1")
    service = town.services["a:1"]
    welcomed = service.hello
    other = {**setting.prints, "version.pillow": "1.0"}
    service.hello = lambda hello: replace(welcomed(hello), fingerprints=other)  # type: ignore[method-assign]
    feed = open_feed(town, teacher_config(on_teacher_loss=lost), fallback=setting.colocated)
    if is_refused:
        with pytest.raises(TeacherRefusedError, match="version.pillow: the trainer has .*, the server has 1.0"):
            feed.batch(requests()[0])
    else:
        assert feed.batch(requests()[0]).slot_ids_B.tolist() == list(requests()[0].slots)


def test_a_golden_mismatch_stops_the_run_before_a_batch(setting: Setting, open_feed: OpenFeed) -> None:
    def differs(connection: object, welcome: object) -> None:
        raise RuntimeError("module.1 differs by 0.5")

    feed = open_feed(setting.town("a:1"), teacher_config(), golden=differs)
    with pytest.raises(RuntimeError, match="module.1 differs by 0.5"):
        feed.batch(requests()[0])


@pytest.mark.parametrize("fault", ["other data", "other outputs", "no token"])
def test_a_newcomer_that_cannot_serve_the_run_is_left_alone_while_others_serve_it(
    setting: Setting, open_feed: OpenFeed, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    town, listed = setting.town("a:1", "b:1"), tmp_path / "servers"
    newcomer = town.services["b:1"]
    welcomed = newcomer.hello

    def hello(hello: Hello) -> Welcome:
        if fault == "no token":
            raise FeedError("unauthenticated", "wrong token")
        return replace(welcomed(hello), fingerprints={**setting.prints, "seed": "8"} if fault == "other data" else setting.prints)

    def golden(connection: object, welcome: Welcome) -> None:
        if welcome.instance == newcomer.instance:
            raise RuntimeError("module.1 differs by 0.5")

    newcomer.hello = hello  # type: ignore[method-assign]
    listed.write_text("a:1\n")
    feed = open_feed(town, teacher_config(f"file:{listed}", prefetch=1), golden=golden)
    run = list(zip(requests(), setting.expected(), strict=True))
    assert_same(feed.batch(run[0][0]), run[0][1])
    listed.write_text("a:1\nb:1\n")
    told = {
        "other data": "seed: the trainer has 7, the server has 8", "other outputs": "module.1 differs by 0.5", "no token": "wrong token",
    }[fault]  # fmt: skip
    wait_until(lambda: told in feed._answers._keeper.describe())
    run_out(feed, setting.expected(), first=1)
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and told in errors[0] and "b:1" in errors[0]
    assert town.greeted.count("b:1") == 1 and town.asked["b:1"] == 0


def test_the_last_server_that_could_serve_the_run_ends_it_by_its_refusal(setting: Setting, open_feed: OpenFeed, tmp_path: Path) -> None:
    """Both serve at first, so neither refusal alone is the end."""
    town = setting.town("a:1", "b:1")

    def refuse(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        if request.start >= 32:
            raise FeedError("mismatch", f"plan: {endpoint} has another")
        return answer()

    town.fault = refuse
    feed = open_feed(town, teacher_config("a:1", "b:1", prefetch=1))
    wait_until(lambda: all(link.session for link in feed._answers._keeper.links.values()))
    run = list(zip(requests(), setting.expected(), strict=True))
    for request, batch in run[:4]:
        assert_same(feed.batch(request), batch)
    with pytest.raises(TeacherRefusedError, match="refuses .mismatch.: plan: [ab]:1 has another"):
        feed.batch(run[4][0])
    assert town.asked["a:1"] and town.asked["b:1"]


def test_a_host_that_has_to_wait_for_its_wrong_tokens_is_greeted_again_then(setting: Setting, open_feed: OpenFeed) -> None:
    """They may be another job's, on the same host."""
    town, limited, times = setting.town("a:1"), Once(), list[float]()
    welcomed = town.services["a:1"].hello

    def hello(hello: Hello) -> Welcome:
        times.append(time.monotonic())
        if limited("once"):
            raise FeedError("unauthenticated", "10 calls with a wrong token came from here: wait", retry_after_s=0.15)
        return welcomed(hello)

    town.services["a:1"].hello = hello  # type: ignore[method-assign]
    run_out(open_feed(town, teacher_config(prefetch=1)), setting.expected())
    assert len(times) == 2 and times[1] - times[0] >= 0.15
