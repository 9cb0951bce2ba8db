"""What a service grants: so much at once for a client and for all, an answer or a refusal in bounded time, and numbers about it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.wire import PROTOCOL_VERSION, FeedError, Golden, Hello
from m2mkd_ds.teacher.server.admission import MAX_CLIENTS, Admission, Caller
from m2mkd_ds.teacher.server.counters import Counters
from m2mkd_ds.teacher.server.decode_worker import DecodeError
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.server.service import TeacherService
from tests.teacher.asking import ALL, LAYOUT, asked, assert_same, colocated, counted_parts, service_of
from tests.teacher.conftest import LIMITS, make_parts, tiny_fingerprints

Making = Callable[..., TeacherService]
# One answer of all pairs: images 4 * 3 * 16 * 16 fp32, labels and targets; two hidden states of 4 * 17 * 32; logits and targets of 4 * 10.
ANSWER_BYTES = 12_288 + 4 * (8 + 57 + 40) + 2 * 8_704 + 4 * 160
"""Its estimate, at least as much as it has."""
WORK_BYTES = 4 * 4 * (768 + 2 * 544)
"""While it is made, in fp32: finished images of 3 * 16 * 16 and two hidden states of 17 * 32, for four images."""


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refused(service: TeacherService, code: str, **changes: object) -> FeedError:
    with pytest.raises(FeedError) as caught:
        service.answering(asked(service, **changes))  # type: ignore[arg-type]
    assert caught.value.code == code
    return caught.value


def test_a_client_has_so_many_answers_at_once_and_others_go_on(make_service: Making) -> None:
    service = make_service(limits=replace(LIMITS, max_in_flight=2))
    leases = [service.answering(asked(service, start)) for start in (0, 4)]
    late = refused(service, "retry_later", start=8)
    assert "this client has 2 answers in flight; 2 are allowed" in str(late) and 0.05 <= late.retry_after_s <= 5.0
    with service.answering(asked(service, 8, client="other")) as answer:
        assert answer.head.start == 8
        assert service.status().in_flight == 3
    leases[0].release()
    leases[0].release()  # twice is once
    assert service.status().in_flight == 1
    leases.append(service.answering(asked(service, 8)))
    refused(service, "retry_later", start=12)
    for lease in leases:
        lease.release()
    assert service.status().in_flight == 0 and service.counters()["in_flight_bytes"] == 0


def test_a_client_that_never_lets_go_holds_its_share_and_no_more(make_service: Making) -> None:
    most = 5 * ANSWER_BYTES + WORK_BYTES
    service = make_service(limits=replace(LIMITS, max_in_flight=3), max_bytes=most)
    held = []
    for start in range(0, 400, 4):
        try:
            held.append(service.answering(asked(service, start, client="stuck")))
        except FeedError as err:
            assert err.code == "retry_later"
        service.get(asked(service, start, client="lively"))  # two more fit at any time
        assert service.counters()["in_flight_bytes"] <= most
    assert len(held) == 3 and service.counters()["answers"] == 103
    # With many such clients the bytes of all are the bound.
    for number in range(20):
        try:
            held.append(service.answering(asked(service, 0, client=f"stuck {number}")))
        except FeedError as err:
            assert err.code == "retry_later" and "more would be above" in str(err)
    assert len(held) == 5
    assert sum(lease.answer.num_bytes for lease in held) <= service.counters()["in_flight_bytes"] <= most


def test_the_way_to_an_answer_counts_while_it_is_made(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    service = service_of(Producer(parts), tiny_config, tiny_index)
    seen = []
    parts.teachers[2].register_forward_pre_hook(lambda *_: seen.append(service.counters()["in_flight_bytes"]))
    logits = {"payload": "logits", "pairs": (2,)}
    with service.answering(asked(service, **logits)) as answer:  # type: ignore[arg-type]
        assert answer.num_bytes == 4 * 4 * 10 == service.counters()["in_flight_bytes"]
    assert seen == [160 + 12_288 + WORK_BYTES]  # logits, decoded images, and the way
    small = service_of(service.producer, tiny_config, tiny_index, max_bytes=int(seen[0]) - 1)
    assert "takes 42144 bytes; this server holds at most 42143" in str(refused(small, "bad_request", **logits))


def test_what_never_fits_is_a_bad_request_before_any_work(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts, calls = counted_parts(tiny_config, tiny_index)
    producer = Producer(parts)
    calls.clear()
    actual = producer.answer(asked(None)).num_bytes
    assert actual <= producer.answer_bytes(asked(None)) <= ANSWER_BYTES
    producer = Producer(parts)
    calls.clear()
    small = service_of(producer, tiny_config, tiny_index, replace(LIMITS, max_answer_bytes=actual - 1))
    assert "this server sends at most" in str(refused(small, "bad_request"))
    full = service_of(producer, tiny_config, tiny_index, max_bytes=actual - 1)
    assert "this server holds at most" in str(refused(full, "bad_request"))
    assert "layout.micro_batch_size: 65; this server allows 1 to 64" in str(
        refused(full, "bad_request", layout=replace(LAYOUT, micro_batch_size=65))
    )
    counts = producer.counters.snapshot()
    assert not calls and counts["misses_decode"] == 0 and counts["errors_bad_request"] == 3 and counts["requests"] == 3
    with small.answering(asked(small, pairs=(2,))) as answer:
        assert answer.head.pairs == (2,)


def test_a_failed_answer_gives_its_place_back(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    service = service_of(Producer(parts), tiny_config, tiny_index, replace(LIMITS, max_in_flight=1))

    failure: BaseException

    def fail(*_: object) -> None:
        raise failure

    hook = parts.teachers[1].register_forward_pre_hook(fail)
    for error, told in [
        (RuntimeError("CUDA out of memory"), "RuntimeError: CUDA out of memory"),
        (SampleError("shard x, sample 3: augmentation failed", "transform"), "shard x, sample 3: augmentation failed"),
        (DecodeError("a worker ended"), "a worker ended"),
        (ValueError("of another width"), "ValueError: of another width"),
    ]:
        failure = error
        assert told in str(refused(service, "internal", pairs=(1,)))
    for broken in (SampleError("shard x, sample 3: cannot be decoded", "undecodable"), ShardError("shard x: is truncated")):
        failure = broken
        assert str(broken) == str(refused(service, "data", pairs=(1,)))
    assert service.status().ready and service.counters()["errors_data"] == 2
    failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        service.get(asked(service, pairs=(1,)))
    hook.remove()
    assert service.counters()["in_flight"] == 0 and service.counters()["errors_internal"] == 4
    assert_same(service.get(asked(service)).tensors, colocated(tiny_config, tiny_index, 1)[0])


def test_a_silent_client_is_forgotten_once_it_holds_nothing(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    clock = Clock()
    limits = replace(LIMITS, max_in_flight=1)  # heartbeat: 1 s
    service = service_of(Producer(make_parts(tiny_config, tiny_index)), tiny_config, tiny_index, limits, clock=clock)
    lease = service.answering(asked(service, client="reading"))
    service.get(asked(service, client="silent"))
    service.get(asked(service, client="waiting"))
    service.get(asked(service, client="lively"))
    assert service.status().clients == 4
    for _ in range(3):
        clock.now += 1.9
        service.status("waiting")
        service.get(asked(service, client="lively"))
    assert service.status().clients == 3 and service.counters()["evicted_clients"] == 1
    assert service.status("never greeted").clients == 3
    assert service.status().in_flight == 1 and service.counters()["in_flight_bytes"] > 0
    refused(service, "retry_later", client="reading")  # its share did not begin anew
    service.get(asked(service, client="silent"))  # it comes back, and needs no greeting: nothing was kept for it
    assert service.status().clients == 4
    lease.release()
    assert service.status().in_flight == 0 and service.wait_idle(0)
    clock.now += 3.9
    service.get(asked(service, client="reading"))  # taking an answer is a sign of life
    clock.now += 100
    assert service.status().clients == 0 and service.counters()["evicted_clients"] == 5


def test_golden_outputs_are_counted_and_refused_while_draining(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    service = service_of(Producer(make_parts(tiny_config, tiny_index)), tiny_config, tiny_index)
    request = Golden(instance=service.instance, pairs=ALL)
    with service.golden_answering(request) as answer:
        # h_0 of 3 * 16 * 16 and twice 17 * 32 for two images, as hidden.I; module.0 and module.1; module.2 and three logits of ten classes
        assert answer.num_bytes == 2 * 4 * (768 + 2 * 544 + 2 * 544 + 4 * 10)
        held = service.counters()["in_flight_bytes"]
        assert answer.num_bytes + 2 * 4 * (768 + 2 * 544) <= held < 2 * answer.num_bytes
        assert service.status().in_flight == 1 and service.status().clients == 0
    assert service.counters()["in_flight_bytes"] == 0
    full = service_of(service.producer, tiny_config, tiny_index, max_bytes=int(held) + 1)
    with full.golden_answering(replace(request, instance=full.instance)), pytest.raises(FeedError, match="are in flight") as late:
        full.golden(replace(request, instance=full.instance))
    assert late.value.code == "retry_later"
    service.drain()
    with pytest.raises(FeedError, match="about to stop") as refusal:
        service.golden(request)
    assert refusal.value.code == "draining" and service.status().in_flight == 0


def test_a_server_that_only_fails_is_not_ready_until_it_answers(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    service = service_of(Producer(parts, cache_bytes=0), tiny_config, tiny_index)

    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    def break_down() -> None:
        for number in range(4):
            refused(service, "internal", start=4 * number)
        refused(service, "bad_request", pairs=(5,))  # no fault of the server's
        assert service.status().ready
        with pytest.raises(RuntimeError):
            service.golden(Golden(instance=service.instance, pairs=(1,)))
        assert not service.status().ready and not service.status().draining

    for succeed in (lambda: service.get(asked(service)), lambda: service.golden(Golden(instance=service.instance, pairs=(1,)))):
        hook = parts.teachers[1].register_forward_pre_hook(fail)
        break_down()
        service.hello(hello(tiny_config, tiny_index))  # computes nothing, so it proves nothing
        assert not service.status().ready
        hook.remove()
        succeed()
        assert service.status().ready


def test_clients_are_counted_up_to_a_bound() -> None:
    clock = Clock()
    admission = Admission(LIMITS, 1000, Counters(), clock)
    for number in range(MAX_CLIENTS):
        admission.heard(str(number))
    with pytest.raises(FeedError, match="4096 clients are here already") as late:
        admission.admit("one more", 1)
    assert late.value.code == "retry_later" and admission.in_flight == 0
    clock.now += 4.1
    admission.admit("one more", 1)
    assert admission.num_clients == 1


def test_who_has_hung_up_is_forgotten_without_being_put_out() -> None:
    clock, counters, is_there = Clock(), Counters(), {"stays": True, "goes": True}
    admission = Admission(LIMITS, 1000, counters, clock)
    for name in is_there:
        assert admission.heard(name, Caller("10.0.0.7", partial(is_there.__getitem__, name)))
        assert not admission.heard(name, Caller("10.0.0.7", partial(is_there.__getitem__, name)))
    is_there["goes"] = False
    clock.now += 4.1
    assert admission.num_clients == 0
    assert (counters.snapshot()["left_clients"], counters.snapshot()["evicted_clients"]) == (1, 1)


def test_the_time_to_wait_is_about_that_of_an_answer() -> None:
    clock = Clock()
    admission = Admission(replace(LIMITS, max_in_flight=1), 1000, Counters(), clock)
    for _ in range(60):
        done = admission.admit("a", 1)
        clock.now += 2.0
        done()
    admission.admit("a", 1)
    with pytest.raises(FeedError) as late:
        admission.admit("a", 1)
    assert 1.9 < late.value.retry_after_s < 2.1


def test_drain_refuses_new_requests_and_lets_running_ones_end(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    parts = make_parts(tiny_config, tiny_index)
    service = service_of(Producer(parts), tiny_config, tiny_index)
    service.options = replace(service.options, endpoints=("10.0.0.8:8815",))
    entered, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        entered.set()
        go_on.wait(30)

    parts.teachers[2].register_forward_pre_hook(hold)
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(service.answering, asked(service))
        assert entered.wait(30)
        service.drain()
        assert service.status().draining and not service.status().ready and service.counters()["draining"] == 1
        assert refused(service, "draining", client="other").endpoints == ("10.0.0.8:8815",)
        with pytest.raises(FeedError, match="about to stop"):
            service.hello(hello(tiny_config, tiny_index))
        assert not service.wait_idle(0.05)
        go_on.set()
        lease = running.result(30)
    assert not service.wait_idle(0.05)  # made, not sent
    assert_same(lease.answer.tensors, colocated(tiny_config, tiny_index, 1)[0])
    lease.release()
    assert service.wait_idle(0.05)


def hello(config: RunConfig, index: ShardIndex, **changes: object) -> Hello:
    greeting = Hello(
        oldest_protocol=2, newest_protocol=PROTOCOL_VERSION, client="test", rank=0, layout=LAYOUT, pairs=ALL, payload="hidden",
        wire_dtype="fp32", with_teacher=True, fingerprints=tiny_fingerprints(config, index),
    )  # fmt: skip
    return replace(greeting, **changes)  # type: ignore[arg-type]


def test_a_stream_that_cannot_be_served_is_refused_at_the_greeting(
    make_service: Making, tiny_config: RunConfig, tiny_index: ShardIndex
) -> None:
    service = make_service()
    for changes, told in [
        ({"pairs": (1, 7)}, r"pairs: the trainer asks for \[7\], this server has the teacher modules of \[0, 1, 2\]"),
        ({"layout": replace(LAYOUT, micro_batch_size=3)}, "layout: micro_batch_size is 3 and data.augment.mix_group is 2"),
        ({"payload": "logits", "with_teacher": False}, "with_teacher: payload=logits without teacher logits asks for nothing"),
        ({"payload": "image", "wire_dtype": "int8"}, "wire_dtype: int8 is for hidden states, and payload=image has none"),
    ]:
        with pytest.raises(FeedError, match=told) as bad:
            service.hello(hello(tiny_config, tiny_index, **changes))
        assert bad.value.code == "bad_request"
    assert service.status().clients == 0
    with pytest.raises(FeedError, match=r"pair 7 is not served") as bad:
        service.golden(Golden(instance=service.instance, pairs=(0, 7)))
    assert bad.value.code == "bad_request" and service.counters()["errors_bad_request"] == 5


def test_counters_say_what_was_done(make_service: Making) -> None:
    service = make_service()
    link = LocalConnection(service)
    for pairs in ((1,), (2,), (1, 2)):
        link.get(asked(service, pairs=pairs), 5.0)
    with pytest.raises(FeedError):
        link.get(asked(service, pairs=(5,)), 5.0)
    counts = service.counters()
    # 17 tokens of width 32, ten classes, four images, fp32; twice pair 1, twice pair 2, and targets with each of three answers
    hidden, logits = 4 * 17 * 32 * 4, 4 * 10 * 4
    assert counts["bytes_out"] == 4 * (hidden + logits) + 3 * logits
    assert (counts["requests"], counts["answers"], counts["images"], counts["errors_bad_request"]) == (4, 3, 12, 1)
    # Images once, then twice from the cache; h_0 and h_1 for all three, h_2 for two; each answer asks again for the h_i it sends.
    assert counts["misses_decode"] == 1 and counts["misses_prefix"] == 3 and counts["misses_teacher"] == 2 and counts["hits_teacher"] == 2
    assert min(counts[name] for name in ("decode_s", "prefix_s", "teacher_s", "cast_s", "busy_s")) > 0
    assert counts["capacity_images_per_s"] == pytest.approx(12 / counts["busy_s"])
    assert counts["cache_bytes"] >= 12_288 + 2 * hidden + 2 * logits
    assert (counts["clients"], counts["in_flight"], counts["draining"]) == (1, 0, 0)


def test_seconds_of_work_count_once_for_all_who_work() -> None:
    counters = Counters()
    assert counters.snapshot()["capacity_images_per_s"] == 0
    barrier = threading.Barrier(3)

    def work() -> None:
        with counters.busy():
            barrier.wait()
            threading.Event().wait(0.2)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    busy_s = counters.snapshot()["busy_s"]
    assert 0.2 <= busy_s < 0.55
    threading.Event().wait(0.05)
    assert counters.snapshot()["busy_s"] == busy_s
