"""`m2mkd bench teacher` in miniature: every way brings the bytes that were sent, numbers follow from each other. No speeds."""

from __future__ import annotations

import json
import multiprocessing
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from m2mkd_ds.bench.teacher import run_teacher
from m2mkd_ds.bench.teacher_batches import PAIR, Batches, Shape, StandIn, hello, make_service
from m2mkd_ds.bench.teacher_certificates import Certificates, make_certificates
from m2mkd_ds.bench.teacher_floors import Take
from m2mkd_ds.bench.teacher_host import why_not
from m2mkd_ds.bench.teacher_measure import Meter, Moved
from m2mkd_ds.bench.teacher_options import FEEDS, PEERS, TeacherBench
from m2mkd_ds.bench.teacher_output import notes, transfer_cells, verdict_lines
from m2mkd_ds.bench.teacher_rows import StepRow, TransferRow, percentile, step_row, transfer_row, verdicts
from m2mkd_ds.bench.teacher_step import Trained
from m2mkd_ds.cli import main
from m2mkd_ds.teacher.flight.certificates import read_authority, read_pair
from m2mkd_ds.teacher.protocol.wire import GetBatch

MINIATURE = TeacherBench(
    images=3, tokens=5, width=7, classes=11, in_flight=2, batches=3, singles=2, rounds=2, steps=2, step_images=2, step_width=64
)
# hidden.1 3*5*7 bf16, targets 3*11 fp32, logits.1 3*11 bf16.
MINIATURE_BYTES = 3 * 5 * 7 * 2 + 3 * 11 * 4 + 3 * 11 * 2
SHAPE = Shape.of_transfer(MINIATURE)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench_teacher")


@pytest.fixture(scope="module")
def text(out: Path) -> str:
    return run_teacher(replace(MINIATURE, out=out))


@pytest.fixture(scope="module")
def result(out: Path, text: str) -> dict[str, Any]:
    return json.loads((out / "teacher_cpu.json").read_text())


def test_a_result_has_every_field_of_its_schema(result: dict[str, Any]) -> None:
    named = {"schema", "command", "options", "device", "batch_bytes", "cores", "environment", "wall_s", "transfers", "steps", "verdicts"}
    assert set(result) == named
    assert result["schema"] == "m2mkd bench teacher 1" and result["command"].startswith("m2mkd bench teacher --images 3 --tokens 5")
    assert {"torch", "pyarrow", "xxhash", "numpy", "cpu", "threads", "git_commit"} <= set(result["environment"])
    assert result["environment"]["threads"] == torch.get_num_threads()
    assert all(set(row) == {field.name for field in fields(TransferRow)} for row in result["transfers"])
    assert all(set(row) == {field.name for field in fields(StepRow)} for row in result["steps"])
    assert [row["peer"] for row in result["transfers"]] == list(PEERS)
    assert [row["feed"] for row in result["steps"]] == list(FEEDS)


def test_every_way_brought_the_bytes_that_were_sent_and_its_rates_follow_from_the_samples(result: dict[str, Any]) -> None:
    assert result["batch_bytes"] == MINIATURE_BYTES
    for row in result["transfers"]:
        assert row["available"] and row["rounds"] == 2 and row["batches"] == 3 and row["batch_bytes"] == MINIATURE_BYTES, row["peer"]
        # Three contents (one more than requests under way), each compared twice.
        assert row["checked"] == 6
        samples = row["samples"]
        rates = [3 * MINIATURE_BYTES / seconds / 1e9 for seconds in samples["wall_s"]]
        assert row["gb_per_s"] == pytest.approx({"median": median(rates), "min": min(rates), "max": max(rates)})
        for side in ("client", "server"):
            milliseconds = [1000 * seconds / 3 for seconds in samples[f"{side}_cpu_s"]]
            expected = {"median": median(milliseconds), "min": min(milliseconds), "max": max(milliseconds)}
            assert row[f"{side}_cpu_ms"] == pytest.approx(expected) and min(milliseconds) > 0
        assert row["num_latencies"] == len(samples["latency_s"]) == 4
        assert row["latency_p50_ms"] == pytest.approx(1000 * median(samples["latency_s"]))
        assert row["latency_p50_ms"] <= row["latency_p99_ms"] <= 1000 * max(samples["latency_s"])


