"""One run that is stopped, hung and killed in every way, and goes on each time as if nothing had happened.

Two ranks with a loader worker each, by the real launcher. Each start goes on from what the one before has left; at the end the weights
are those of a run that nobody disturbed, bit for bit, and so are the scores of its evaluations. `stopped` is one such run; `frozen`,
whose launcher takes half a minute to kill a frozen rank, another, for the slow tests.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.distributed.watch.processes import Process, parent_of
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.train.pipeline import write_config
from tests.launching import free_port, launcher_command, rank_environment
from tests.processes import descendants, still_there
from tests.train import stop_job
from tests.train.kill_resume_job import PHASE, STEPS
from tests.train.stop_job import EVAL_STEPS, LIMIT_S, stop_config
from tests.train.test_train_kill_resume import write_noise

SCRIPT = Path(stop_job.__file__)
pytestmark = pytest.mark.timeout(1800)  # eight launches, on a machine that may be busy


@dataclass
class Job:
    """A running job, and what is known of it."""

    process: subprocess.Popen[str]
    folder: Path
    """RUN/<phase>."""
    everybody: list[Process] = field(default_factory=list)
    """Launcher, ranks, workers and the workers' server, as they were when the test struck."""

    def rank(self, number: int) -> int:
        """Its process id, by its heartbeat."""
        return int(json.loads((self.folder / "heartbeats" / f"rank-{number}.json").read_text())["pid"])

    def above(self, number: int) -> int:
        """The launcher's processes: 1 is launch.py, 2 the `deepspeed` command."""
        pid = self.rank(0)
        for _ in range(number):
            pid = parent_of(pid)
        return pid


@dataclass
class Ended:
    """How a job ended."""

    code: int
    output: str
    seconds: float
    """From the strike to the last record, which rank 0 writes just before it leaves."""
    left: list[str]
    """Processes that were still there ten seconds later."""
    outcome: dict[str, Any]
    failures: dict[int, dict[str, Any]]


def strike(out: Path, run: str, place: str, fault: Callable[[Job], None], *, verb: str = "pipeline", release_s: float = 0.5) -> Ended:
    """Start the run, wait until both ranks stand at `place`, do `fault`, let them go on after `release_s`."""
    mark = f"{run}.{place.replace(':', '')}"
    config = out / run / "config.yaml"
    words = [str(SCRIPT), str(out), mark, place]
    if verb == "pipeline":
        command = [sys.executable, *words, "pipeline", "--config", str(config), "--until", PHASE]
    else:
        command = [*launcher_command(2, free_port()), *words, "train", "--config", str(config), "--phase", PHASE]
    with started(out, run, command) as job:
        wait_until(lambda: all((out / f"{mark}.ready.{rank}").exists() for rank in (0, 1)), job, 300)
        time.sleep(1.2)  # heartbeats tell where the ranks are
        job.everybody = descendants(job.process.pid)
        began = time.time()
        fault(job)
        time.sleep(release_s)
        (out / f"{mark}.go").touch()
        output, _ = job.process.communicate(timeout=400)
        left = [process.command for process in still_there(job.everybody, 10)]
        outcome, failures = records(job.folder)
        return Ended(job.process.returncode, output, outcome["time"] - began, left, outcome, failures)


