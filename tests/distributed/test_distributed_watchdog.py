"""Sections, heartbeats, who is suspected, and the end of a process that stands still."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from m2mkd_ds.distributed.watch.activity import CollectiveError, Section, Snapshot, collective, section, snapshot, where_raised
from m2mkd_ds.distributed.watch.processes import number_space, parent_of, seen
from m2mkd_ds.distributed.watch.records import (
    Failure,
    Heartbeat,
    failure_file,
    heartbeat_file,
    read_failures,
    read_heartbeats,
    remove_records,
    write_record,
)
from m2mkd_ds.distributed.watch.suspects import Observer, shared_look_s
from m2mkd_ds.distributed.watch.watchdog import HANG_CODE

HERE = socket.gethostname()
WAITING = Snapshot((Section("agree on losses", True, True, "", {"step": 12}),), 0.0)


def heartbeat(rank: int, **changed: object) -> Heartbeat:
    """A rank on another host that waits where this one does."""
    base = Heartbeat(
        launch="L", rank=rank, host="node2", pid=1, pid_started="1", space="", beat=1, time=time.time(), step=12, section="agree on losses",
        describes=WAITING.describe(), may_wait=True, since_s=3.0,
    )  # fmt: skip
    return replace(base, **changed)  # type: ignore[arg-type]


def failure(rank: int, **changed: object) -> Failure:
    base = Failure(
        launch="L", rank=rank, host="node2", pid=1, time=5.0, kind="own", cause="ValueError: no such shard", where="`forward` of step 3",
        step=3, slots="range(8, 12)", exit_code=2,
    )  # fmt: skip
    return replace(base, **changed)  # type: ignore[arg-type]


def suspect(folder: Path, *, size: int = 2, heartbeat_s: float = 0.3, alive: Heartbeat | None = None) -> str:
    """What rank 0 says of the others after it has looked for long enough; `alive` beats on meanwhile."""
    observer = Observer(folder, "L", 0, size, heartbeat_s)
    number = 1
    while not (observer.is_certain or observer.has_looked_long_enough):
        number += 1
        if alive is not None:
            write_record(heartbeat_file(folder, alive.rank), replace(alive, beat=number))
        time.sleep(0.1)
    observer.close()
    return observer.suspect(WAITING)


def test_sections_nest_and_say_where_the_main_thread_is() -> None:
    with section("save", limit="save", step=12):
        with collective("barrier"):
            inside = snapshot()
        after = snapshot()
    assert inside.describe() == "collective `barrier` in `save` of step 12"
    assert (inside.limit, inside.is_collective) == ("save", True)
    assert after.describe() == "`save` of step 12" and after.changed > inside.changed
    with section("forward", step=3, pair=1, slots=range(4)):
        assert snapshot().describe() == "`forward` of step 3, pair 1"
        with section("agree"):
            assert snapshot().step == 3
    assert snapshot().sections == () and snapshot().step == 3
    with section("start", limit="start"), section("read"):
        assert snapshot().step == 0


def test_an_error_keeps_the_innermost_section_that_it_was_raised_in() -> None:
    with pytest.raises(KeyError) as caught, section("train", limit="step"), section("forward", step=3, slots=range(4)):
        raise KeyError("x")
    assert where_raised(caught.value).describe() == "`forward` of step 3"
    assert where_raised(caught.value).facts["slots"] == range(4)


def test_a_backend_s_error_in_a_collective_names_the_collective() -> None:
    message = r"^collective `agree on losses` failed: connection closed by peer$"
    with pytest.raises(CollectiveError, match=message), collective("agree on losses"):
        raise RuntimeError("[/src/pair.cc:561] connection closed by peer\nframe #0: ...")


def test_a_rank_that_failed_by_itself_is_the_suspect_before_any_other(tmp_path: Path) -> None:
    write_record(heartbeat_file(tmp_path, 2), heartbeat(2, time=1.0))
    write_record(failure_file(tmp_path, 1), failure(1))
    write_record(failure_file(tmp_path, 2), failure(2, kind="peer", time=1.0))
    text = suspect(tmp_path, size=3)
    assert text == "rank 1 (host node2) failed in `forward` of step 3 (slots range(8, 12)): ValueError: no such shard"


def test_a_process_of_this_host_that_has_gone_is_known_at_once(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    alive = seen(child.pid)
    assert alive is not None and alive.is_alive and parent_of(child.pid) == os.getpid()
    beat = heartbeat(1, host=HERE, space=number_space(), pid=child.pid, pid_started=alive.started, describes="`forward` of step 4")
    write_record(heartbeat_file(tmp_path, 1), beat)
    child.kill()  # not yet waited for: a zombie has gone, too
    deadline = time.monotonic() + 10
    while alive.is_alive and time.monotonic() < deadline:
        time.sleep(0.05)
    assert f"rank 1 on {HERE} (process {child.pid}) has gone without a word: killed? last seen in `forward` of step 4" == suspect(tmp_path)
    child.wait()


def test_a_live_process_of_a_container_with_the_same_host_name_is_not_taken_for_gone(tmp_path: Path) -> None:
    number = next(pid for pid in range(2**22 - 1, 0, -1) if not Path(f"/proc/{pid}").exists())
    beat = heartbeat(1, host=HERE, pid=number, pid_started="1", space=number_space())
    assert beat.is_gone and not replace(beat, space=f"{number_space()}0").is_gone
    assert not replace(beat, host="node2").is_gone


def test_a_silent_rank_is_named_with_its_last_section(tmp_path: Path) -> None:
    write_record(heartbeat_file(tmp_path, 1), heartbeat(1, time=time.time() - 30, describes="`forward` of step 12, pair 0"))
    alive = heartbeat(2, describes="`backward` of step 12", may_wait=False, since_s=99.0)
    text = suspect(tmp_path, size=3, alive=alive)
    assert text.startswith("rank 1 on node2 has not been heard of for 3") and text.endswith("last seen in `forward` of step 12, pair 0")


@pytest.mark.parametrize(
    ("changed", "size", "expected"),
    [
        ({"describes": "`wait for data` of step 12", "may_wait": False}, 2, "rank 1 on node2 stays in `wait for data` of"),
        ({"describes": "collective `barrier` of step 12"}, 2, "rank 1 on node2 waits elsewhere, in collective `barrier` of"),
        ({}, 2, "all ranks are there and wait in the same place: is the network between them down?"),
        ({}, 3, "rank 2 has never been heard of"),
    ],
)
def test_a_rank_that_lives_is_judged_by_where_it_is(tmp_path: Path, changed: dict[str, object], size: int, expected: str) -> None:
    assert suspect(tmp_path, size=size, alive=heartbeat(1, **changed)).startswith(expected)


def test_ranks_that_all_look_read_no_more_together_however_many_they_are() -> None:
    assert [shared_look_s(size) for size in (0, 1, 8, 31)] == [0.25] * 4
    assert all(size * size / shared_look_s(size) <= 4000 for size in (1, 31, 32, 64, 100, 512, 4096))
    assert (shared_look_s(64), shared_look_s(256)) == (1.024, 16.384)  # 64 * 64 / 4000, 256 * 256 / 4000


def test_between_two_looks_of_an_observer_that_looks_seldom_nobody_is_taken_for_silent(tmp_path: Path) -> None:
    observer = Observer(tmp_path, "L", 1, 2, 1.0, 1.25)  # rank 1 of 2: its first look is half of the second later
    began, number = time.monotonic(), 0
    while not observer.has_looked_long_enough or time.monotonic() - began < 6.0:
        number += 1
        write_record(heartbeat_file(tmp_path, 0), heartbeat(0, beat=number))
        time.sleep(0.1)
        if time.monotonic() - began > 1.5:
            assert observer.missing() == ""
    last = time.monotonic()
    while not observer.missing() and time.monotonic() - last < 20:
        time.sleep(0.05)
    observer.close()
    assert "rank 0 on node2 has not been heard of for" in observer.missing()
    assert 0.2 < time.monotonic() - last < 10  # 3.2 s of silence, and its last beat may have been seen up to 1.25 s later


LOOKS = """
import os, sys, time
from pathlib import Path
from m2mkd_ds.distributed.watch.watchdog import Watchdog, Watched
opened = []
def hook(event, arguments):
    if event == "open" and os.path.basename(str(arguments[0])).startswith("rank-"):
        opened.append(arguments[0])