def test_only_feeds_with_a_server_have_a_producer_and_its_pace_is_the_fastest_step_over_the_headroom(result: dict[str, Any]) -> None:
    for row in result["steps"]:
        samples = row["samples"]
        assert row["available"] and row["rounds"] == 2 and row["steps"] == 2
        # Two steps of two images a round.
        assert row["images_per_s"]["median"] == pytest.approx(median(4 / seconds for seconds in samples["wall_s"]))
        pairs = zip(samples["wait_s"], samples["feed_s"], samples["wall_s"], strict=True)
        assert all(0 <= wait_s <= feed_s + 1e-3 <= wall_s for wait_s, feed_s, wall_s in pairs)
        if row["feed"] == "colocated":
            assert row["pace_ms"] is None and row["headroom"] is None and "pace_s" not in samples
            assert samples["wait_s"] == [0, 0] and min(samples["feed_s"]) > 0
        else:
            ratios = [step_s / pace_s for step_s, pace_s in zip(samples["step_s"], samples["pace_s"], strict=True)]
            assert row["headroom"] == pytest.approx({"median": median(ratios), "min": min(ratios), "max": max(ratios)})


def test_the_files_say_the_same_as_the_table(result: dict[str, Any], text: str, out: Path) -> None:
    markdown = (out / "teacher_cpu.md").read_text()
    for row in result["transfers"]:
        cell = f"{row['client_cpu_ms']['median']:.1f} ({row['client_cpu_ms']['min']:.1f}-{row['client_cpu_ms']['max']:.1f})"
        assert f"| {row['peer']} |" in markdown and cell in markdown and cell in text
    for verdict in result["verdicts"]:
        assert verdict["what"] in markdown and verdict["what"] in text
    assert "producer: a stand-in that answers from memory" in markdown
    assert ElementTree.fromstring((out / "teacher_cpu.svg").read_text()).tag.endswith("svg")
    assert [path.name for path in sorted(out.iterdir())] == ["teacher_cpu.json", "teacher_cpu.md", "teacher_cpu.svg"]


def test_nothing_is_left_behind(result: dict[str, Any]) -> None:
    assert multiprocessing.active_children() == []


def test_batches_are_those_of_an_answer_and_the_same_in_every_process() -> None:
    batches, again = Batches(SHAPE), Batches(SHAPE)
    described = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in batches.tensors(0).items()}
    assert described == {
        "hidden.1": ((3, 5, 7), torch.bfloat16), "targets": ((3, 11), torch.float32), "logits.1": ((3, 11), torch.bfloat16),
    }  # fmt: skip
    assert batches.num_bytes == MINIATURE_BYTES and batches.sizes == [210, 132, 66]
    assert [bytes(part) for part in batches.parts(4)] == [bytes(part) for part in again.parts(1)]
    assert len({bytes(batches.parts(number)[0]) for number in range(3)}) == 3


def flipped(whole: bytes) -> list[bytes]:
    return [whole[:300], bytes([whole[300] ^ 1]), whole[301:]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, "batch 1: bytes from 300 on are not"),
        (lambda whole: [whole[:-1]], "batch 1: 407 bytes came, 408 were sent"),
        (lambda whole: [whole, b"x"], "batch 1: bytes from 408 on are not"),
        (lambda whole: [b"".join(Batches(SHAPE).parts(0))], "batch 1: bytes from 0 on are not"),
    ],
)
def test_a_batch_that_is_not_the_one_that_was_sent_is_found(damage: Callable[[bytes], list[bytes]], message: str) -> None:
    batches = Batches(SHAPE)
    whole = b"".join(batches.parts(1))
    batches.compare(1, [memoryview(whole[:100]), memoryview(whole[100:])])
    with pytest.raises(RuntimeError, match=message):
        batches.compare(1, [memoryview(piece) for piece in damage(whole)])


