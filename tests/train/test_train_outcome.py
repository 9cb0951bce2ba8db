"""What the records of a job say about its end, and requests to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import LaunchConfig, WatchConfig
from m2mkd_ds.distributed.start.rendezvous import GivenUpError
from m2mkd_ds.distributed.watch.processes import Process, seen, start_time
from m2mkd_ds.distributed.watch.records import Failure, Heartbeat, failure_file, heartbeat_file, read_failures, write_record
from m2mkd_ds.distributed.world import World
from m2mkd_ds.train import run_phase
from m2mkd_ds.train.ending.closed_output import outliving_readers
from m2mkd_ds.train.ending.guard import _Guard, exit_code, guarded
from m2mkd_ds.train.ending.outcome import FILE_NAME, JobRecords, Outcome, read_outcome, write_outcome
from m2mkd_ds.train.ending.stopping import (
    SAME_REQUEST_S,
    UNDER_PIPELINE,
    StopFlag,
    StopRequested,
    _Listener,
    launcher_chain,
    listening,
    reason_of,
    tells_of_stop,
)
from m2mkd_ds.train.loop import NonFiniteLossError
from m2mkd_ds.train.pipeline import write_config
from tests.launching import rank_environment
from tests.train import stop_job
from tests.train.kill_resume_job import PHASE
from tests.train.stop_job import stop_config
from tests.train.test_train_kill_resume import write_noise


def failure(rank: int, kind: str, at: float, code: int = 1, cause: str = "ValueError: no such shard") -> Failure:
    return Failure(
        launch="L", rank=rank, host="node2", pid=1, time=at, kind=kind, cause=cause, where="`forward` of step 12, pair 0", step=12,
        slots="range(88, 92)", exit_code=code,
    )  # fmt: skip


def heartbeat(rank: int, at: float) -> Heartbeat:
    return Heartbeat(
        launch="L", rank=rank, host="node2", pid=1, pid_started="1", space="", beat=1, time=at, step=12, section="forward",
        describes="`forward` of step 12, pair 0", may_wait=False, since_s=3.0,
    )  # fmt: skip


def records(folder: Path, *names: str) -> JobRecords:
    return JobRecords(folder, names or ("end_to_end",), 0.2)


def test_the_failure_that_explains_the_others_is_told_with_rank_host_step_and_slots(tmp_path: Path) -> None:
    folder = tmp_path / "end_to_end"
    write_outcome(folder, Outcome(state="failed", phase="end_to_end", launch="L", cause="lost a peer"))
    # Rank 0 lost its peer before rank 1, the cause, had written why; rank 2 hung even earlier.
    for rank, kind, at in ((0, "peer", 1.0), (1, "own", 3.0), (2, "hang", 0.5)):
        write_record(failure_file(folder, rank), failure(rank, kind, at, code=77 if kind == "own" else 1))
    ending = records(tmp_path).ending()
    assert ending.text == (
        "m2mkd_ds end_to_end failed on rank 1 (host node2) at step 12, in `forward` of step 12, pair 0 (slots range(88, 92)): "
        "ValueError: no such shard"
    )
    assert (ending.state, ending.step, ending.code) == ("failed", 12, 77)


def test_a_job_that_was_killed_without_a_word_is_told_by_its_oldest_heartbeat(tmp_path: Path) -> None:
    folder = tmp_path / "end_to_end"
    write_outcome(folder, Outcome(state="running", phase="end_to_end", launch="L"))
    assert "no rank has left a heartbeat: killed by a signal?" in records(tmp_path).ending().text
    for rank, at in ((0, time.time()), (1, time.time() - 60)):
        write_record(heartbeat_file(folder, rank), heartbeat(rank, at))
    ending = records(tmp_path).ending()
    assert ending.state == "running" and ending.code == 1
    assert ending.text == (
        "end_to_end ended without a record: killed by a signal? last heartbeat of rank 1 on node2, 60 s ago: at step 12, in `forward` of "
        "step 12, pair 0"
    )


def test_the_first_phase_that_is_not_done_tells_the_ending_of_a_launch(tmp_path: Path) -> None:
    write_outcome(tmp_path / "m2mkd", Outcome(state="done", phase="m2mkd", launch="L"))
    write_outcome(tmp_path / "end_to_end", Outcome(state="stopped", phase="end_to_end", launch="M", step=7, cause="SIGTERM", exit_code=75))
    ending = records(tmp_path, "m2mkd", "end_to_end", "baseline").ending()
    assert (ending.state, ending.phase, ending.step, ending.text) == ("stopped", "end_to_end", 7, "SIGTERM")
    assert records(tmp_path, "m2mkd", "baseline").ending().text.startswith("baseline left no record: it ended before its first step")


def test_the_last_word_of_a_rank_of_an_earlier_launch_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "end_to_end"
    write_outcome(folder, Outcome(state="done", phase="end_to_end", launch="L", step=9))
    late = replace(failure(1, "hang", 3.0), launch="earlier")
    write_record(failure_file(folder, 1), late)
    assert records(tmp_path).ending().state == "done"
    earlier = _Guard("end_to_end", folder, "earlier", World(0, 2, 0, 2, torch.device("cpu")), 0.2)
    earlier.record(late)
    assert read_outcome(folder) is not None and records(tmp_path).ending().state == "done"
    replace(earlier, launch="L").record(failure(0, "own", 4.0))
    assert records(tmp_path).ending().state == "failed"


@pytest.mark.parametrize(
    ("error", "state", "beats"),
    [(None, "done", False), (StopRequested("end_to_end", 7, "SIGTERM"), "stopped", False), (KeyError("x"), "failed", True)],
)
def test_only_a_rank_that_did_not_end_well_leaves_its_heartbeat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None, state: str, beats: bool
) -> None:
    monkeypatch.setattr("m2mkd_ds.train.ending.guard.broadcast_object", lambda value, what: value)
    world = World(0, 1, 0, 1, torch.device("cpu"))
    with suppress(StopRequested, KeyError), guarded(WatchConfig(), world, "end_to_end", tmp_path, StopFlag()):
        assert heartbeat_file(tmp_path, 0).exists()
        if error is not None:
            raise error
    outcome = read_outcome(tmp_path)
    assert outcome is not None and outcome.state == state and heartbeat_file(tmp_path, 0).exists() == beats


def test_records_of_an_earlier_launch_are_cleared(tmp_path: Path) -> None:
    folder = tmp_path / "end_to_end"
    write_outcome(folder, Outcome(state="stopped", phase="end_to_end", launch="L"))
    write_record(failure_file(folder, 1), failure(1, "own", 3.0))
    write_record(heartbeat_file(folder, 1), heartbeat(1, 1.0))
    (folder / "metrics.jsonl").touch()
    records(tmp_path).clear()
    assert read_outcome(folder) is None and read_failures(folder) == {}
    assert [file.name for file in folder.rglob("*") if file.is_file()] == ["metrics.jsonl"]


def test_a_record_of_another_version_is_no_record(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"state": "done", "of": "another version"}')
    assert read_outcome(tmp_path) is None


def test_ranks_left_behind_are_waited_for_as_long_as_they_show_signs_of_life(tmp_path: Path) -> None:
    folder = tmp_path / "end_to_end"
    write_outcome(folder, Outcome(state="running", phase="end_to_end", launch="L"))
    first = heartbeat(1, time.time())
    script = (
        "import sys, time; from pathlib import Path; from m2mkd_ds.distributed.watch.records import *\n"
        "for beat in range(30):\n"
        f"    write_record(heartbeat_file(Path(sys.argv[1]), 1), {asdict(first)} | {{'beat': beat, 'time': time.time()}})\n"
        "    time.sleep(0.1)\n"
    )
    beating = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    try:
        while not heartbeat_file(folder, 1).exists():
            time.sleep(0.05)
        began = time.monotonic()
        records(tmp_path).await_end(60)
        assert beating.poll() is not None or time.monotonic() - began > 2.5
        assert time.monotonic() - began < 20
    finally:
        beating.kill()
        beating.wait()


def test_exit_codes_follow_the_error() -> None:
    assert exit_code(NonFiniteLossError("x")) == 77
    assert [exit_code(error) for error in (ValueError("x"), FileNotFoundError("x"), RuntimeError("x"))] == [2, 2, 1]


def test_the_first_signal_asks_and_the_same_again_later_ends_at_once() -> None:
    now, ended = [0.0], list[int]()
    flag = StopFlag()
    listener = _Listener(flag, -1, (), ended.append, clock=lambda: now[0])
    listener.hear(signal.SIGCHLD)
    assert not flag()
    listener.hear(signal.SIGUSR1)
    assert flag() and flag.why == "SIGUSR1"
    now[0] = SAME_REQUEST_S / 2
    listener.hear(signal.SIGUSR1)  # the same request by another way
    now[0] = 60.0
    listener.hear(signal.SIGTERM)  # Slurm's second word, while the checkpoint is being written
    assert ended == [] and flag.why == "SIGUSR1"
    now[0] = 61.0
    listener.hear(signal.SIGUSR1)
    assert ended == [signal.SIGUSR1]
    flag.leaving = True
    listener.hear(signal.SIGUSR1)
    assert ended == [signal.SIGUSR1]


SPEAKS = """
import ctypes
from m2mkd_ds.train.ending.stopping import StopFlag, listening
with listening(StopFlag(), ()):
    print("ready", flush=True)
    while ctypes.CDLL(None).pause():
        pass