@contextmanager
def started(out: Path, run: str, command: list[str]) -> Iterator[Job]:
    job = Job(
        subprocess.Popen(
            command, env=rank_environment(out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
        ),
        out / run / PHASE,
    )  # fmt: skip
    try:
        yield job
    finally:
        if job.process.poll() is None:
            job.process.kill()
        for process in job.everybody:
            if process.is_alive:
                with suppress(ProcessLookupError):  # it has ended this very moment
                    os.kill(process.pid, signal.SIGKILL)


def wait_until(condition: Callable[[], bool], job: Job, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.process.poll() is None, job.process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def records(folder: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
    failures = [json.loads(file.read_text()) for file in folder.glob("failed-*.json")]
    return json.loads((folder / "outcome.json").read_text()), {failure["rank"]: failure for failure in failures}


def run_free(out: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), str(out), name, "free", "pipeline", "--config", str(out / name / "config.yaml")]
    return subprocess.run(
        [*command, "--until", PHASE], env=rank_environment(out), capture_output=True, text=True, timeout=400, check=False
    )  # fmt: skip


@dataclass(frozen=True)
class Course:
    """What happened to a run, in order; the undisturbed one lies beside it."""

    out: Path
    strikes: dict[str, Ended]
    last: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stopping")
    write_noise(out / "shards")
    for name in ("straight", "stopped", "frozen"):
        write_config(stop_config(out, name))
    straight = run_free(out, "straight")
    assert straight.returncode == 0, straight.stderr[-4000:]
    return out


@pytest.fixture(scope="module")
def course(out: Path) -> Course:
    strikes = {
        "signalled_rank": strike(out, "stopped", "step:2", lambda job: os.kill(job.rank(1), signal.SIGTERM), verb="train"),
        "in_evaluation": strike(out, "stopped", "evaluate", lambda job: job.process.send_signal(signal.SIGINT)),
        "runner_killed": strike(out, "stopped", "step:7", lambda job: os.kill(job.above(2), signal.SIGKILL), release_s=3.0),
        "rank_killed": strike(out, "stopped", "step:11", lambda job: os.kill(job.rank(1), signal.SIGKILL), release_s=1.0),
    }
    return Course(out, strikes, run_free(out, "stopped"))


@pytest.fixture(scope="module")
def slow_course(out: Path) -> Course:
    strikes = {
        "launcher_signalled": strike(out, "frozen", "step:2", lambda job: os.kill(job.above(1), signal.SIGTERM)),
        "rank_frozen": strike(out, "frozen", "step:4", lambda job: os.kill(job.rank(1), signal.SIGSTOP)),
    }
    return Course(out, strikes, run_free(out, "frozen"))


SAVED = {"signalled_rank": 2, "in_evaluation": EVAL_STEPS, "runner_killed": 7, "launcher_signalled": 2}
"""Step that each request to stop saves."""


def asserts_stopped(ended: Ended, step: int) -> None:
    assert ended.code == 75, ended.output[-4000:]
    assert (ended.outcome["state"], ended.outcome["step"], ended.outcome["exit_code"]) == ("stopped", step, 75)
    assert ended.failures == {} and ended.seconds < 25 and ended.left == []
    assert ended.output.count("stopped on request") == 1  # and not once a rank
    assert f"m2mkd: stopped on request in {PHASE} at step {step} ({ended.outcome['cause']}); the same command goes on" in ended.output


def asserts_undisturbed(course: Course, run: str) -> None:
    assert course.last.returncode == 0, course.last.stderr[-4000:]
    straight, other = (load_file(course.out / name / PHASE / "weights.safetensors") for name in ("straight", run))
    assert straight.keys() == other.keys() and all(torch.equal(straight[key], other[key]) for key in straight)


@pytest.mark.parametrize("name", ["signalled_rank", "in_evaluation", "runner_killed"])
def test_a_request_to_stop_saves_the_step_on_all_ranks_exits_75_in_time_and_leaves_no_process(course: Course, name: str) -> None:
    asserts_stopped(course.strikes[name], SAVED[name])


def test_the_record_says_who_asked(course: Course) -> None:
    causes = {name: ended.outcome["cause"] for name, ended in course.strikes.items()}
    assert causes["runner_killed"].startswith("the launcher's process ") and "deepspeed.launcher.runner" in causes["runner_killed"]
    assert causes["in_evaluation"] == "SIGINT"  # the pipeline got it; the ranks got SIGTERM
    assert causes["signalled_rank"] == "rank 1: SIGTERM"  # rank 0 writes
    assert course.strikes["signalled_rank"].outcome["launcher"] == "deepspeed"


def test_a_killed_rank_is_missed_and_named_by_the_other_one(course: Course) -> None:
    ended = course.strikes["rank_killed"]
    assert ended.code == 1 and ended.left == []
    assert ended.failures.keys() == {0} and ended.failures[0]["kind"] == "peer"
    assert " has gone without a word: killed? last seen in `forward` of step 11, pair 0" in ended.failures[0]["cause"]
    assert ended.outcome["state"] == "failed" and ended.seconds < 25
    assert f"m2mkd_ds {PHASE} failed on rank 0 (host " in ended.output and " at step 11, in " in ended.output


def test_the_weights_are_those_of_the_undisturbed_run_bit_for_bit(course: Course) -> None:
    asserts_undisturbed(course, "stopped")


@pytest.mark.slow
def test_a_signal_to_the_launcher_on_a_host_stops_all_ranks(slow_course: Course) -> None:
    asserts_stopped(slow_course.strikes["launcher_signalled"], SAVED["launcher_signalled"])
    assert slow_course.strikes["launcher_signalled"].outcome["cause"] == "SIGTERM"


@pytest.mark.slow
def test_a_frozen_rank_is_named_with_its_section_and_the_job_ends(slow_course: Course) -> None:
    ended = slow_course.strikes["rank_frozen"]
    assert ended.code == 76 and ended.left == []
    diagnosis = ended.failures[0]
    assert diagnosis["kind"] == "hang" and diagnosis["rank"] == 0
    assert "rank 1 on " in diagnosis["cause"] and "has not been heard of for" in diagnosis["cause"]
    assert "last seen in `forward` of step 4, pair 0;" in diagnosis["cause"]
    # DeepSpeed reduces gradients inside `backward`.
    assert "; this rank (0) stays in `backward` of step 4, pair 0 since " in diagnosis["cause"]
    assert f"m2mkd_ds: hung: {diagnosis['cause']}" in ended.output
    assert f"m2mkd: m2mkd_ds {PHASE} failed on rank 0 (host " in ended.output


@pytest.mark.slow
def test_the_diagnosis_comes_within_five_seconds_of_the_limit(slow_course: Course) -> None:
    # Rank 0 goes on 0.5 s after the strike, and waits for rank 1 from then on.
    waited = slow_course.strikes["rank_frozen"].outcome["time"] - os.stat(slow_course.out / "frozen.step4.go").st_mtime
    assert LIMIT_S - 1 < waited < LIMIT_S + 5


@pytest.mark.slow
def test_after_a_frozen_rank_the_weights_are_those_of_the_undisturbed_run(slow_course: Course) -> None:
    asserts_undisturbed(slow_course, "frozen")


def test_evaluations_that_a_stop_left_out_are_made_up_for(course: Course) -> None:
    scores, keys = {}, {}
    for name in ("straight", "stopped"):
        every = read_metrics(course.out / name / PHASE / "metrics.jsonl")
        keys[name] = [(line["step"], line.keys()) for line in every]
        lines = [line for line in every if "eval/top1" in line]
        scores[name] = [(line["step"], line["eval/top1"], line["eval/loss"]) for line in lines]
    assert [step for step, _, _ in scores["straight"]] == [EVAL_STEPS, 2 * EVAL_STEPS, STEPS]
    assert scores["stopped"] == scores["straight"]
    assert keys["stopped"] == keys["straight"]  # in the line of their step


def test_a_run_that_ended_well_has_its_record_and_no_heartbeats(course: Course) -> None:
    outcome, failures = records(course.out / "stopped" / PHASE)
    assert (outcome["state"], outcome["step"], failures) == ("done", STEPS, {})
    assert list((course.out / "stopped" / PHASE / "heartbeats").iterdir()) == []