class _Stale:
    """A way that gives what its buffer held `lag` batches ago from the fourth batch on."""

    def __init__(self, batches: Batches, lag: int) -> None:
        self._batches, self._lag = batches, lag

    def fetch(self, numbers: range, in_flight: int, take: Take) -> None:
        for number in numbers:
            take(number, self._batches.parts(number - self._lag if number >= 3 else number))

    def close(self) -> None:
        pass


def test_a_buffer_that_still_holds_an_earlier_batch_is_found_for_every_lag_up_to_the_requests_under_way() -> None:
    batches = Batches(SHAPE)
    host: Any = None  # only asked for CPU time
    assert Meter(_Stale(batches, 0), host, batches, MINIATURE).check() == 6
    for lag in (1, 2):
        with pytest.raises(RuntimeError, match="batch 3: bytes from 0 on are not those that were sent"):
            Meter(_Stale(batches, lag), host, batches, MINIATURE).check()


def request(service: Any, number: int) -> GetBatch:
    welcome = service.hello(hello(SHAPE))
    return GetBatch(
        instance=welcome.instance, plan=welcome.plan, client="bench", layout=SHAPE.layout, start=3 * number, pairs=(PAIR,),
        payload="hidden", wire_dtype="bf16", with_teacher=True, attempt=0,
    )  # fmt: skip


def test_a_producer_with_a_pace_gives_one_batch_after_the_other() -> None:
    producer = StandIn(Batches(SHAPE))
    service = make_service(producer, in_flight=2)
    producer.pace_s = 0.05
    began = time.monotonic()
    answers = [service.get(request(service, number)) for number in range(3)]
    assert time.monotonic() - began >= 0.15  # never faster than its pace; how much slower is the machine's matter
    for number, answer in enumerate(answers):
        assert answer.head.step == number and torch.equal(answer.tensors["hidden.1"], Batches(SHAPE).tensors(number)["hidden.1"])