sys.addaudithook(hook)
began = time.monotonic()
dog = Watchdog(Watched(Path(sys.argv[1]), "L", 0, 90, {}, 1.0, lambda *_: None, lambda: True))
dog.start()
time.sleep(3)
dog.stop()
print(len(opened), time.monotonic() - began)
"""


def test_a_rank_of_many_that_was_asked_to_stop_reads_the_others_heartbeats_seldom(tmp_path: Path) -> None:
    for rank in range(1, 90):
        write_record(heartbeat_file(tmp_path, rank), heartbeat(rank))
    done = subprocess.run([sys.executable, "-c", LOOKS, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True)
    opened, seconds = map(float, done.stdout.split())
    # Every 90 * 90 / 4000 = 2.025 s, and not four times a second.
    assert 89 <= opened <= 90 * (seconds / 2.025 + 1)


def test_records_of_another_launch_and_broken_ones_are_not_read(tmp_path: Path) -> None:
    write_record(heartbeat_file(tmp_path, 1), heartbeat(1, launch="earlier"))
    write_record(failure_file(tmp_path, 1), failure(1, launch="earlier"))
    (tmp_path / "failed-2.json").write_text('{"half": ')
    (tmp_path / "failed-3.json").write_text('{"rank": 3, "launch": "L"}')
    assert read_heartbeats(tmp_path, "L") == {} and read_failures(tmp_path, "L") == {}
    assert read_failures(tmp_path) == {1: failure(1, launch="earlier")}
    remove_records(tmp_path)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == []


HUNG = """
import sys, time
from pathlib import Path
from m2mkd_ds.distributed.watch.activity import section
from m2mkd_ds.distributed.watch.records import Failure, failure_file, write_record
from m2mkd_ds.distributed.watch.watchdog import Watchdog, Watched
folder = Path(sys.argv[1])
def on_end(text, where, code):
    (folder / "said").write_text(f"{code} {where.describe()} {text}")
