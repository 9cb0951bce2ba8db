"""`m2mkd doctor --cluster HOSTFILE`: ask every host, judge the answers, then start a small real job over all of them.

    hostfile -> ask (ssh, probe) -> judge -> exchange (deepspeed over pdsh, all-reduce and all-to-all) -> table, problems, speeds
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from m2mkd_ds import __version__
from m2mkd_ds.config import ConfigError, LaunchConfig, RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.train.launching.cluster_doctor import exchange, judge
from m2mkd_ds.train.launching.cluster_doctor.ask import Answer, ask_hosts
from m2mkd_ds.train.launching.cluster_doctor.probe import PACKAGES, token_file, version_of
from m2mkd_ds.train.launching.hostfile import read_hostfile, with_meeting_point
from m2mkd_ds.train.launching.launch import cluster_environment, launch_command, launch_environment

LAUNCH_LIMIT_S = 120.0


@dataclass(frozen=True)
class Diagnosis:
    """What was found: a row a host, problems and notes as lines, and the measurements of the small job (None when it did not run)."""

    rows: list[tuple[str, ...]]
    problems: list[str]
    notes: list[str]
    exchange: dict[str, Any] | None

    def text(self) -> str:
        """For people: table, notes, speeds, and the problems last."""
        lines = [judge.format_rows([judge.COLUMNS, *self.rows]), "", *(f"note: {note}" for note in self.notes)]
        if self.exchange:
            lines.append(
                f"small job: {len(self.exchange['ranks'])} ranks, all-reduce and all-to-all brought the right numbers; latency "
                f"{self.exchange['latency_us']:.0f} us, all-reduce {self.exchange['all_reduce_gbs']:.2f} GB/s, "
                f"all-to-all {self.exchange['all_to_all_gbs']:.2f} GB/s a rank"
            )
        lines += [f"PROBLEM {problem}" for problem in self.problems] or ["no problem found"]
        return "\n".join(lines)

    def as_json(self) -> str:
        """For programs."""
        hosts = [dict(zip(judge.COLUMNS, row, strict=True)) for row in self.rows]
        return json.dumps({"hosts": hosts, "problems": self.problems, "notes": self.notes, "exchange": self.exchange}, indent=1)


def diagnose(hostfile: Path, config: RunConfig | None) -> Diagnosis:
    """Examine the hosts of `hostfile`, with `config` also the run's folder and shards. Raises ConfigError for what is wrong here."""
    # As many ranks as there are slots, whatever the run uses of them.
    launch = replace(config.launch if config else LaunchConfig(), hostfile=str(hostfile.resolve()), num_gpus=0)
    slots = read_hostfile(hostfile)
    settled = with_meeting_point(launch, str(hostfile.resolve()))
    token = secrets.token_hex(8)
    run_dir = str(Path(config.run_dir).resolve()) if config else ""
    shards = {part: ShardIndex.load(getattr(config.data, part)).fingerprint for part in ("train", "validation")} if config else {}
    expected = judge.Expected(_own_versions(), platform.python_version(), sys.executable, slots, token, run_dir, shards)
    request = {
        "master": _master(settled), "run_dir": run_dir, "token": token,
        "train": config.data.train if config else "", "validation": config.data.validation if config else "",
    }  # fmt: skip
    with _marked(run_dir, token):
        answers = ask_hosts(list(slots), request)
    problems = [line for answer in answers for line in judge.problems_of(answer, expected)]
    measured = None
    if all(answer.facts is not None for answer in answers):
        measured, trouble = _small_job(settled, sum(slots.values()))
        problems += trouble
    else:
        problems.append("small job: not started, because a host did not answer")
    return Diagnosis(_rows(answers, expected), problems, [line for answer in answers for line in judge.notes_of(answer)], measured)


def _rows(answers: list[Answer], expected: judge.Expected) -> list[tuple[str, ...]]:
    return [judge.table_row(answer, expected) for answer in answers]


def _own_versions() -> dict[str, str]:
    return {"m2mkd_ds": __version__, **{name: version_of(name) for name in PACKAGES}}


def _master(settled: LaunchConfig) -> str:
    words = iter(settled.extra)
    for word in words:
        if word == "--master_addr":
            return next(words)
        if word.startswith("--master_addr="):
            return word.partition("=")[2]
    raise ConfigError("launch.extra: --master_addr has no address")


@contextmanager
def _marked(run_dir: str, token: str) -> Iterator[None]:
    """While the hosts look, a file in the run folder tells that it is this one."""
    if not run_dir:
        yield
        return
    file = token_file(run_dir, token)
    file.write_text(token)
    try:
        yield
    finally:
        file.unlink()


def _small_job(settled: LaunchConfig, ranks: int) -> tuple[dict[str, Any] | None, list[str]]:
    """The measurements, or a line that says why there are none."""
    with tempfile.TemporaryDirectory(prefix="m2mkd_doctor_") as scratch:
        environment = cluster_environment(launch_environment(settled, os.environ), Path(scratch) / "launch.env")
        command = launch_command(settled, [], module="m2mkd_ds.train.launching.cluster_doctor.exchange")
        code, output = _run_bounded(command, environment)
    answers = [line.partition(exchange.MARK)[2] for line in output.splitlines() if exchange.MARK in line]
    if not answers:
        return None, [f"small job: {_reason(code, output)}; try the same by hand, or look at firewalls between the hosts"]
    measured = json.loads(answers[-1])
    if len(measured["ranks"]) != ranks:
        return measured, [f"small job: {len(measured['ranks'])} ranks came and the hostfile has {ranks} slots; check launch.extra"]
    return measured, []


def _run_bounded(command: list[str], environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Exit code (None when out of time) and output.

    Out of time, the launcher is killed without a chance to clean up: its way to do that would end other jobs of this user. The
    ranks end by their own alarm.
    """
    job = subprocess.Popen(
        command, env=dict(environment), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = job.communicate(timeout=LAUNCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        output, _ = job.communicate()
        return None, output
    return job.returncode, output


def _reason(code: int | None, output: str) -> str:
    """The line of the ranks' output that says most: the last error, without the frames that lead to it."""
    said = [line.strip() for line in output.splitlines() if "Error" in line or "error" in line]
    what = f"no end within {LAUNCH_LIMIT_S:.0f} s" if code is None else f"exit code {code}"
    return f"{what} ({said[0] if said else 'no message'})"