@pytest.mark.parametrize("tool", ["trustme", "openssl"])
def test_certificates_are_good_for_both_sides(tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if tool == "openssl":
        if shutil.which("openssl") is None:
            pytest.skip("no command openssl")
        monkeypatch.setitem(sys.modules, "trustme", None)
    assert make_certificates(tmp_path) == ""
    made = Certificates.in_folder(tmp_path)
    read_authority(made.authority, "authority")
    read_pair(made.server_cert, made.server_key, role="server", cert_field="cert", key_field="key")
    read_pair(made.client_cert, made.client_key, role="client", cert_field="cert", key_field="key")


def test_what_cannot_be_measured_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trustme", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    reason = make_certificates(tmp_path)
    assert reason.startswith("no certificates: neither trustme")
    monkeypatch.setitem(sys.modules, "xxhash", None)
    monkeypatch.setitem(sys.modules, "pyarrow.flight", None)
    assert why_not("tcp") == why_not("ring") == why_not("gloo") == ""
    assert why_not("shm") == "xxhash cannot be imported: pip install m2mkd_ds[teacher]"
    assert why_not("flight") == "pyarrow.flight cannot be imported: pip install m2mkd_ds[teacher]"
    assert why_not("remote").startswith("pyarrow.flight and xxhash cannot")
    row = TransferRow("flight_mtls", available=False, reason=reason)
    assert transfer_cells(row)[:2] == ["flight_mtls", "not available"]
    assert notes([row], []) == [f"flight_mtls: not available: {reason}"]
    assert verdicts([row], [], 1.2) == []


def transfer(peer: Any, seconds: float) -> TransferRow:
    """Ten batches of 10^8 bytes in so many seconds: 1 / seconds GB/s; 20 and 10 CPU-ms a batch."""
    return transfer_row(peer, "", 1, [Moved(10, 10**8, seconds, 0.2, 0.1, (0.1,))])


def step(feed: Any, wait_s: list[float], step_s: list[float]) -> StepRow:
    """Ten seconds a round, a producer of 0.1 s a batch."""
    pairs = zip(wait_s, step_s, strict=True)
    return step_row(feed, "", [Trained(20, 8, 10.0, 1.0, wait, seconds, None if feed == "colocated" else 0.1) for wait, seconds in pairs])


def test_targets_compare_ours_with_their_floors_and_say_what_is_missed() -> None:
    # GB/s: tcp 2, ring 4, flight 1.25, flight_joined 1.6; shm 3, remote 1.25; encrypted: 0.5 and 0.4.
    seconds = {
        "tcp": 0.5,
        "ring": 0.25,
        "flight": 0.8,
        "flight_joined": 0.625,
        "shm": 1 / 3,
        "remote": 0.8,
        "flight_mtls": 2,
        "remote_mtls": 2.5,
    }
    # shm: of three rounds the second has a producer that is only 1.1 times as fast, and does not count: median of 0.1/10 and 0.15/10.
    steps = [step("colocated", [0.0], [0.1]), step("shm", [0.1, 9.0, 0.15], [0.12, 0.11, 0.116]), step("remote", [0.3], [0.13])]
    found = verdicts([transfer(peer, one) for peer, one in seconds.items()], steps, 1.2)
    assert [
        (one.what.partition(",")[0].partition(":")[0], None if one.value is None else round(one.value, 4), one.met) for one in found
    ] == [
        ("shm / ring", 0.75, False),
        ("remote / tcp", 0.625, True),
        ("remote / flight", 1.0, True),
        ("remote / flight_joined", 0.7812, False),
        ("remote_mtls / flight_mtls", 0.8, None),
        ("shm", 0.0125, True),
        ("remote", 0.03, False),
    ]
    lines = verdict_lines(found)
    assert lines[0] == "MISSED: shm / ring, GB/s; CPU-ms a batch, both sides: 30.0 against 30.0: 0.750 (target 0.8)"
    assert lines[4].startswith("ratio: remote_mtls / flight_mtls") and "target" not in lines[4]
    assert "2 of 3 rounds" in lines[5] and lines[6].endswith("0.030 (target 0.02)")
    (untested,) = verdict_lines(verdicts([], [step("shm", [0.0], [0.1])], 1.2))
    assert untested.startswith("not tested: shm: share") and "0 of 1 rounds" in untested


def test_percentiles_lie_between_the_two_nearest_samples() -> None:
    # 101 samples 0..100: the p-th percentile is p. Of 0 and 10, the 99th is 9.9.
    assert percentile(list(range(100, -1, -1)), 99) == 99 and percentile(list(range(101)), 50) == 50
    assert percentile([10.0, 0.0], 99) == pytest.approx(9.9) and percentile([3.0], 99) == 3.0


def test_quick_fills_in_what_was_not_given() -> None:
    small = TeacherBench(quick=True, images=7).resolved()
    assert (small.images, small.rounds, small.tokens) == (7, 2, 197)
    assert TeacherBench(quick=True, peers=("tcp", "shm")).command() == "m2mkd bench teacher --peers tcp shm --quick"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "0"], "--images is 0; it must be at least 1"),
        (["--in-flight", "17"], "--in-flight is 17; at most 16"),
        (["--step-width", "65"], "--step-width is 65; give a multiple of 64"),
        (["--headroom", "0"], "--headroom is 0; give how many times"),
        (["--peers", "tcp", "tcp"], "--peers is tcp tcp; give one or several of tcp, ring"),
    ],
)  # fmt: skip
def test_what_makes_no_measurement_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "teacher", *words])
    assert end.value.code == 2
    assert re.search(re.escape(message), capsys.readouterr().err)


def test_the_launcher_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main(["bench", "teacher", "--quick"])
    assert "start it without the launcher" in capsys.readouterr().err