"""


def test_the_same_signal_again_ends_a_process_whose_main_thread_waits() -> None:
    child = subprocess.Popen([sys.executable, "-c", SPEAKS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGUSR1)
    time.sleep(SAME_REQUEST_S + 0.5)
    assert child.poll() is None
    child.send_signal(signal.SIGUSR1)
    _, said = child.communicate(timeout=20)
    assert child.returncode == 128 + signal.SIGUSR1
    assert said.strip() == "m2mkd_ds: SIGUSR1 again: ending at once; what was not saved is lost"


def test_handlers_are_put_back_and_a_launcher_that_dies_asks_to_stop() -> None:
    launcher = subprocess.Popen(["sleep", "60"])
    process = seen(launcher.pid)
    while isinstance(process, Process) and process.command != "sleep 60":  # Popen returns a moment before /proc has the new words
        time.sleep(0.01)
        process = seen(launcher.pid)
    assert isinstance(process, Process) and process.is_alive
    flag, before = StopFlag(), signal.getsignal(signal.SIGUSR1)
    with listening(flag, [process]):
        assert not flag()
        launcher.kill()
        deadline = time.monotonic() + 10
        while not flag() and time.monotonic() < deadline:
            time.sleep(0.05)
    launcher.wait()
    assert flag.why == f"the launcher's process {launcher.pid} (sleep 60) has gone"
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_process_started_by_nohup_outlives_its_parent_and_a_rank_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.delenv("RANK", raising=False)
        assert launcher_chain() == []
        monkeypatch.setenv("RANK", "0")
        assert [process.pid for process in launcher_chain()] == [os.getppid()]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_rank_0_tells_of_a_stop_unless_a_pipeline_lives_that_does() -> None:
    pipeline = Process(os.getpid(), start_time(os.getpid()), "python -m m2mkd_ds pipeline --recipe tiny")
    gone = replace(pipeline, started="1")
    assert [tells_of_stop(rank, [], {}) for rank in (0, 1)] == [True, False]
    assert [tells_of_stop(rank, [pipeline], {UNDER_PIPELINE: "1"}) for rank in (0, 1)] == [False, False]
    assert not tells_of_stop(0, [], {UNDER_PIPELINE: "1"})  # on another host the pipeline is not seen
    assert [tells_of_stop(rank, [pipeline, gone], {UNDER_PIPELINE: "1"}) for rank in (0, 1)] == [True, False]
    assert not tells_of_stop(0, [replace(gone, command="deepspeed"), pipeline], {UNDER_PIPELINE: "1"})


def test_all_ranks_give_the_reason_of_the_first_that_knows_one() -> None:
    assert reason_of(["SIGINT", "SIGTERM"]) == "SIGINT"
    assert reason_of(["", "", "SIGUSR1", "SIGTERM"]) == "rank 2: SIGUSR1"


CLOSED = """
import sys, time
from m2mkd_ds.train.ending.closed_output import outliving_readers
with outliving_readers():
    sys.stdin.readline()
    print("lost", flush=True); print("lost", file=sys.stderr, flush=True); print("lost again", flush=True)
    open(sys.argv[1], "w").write("saved")