limits = {"step": 2.0, "eval": 0.0}
Watchdog(Watched(folder, "L", 0, 1, limits, 0.2, on_end, lambda: "stop" in sys.argv)).start()
with section("train", limit="step"):
    for _ in range(2):  # longer than the limit altogether: every section begins anew
        with section("forward", step=1):
            for _ in range(30):
                time.sleep(0.05)
    with section("evaluate", limit="eval"):  # no limit
        time.sleep(2.5)
    print("alive", flush=True)
    with section("forward", step=2, pair=0):
        time.sleep(60)
"""


@dataclass(frozen=True)
class Child:
    """A process that ran HUNG, and what came of it."""

    code: int
    out: str
    said: str
    idle_s: float
    """From `alive` to its end."""


def run_hung(folder: Path, *words: str, script: str = HUNG, freeze_s: float = 0.0) -> Child:
    child = subprocess.Popen([sys.executable, "-c", script, str(folder), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if freeze_s:
        deadline = time.monotonic() + 60
        while not heartbeat_file(folder, 0).exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGSTOP)
        time.sleep(freeze_s)
        child.send_signal(signal.SIGCONT)
    assert child.stdout is not None
    out = child.stdout.readline()
    began = time.monotonic()
    rest, said = child.communicate(timeout=60)
    return Child(child.returncode, out + rest, said, time.monotonic() - began)


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Child]]:
    """Side by side, because they mostly sleep."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("hung", "frozen", "bereft", "asked", "short")}
    write_record(failure_file(folders["bereft"], 1), failure(1))
    write_record(heartbeat_file(folders["short"], 1), heartbeat(1))
    short = HUNG.replace("0, 1, limits, 0.2", "0, 2, limits, 1.0").replace('"step": 2.0', '"step": 1.0').replace("range(30)", "range(200)")
    unlimited = HUNG.replace('"step": 2.0', '"step": 0.0').replace("time.sleep(2.5)", "time.sleep(0)")
    with ThreadPoolExecutor() as pool:
        running = {
            "hung": pool.submit(run_hung, folders["hung"]),
            "frozen": pool.submit(run_hung, folders["frozen"], freeze_s=4.0),
            "bereft": pool.submit(run_hung, folders["bereft"], "stop", script=unlimited),
            "short": pool.submit(run_hung, folders["short"], script=short),
            "asked": pool.submit(run_hung, folders["asked"], "stop", script=unlimited.replace("time.sleep(60)", "time.sleep(7)")),
        }
        return {name: (folders[name], future.result()) for name, future in running.items()}


def test_a_process_that_stands_still_dumps_its_threads_and_ends_with_76(children: dict[str, tuple[Path, Child]]) -> None:
    folder, child = children["hung"]
    assert child.out == "alive\n" and child.code == HANG_CODE == 76 and 1.5 < child.idle_s < 7
    line = "this rank (0) stays in `forward` of step 2, pair 0 since 2 s (limit: watch.step_s=2)"
    assert child.said.strip() == f"m2mkd_ds: hung: {line}; stacks: {folder / 'heartbeats' / 'stack-0.txt'}"
    assert (folder / "said").read_text() == f"76 `forward` of step 2, pair 0 {line}"
    assert 'File "<string>", line 21 in <module>' in (folder / "heartbeats" / "stack-0.txt").read_text()
    assert json.loads((folder / "heartbeats" / "rank-0.json").read_text())["section"] == "forward"


def test_a_process_that_was_itself_frozen_for_longer_than_the_limit_goes_on(children: dict[str, tuple[Path, Child]]) -> None:
    _, child = children["frozen"]
    assert child.out == "alive\n" and "of step 2" in child.said


def test_a_rank_asked_to_stop_leaves_when_another_one_is_dead_and_it_stands_still(children: dict[str, tuple[Path, Child]]) -> None:
    _, child = children["bereft"]
    assert child.code == 1 and child.idle_s > 4
    assert ": ValueError: no such shard; this rank leaves `forward` of step 2, pair 0" in child.said


def test_a_rank_asked_to_stop_may_take_its_time_while_nobody_is_dead(children: dict[str, tuple[Path, Child]]) -> None:
    _, child = children["asked"]
    assert child.code == 0 and child.said == ""


def test_with_a_limit_shorter_than_silence_takes_to_be_known_the_silent_rank_is_named_all_the_same(
    children: dict[str, tuple[Path, Child]]
) -> None:
    _, child = children["short"]
    assert child.code == HANG_CODE and "hung: rank 1 on node2 has not been heard of for" in child.said
