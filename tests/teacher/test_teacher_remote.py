"""The feed from servers that are well: the colocated feed's batches, in order, whatever travels; what it refuses; how it ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.bad_samples import BadSample
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.client.remote import LogitsFeed, RemoteFeed, other_images, wire_dtype
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.teacher.protocol.wire import Answer, GetBatch, LinkError
from tests.teacher.conftest import LIMITS
from tests.teacher.town import (
    LAYOUT,
    PACE,
    Setting,
    assert_same,
    make_setting,
    requests,
    run_out,
    teacher_config,
    wait_until,
)

OpenFeed = Callable[..., RemoteFeed]


@pytest.fixture(scope="module", params=["pil", "fast"])
def setting(request: pytest.FixtureRequest, tiny_config: RunConfig, tiny_index: ShardIndex) -> Setting:
    return make_setting(replace(tiny_config, data=replace(tiny_config.data, decode=request.param)), tiny_index)


@pytest.mark.parametrize("payload", ["hidden", "image"])
def test_batches_are_those_of_a_colocated_feed(setting: Setting, open_feed: OpenFeed, payload: str) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config(payload=payload))
    run_out(feed, setting.expected())
    with pytest.raises(RuntimeError, match="the stream of this teacher feed ends before step 5"):
        feed.batch(BatchRequest(5, 0, LAYOUT.positions(5, 0, 0), (0,), True))


def test_a_subset_of_pairs_and_no_logits_may_be_asked_for(setting: Setting, open_feed: OpenFeed) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config())
    for number, (request, batch) in enumerate(zip(requests(), setting.expected(), strict=True)):
        pairs = ((1,), (0, 2), (0, 1, 2))[number % 3]
        ours = feed.batch(replace(request, pairs=pairs, with_teacher=number % 2 == 0))
        logits = {i: batch.teacher_logits[i] for i in pairs} if number % 2 == 0 else {}
        assert_same(ours, replace(batch, hidden={i: batch.hidden[i] for i in pairs}, teacher_logits=logits))


def without_teachers(setting: Setting) -> object:
    """A colocated feed that cannot give logits."""
    feed = setting.colocated()
    feed._teachers = {}
    return feed


def test_logits_from_a_server_join_images_from_here(setting: Setting, open_feed: OpenFeed) -> None:
    # Images here and on the server in turn: both draw from this process's random numbers.
    town, turn = setting.town("a:1"), threading.Semaphore(0)

    def taken_in_turn(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        assert turn.acquire(timeout=5)
        return answer()

    town.fault = taken_in_turn
    feed = LogitsFeed(without_teachers(setting), open_feed(town, teacher_config(payload="logits", prefetch=1)))  # type: ignore[arg-type]
    for request, batch in zip(requests(), setting.expected(), strict=True):
        turn.release()
        assert_same(feed.batch(request), batch)
    # 10 micro-batches of 3 pairs x 4 images x 10 classes in fp32, and nothing else
    assert feed.metrics()["teacher/bytes_in"] == 10 * 3 * 4 * 10 * 4
    feed.close()


def test_logits_and_loader_move_in_together(setting: Setting, open_feed: OpenFeed) -> None:
    town, turn = setting.town("a:1"), threading.Semaphore(0)
    limit = requests()[3].slots.start

    def dies(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        assert turn.acquire(timeout=5)
        if request.start >= limit:
            town.kill("a:1")
            raise LinkError("closed", "a:1: the connection was closed")
        return answer()

    town.fault = dies
    images, closed = without_teachers(setting), list[int]()
    images.close = lambda: closed.append(1)  # type: ignore[attr-defined]
    config = teacher_config(payload="logits", prefetch=1, on_teacher_loss="colocate")
    feed = LogitsFeed(images, open_feed(town, config, fallback=setting.colocated))  # type: ignore[arg-type]
    for number, (request, batch) in enumerate(zip(requests(), setting.expected(), strict=True)):
        turn.release()
        assert_same(feed.batch(request), batch)
        assert bool(closed) == (number >= 3)


def test_a_request_that_is_not_the_next_one_is_refused(setting: Setting, open_feed: OpenFeed) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config())
    first, second = requests()[:2]
    with pytest.raises(RuntimeError, match=r"step 0, micro-step 1, slots range\(4, 8\) were asked for; next.* is step 0, micro-step 0"):
        feed.batch(second)
    with pytest.raises(RuntimeError, match=r"slots range\(8, 12\) were asked for"):
        feed.batch(replace(first, slots=range(8, 12)))
    with pytest.raises(RuntimeError, match=r"pairs \[3\] were asked for, and this feed was made for pairs \(0, 1, 2\)"):
        feed.batch(replace(first, pairs=(1, 3)))
    assert_same(feed.batch(first), setting.expected()[0])  # nothing was lost by it
    with pytest.raises(RuntimeError, match="step 0, micro-step 0, .*next in this feed is step 0, micro-step 1"):
        feed.batch(first)
    feed.close()
    with pytest.raises(RuntimeError, match="was closed"):
        feed.batch(second)


def test_no_more_is_asked_for_ahead_than_there_are_places(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    feed = open_feed(town, teacher_config(prefetch=3))
    wait_until(lambda: town.asked["a:1"] == 3)
    time.sleep(0.05)
    assert town.asked["a:1"] == 3
    feed.batch(requests()[0])
    wait_until(lambda: town.asked["a:1"] == 4)
    time.sleep(0.05)
    assert town.asked["a:1"] == 4


def test_no_more_is_asked_for_at_a_time_than_the_server_grants(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1", limits=replace(LIMITS, max_in_flight=2))
    now, most = [0], [0]
    lock = threading.Lock()

    def counted(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.01)
        with lock:
            now[0] -= 1
        return answer()

    town.fault = counted
    run_out(open_feed(town, teacher_config(prefetch=6)), setting.expected())
    assert most[0] == 2


def test_four_ranks_go_on_where_two_stopped(setting: Setting, open_feed: OpenFeed) -> None:
    wide = BatchLayout(micro_batch_size=4, accumulation=1, world=4)  # the same 16 images a step as LAYOUT
    runs = [(LAYOUT, rank, 0, 3) for rank in range(2)] + [(wide, rank, 3, 5) for rank in range(4)]
    oracle = {}
    for layout, rank, start, end in runs:
        stop = len(requests(rank=rank, layout=layout, total_steps=end))
        skipped = start * layout.accumulation
        oracle[layout, rank] = setting.expected(rank=rank, layout=layout, total_steps=end)[skipped:stop]
    town, used = setting.town("a:1", "b:1"), list[int]()
    for layout, rank, start, end in runs:
        feed = open_feed(town, teacher_config("a:1", "b:1"), start_step=start, rank=rank, layout=layout, total_steps=end)
        asked = requests(start, rank=rank, layout=layout, total_steps=end)
        for request, batch in zip(asked, oracle[layout, rank], strict=True):
            ours = feed.batch(request)
            assert_same(ours, batch)
            used += ours.slot_ids_B.tolist()
        feed.close()
    assert sorted(used) == list(range(5 * 16))  # every slot of five steps, once


def test_metrics_have_the_same_names_always(setting: Setting, open_feed: OpenFeed) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config())
    before = feed.metrics()
    run_out(feed, setting.expected())
    after = feed.metrics()
    names = {"wait_s", "starved_steps", "in_flight", "bytes_in", "retries", "failovers", "duplicates", "corrupt", "colocated"}
    assert before.keys() == after.keys() == {f"teacher/{name}" for name in names}
    assert after["teacher/bytes_in"] > 0 and 0 <= after["teacher/in_flight"] <= 3


def test_closing_ends_calls_under_way_and_all_threads(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")

    def hang(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        while not connection.closed.wait(0.01):
            pass
        raise LinkError("closed", "a:1: the connection was closed")

    class Told(type(town.connect("a:1"))):  # type: ignore[misc]
        closed = threading.Event()

        def close(self) -> None:
            super().close()
            self.closed.set()

    town.fault, connection = hang, Told(town, "a:1")
    town.connect = lambda endpoint: connection  # type: ignore[method-assign]
    feed = open_feed(town, teacher_config(deadline_s=60.0, patience_s=60.0))
    wait_until(lambda: town.asked["a:1"] == 3)
    names = {thread.name for thread in threading.enumerate()}
    assert {"teacher-fetch-0", "teacher-fetch-1", "teacher-fetch-2", "teacher-keeper"} <= names
    began = time.monotonic()
    feed.close()
    feed.close()
    assert time.monotonic() - began < 1.5
    assert not any(thread.name.startswith("teacher-") for thread in threading.enumerate())


def test_a_connection_that_keeps_no_deadline_does_not_hold_the_trainer(setting: Setting, open_feed: OpenFeed) -> None:
    town, over = setting.town("a:1"), threading.Event()

    def stuck(endpoint: str, request: GetBatch, answer: Callable[[], Answer]) -> Answer:
        over.wait(10)
        raise LinkError("deadline", "a:1: at last")

    town.fault = stuck
    pace = replace(PACE, close_s=0.1)
    feed = open_feed(town, teacher_config(deadline_s=0.1, patience_s=0.1), pace=pace)
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="a connection did not keep its deadline"):
        feed.batch(requests()[0])
    assert time.monotonic() - began < 1.5
    over.set()


def test_a_forked_child_is_told_and_does_not_hang(setting: Setting, open_feed: OpenFeed) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config())
    feed.batch(requests()[0])
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # no assertion here may run pytest's own machinery
        told = "nothing"
        try:
            feed.close()
            feed.batch(requests()[1])
        except RuntimeError as err:
            told = str(err)
        finally:
            os.write(writing, told.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as stream:
        told = stream.read()
    assert f"made in process {os.getpid()} and is used in {child}" in told and "spawn" in told
    run_out(feed, setting.expected(), first=1)  # the parent goes on


def test_settings_that_cannot_work_are_refused_before_anybody_is_asked(setting: Setting, open_feed: OpenFeed) -> None:
    town = setting.town("a:1")
    with pytest.raises(ValueError, match="on_teacher_loss=colocate needs the shards"):
        open_feed(town, teacher_config(on_teacher_loss="colocate"))
    with pytest.raises(ValueError, match="payload=logits asks servers for nothing else"):
        open_feed(town, teacher_config(payload="logits"), with_teacher=False)
    with pytest.raises(ValueError, match=r"pairs are \(1, 1\)"):
        open_feed(town, teacher_config(), pairs=(1, 1))
    with pytest.raises(ValueError, match="start_step 6 must lie between 0 and total_steps 5"):
        open_feed(town, teacher_config(), start_step=6)
    with pytest.raises(ValueError, match="'a' is not HOST:PORT"):
        open_feed(town, teacher_config("a"))
    assert town.greeted == []


def test_hidden_states_travel_in_the_precision_of_the_phase() -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    assert [wire_dtype(teacher_config(), dtype) for dtype in kinds] == ["fp32", "bf16", "fp16"]
    assert wire_dtype(teacher_config(wire_dtype="bf16"), torch.float32) == "bf16"


def test_half_precision_on_the_way_rounds_hidden_states_once_and_nothing_else(setting: Setting, open_feed: OpenFeed) -> None:
    feed = open_feed(setting.town("a:1"), teacher_config(wire_dtype="bf16"))
    for request, batch in zip(requests(), setting.expected(), strict=True):
        ours: TeacherBatch = feed.batch(request)
        rounded = {i: h.bfloat16().float() if i else h for i, h in batch.hidden.items()}
        ours = replace(ours, hidden=ours.hidden | {0: batch.hidden[0]})  # whether pixels are rounded is the server's to say
        assert_same(ours, replace(batch, hidden=rounded))


def test_logits_of_another_image_than_the_one_here_stop_the_run() -> None:
    def side(*bad: tuple[int, int]) -> TeacherBatch:
        told = tuple(BadSample("io", "shard-000000.tar", "key", 5, position, substitute, "gone") for position, substitute in bad)
        return TeacherBatch(hidden={}, teacher_logits={}, targets_BV=torch.zeros(1, 1), slot_ids_B=torch.zeros(1), bad=told)

    assert other_images(side((40, 6)), side((40, 6))) == other_images(side(), side()) == ""
    assert "position 40: its image was read here and replaced by sample 6 by the teacher server" in other_images(side(), side((40, 6)))
    assert "position 40: its image was replaced by sample 6 here and read by the teacher server" in other_images(side((40, 6)), side())
    assert "replaced by sample 6 here and replaced by sample 7 by" in other_images(side((40, 6)), side((40, 7)))


def test_a_feed_of_logits_loses_a_batch_whose_halves_replaced_other_images() -> None:
    def half(*bad: BadSample, lost: str = "") -> TeacherBatch:
        return TeacherBatch(
            hidden={0: torch.zeros(1)}, teacher_logits={0: torch.ones(1)}, targets_BV=torch.zeros(1, 1), slot_ids_B=torch.tensor([40]),
            bad=bad, lost=lost,
        )  # fmt: skip

    class Half:
        """A feed of one batch."""

        is_colocated = False

        def __init__(self, batch: TeacherBatch) -> None:
            self.batch = lambda request: batch

    def joined(images: TeacherBatch, told: TeacherBatch) -> TeacherBatch:
        request = BatchRequest(0, 0, range(40, 41), (0,), True)
        return LogitsFeed(Half(images), Half(told)).batch(request)  # type: ignore[arg-type]

    gone = BadSample("io", "shard-000000.tar", "key", 5, 40, 6, "gone")
    good = joined(half(gone), half(gone))
    assert (good.lost, good.bad, good.teacher_logits[0].item()) == ("", (gone,), 1.0)
    assert "the logits are another image's" in joined(half(), half(gone)).lost and joined(half(), half(gone)).bad == (gone,)
    assert joined(half(), half(lost="the server's disk is gone")).lost == "the server's disk is gone"