"""


def test_a_closed_output_does_not_end_a_process(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-u", "-c", CLOSED, str(tmp_path / "file")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin and child.stdout and child.stderr
    child.stdout.close()
    child.stderr.close()
    child.stdin.write(b"\n")
    child.stdin.close()
    assert child.wait(timeout=30) == 0 and (tmp_path / "file").read_text() == "saved"
    with outliving_readers():
        assert sys.stdout.fileno() >= 0  # everything else is passed on


def test_a_stop_names_phase_step_and_reason() -> None:
    text = str(StopRequested("m2mkd", 12, "SIGTERM"))
    assert text == "stopped on request in m2mkd at step 12 (SIGTERM); the same command goes on"


def test_a_loss_that_is_no_number_ends_a_run_with_77_and_a_record_of_its_slots(tmp_path: Path) -> None:
    """One rank without a launcher, by the verb `train`."""
    write_noise(tmp_path / "shards")
    config = write_config(replace(stop_config(tmp_path, "nan"), launch=LaunchConfig()))
    command = [sys.executable, str(stop_job.__file__), str(tmp_path), "nan", "nan:2", "train", "--config", str(config), "--phase", PHASE]
    done = subprocess.run(command, env=rank_environment(tmp_path), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 77, done.stderr[-4000:]
    # Two micro-batches of two images a step on one rank: the last one of the second step has slots 6 and 7.
    told = f"loss is NaN or infinite at step 1 ({PHASE}: slots [6, 7]); no weight was changed in this step"
    assert done.stderr.strip().splitlines()[-1] == f"m2mkd: {told}"
    failures = read_failures(tmp_path / "nan" / PHASE)
    assert (failures[0].kind, failures[0].cause, failures[0].step) == ("own", f"NonFiniteLossError: {told}", 2)
    outcome = read_outcome(tmp_path / "nan" / PHASE)
    assert outcome is not None
    assert (outcome.state, outcome.exit_code, outcome.step, outcome.launcher) == ("failed", 77, 2, "none")


def test_a_stop_before_the_job_is_joined_is_a_stop_with_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = stop_config(tmp_path, "early")

    def give_up(*_: object, give_up: StopFlag, **__: object) -> World:
        os.kill(os.getpid(), signal.SIGTERM)  # while the others are waited for
        deadline = time.monotonic() + 20
        while not give_up():  # a thread of the listener sets it
            assert time.monotonic() < deadline
            time.sleep(0.01)
        raise GivenUpError("stopped before the job was joined")

    monkeypatch.setattr(run_phase, "init_world", give_up)
    told = r"stopped on request in pretrain_meta before a step of this launch \(SIGTERM.*\); the same command goes on"
    with pytest.raises(StopRequested, match=told) as stopped:
        run_phase.run_phases(config, ["pretrain_meta"])
    assert not stopped.value.is_told
