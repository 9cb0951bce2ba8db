"""The `deepspeed` command of a phase, and running it: one config path travels, nothing else.

Over pdsh the launcher does not quote arguments, so only a path and plain words may be on the command line. What else ranks on other
hosts need stands in RUN/launch.env (`launch_env.py`); where they meet is settled by `hostfile.py`.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from m2mkd_ds.config import ConfigError, LaunchConfig
from m2mkd_ds.logs import logger
from m2mkd_ds.train.ending.outcome import JobRecords
from m2mkd_ds.train.ending.stopping import STOP_CODE, UNDER_PIPELINE, StopFlag, StopRequested, end_at_once, listening
from m2mkd_ds.train.launching.connections import MARK, cut_connections
from m2mkd_ds.train.launching.hostfile import with_meeting_point
from m2mkd_ds.train.launching.launch_env import KEEPALIVE, ignored_env_files, sent_environment, write_env_file

SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./=:,@+")


LEAVE_S = 15.0
"""How long processes of a job that has ended may take to leave."""


class LaunchError(RuntimeError):
    """A launched job failed, or left no result; the message says what its records tell, and the job's own is in the log above."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def launch_command(launch: LaunchConfig, verb: list[str], module: str = "m2mkd_ds") -> list[str]:
    """`deepspeed [flags] --module MODULE VERB...` as a list of words. Raises ConfigError for a word that a shell would change."""
    flags = ["--num_gpus", str(launch.num_gpus)] if launch.num_gpus else []
    if launch.hostfile:
        flags += ["--hostfile", launch.hostfile]
    # --quiet: the launcher's own dozen lines a start say nothing that the trainer's log does not.
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *flags, *launch.extra, "--module", module, *verb]
    # The launcher changes to this folder on every host, by a line that is not quoted either.
    for word in [*command, *([os.getcwd()] if launch.hostfile else [])]:
        if not set(word) <= SAFE:
            raise ConfigError(f"launcher argument {word!r} has a character that a remote shell would change; rename the folder or file")
    return command


def with_own_port(launch: LaunchConfig) -> LaunchConfig:
    """On this host alone, a port of its own for the job: two runs side by side would meet on the launcher's default one."""
    if launch.hostfile or "--master_port" in launch.extra:
        return launch
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return replace(launch, extra=("--master_port", str(port), *launch.extra))


def spell(command: list[str]) -> str:
    """The command as a person would type it."""
    return " ".join(_typed(command))


def spell_in_lines(command: list[str], width: int) -> str:
    """The same in lines of at most `width` columns, which a shell joins again. A flag stays beside its value, and no word is cut."""
    pieces: list[str] = []
    for word in _typed(command):
        if pieces and pieces[-1].startswith("-") and " " not in pieces[-1] and not word.startswith("-"):
            pieces[-1] += f" {word}"
        else:
            pieces.append(word)
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(f"{lines[-1]} {piece} \\") <= width:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    return " \\\n".join(lines)


def _typed(command: list[str]) -> list[str]:
    """Its words, quoted for a shell where that is needed."""
    words = ["deepspeed", *command[3:]] if command[1:3] == ["-m", "deepspeed.launcher.runner"] else command
    return [shlex.quote(word) for word in words]


def launch_environment(launch: LaunchConfig, base: Mapping[str, str]) -> dict[str, str]:
    """The ranks' environment: thread count, and the CPU accelerator named so that nothing is probed."""
    import torch

    environment = dict(base)
    if not torch.accelerator.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(launch.threads_per_rank))
    package_root = str(Path(__file__).resolve().parents[3])
    kernels = str(Path(package_root) / "kernels")
    # A checkout that was not installed must be found by the ranks as it was found here.
    known = environment.get("PYTHONPATH", "").split(os.pathsep)
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([p for p in (package_root, kernels, *known) if p]))
    return environment


def cluster_environment(base: Mapping[str, str], env_file: Path) -> dict[str, str]:
    """The launcher's environment for a job over a hostfile; `env_file`, what ranks elsewhere are told, is written.

    Links are watched, so that one that dies ends the job. Secrets go no further than here, and the log names them. Raises ConfigError
    for what would arrive changed (`launch_env.py`).
    """
    sent, secrets = sent_environment(base)
    if secrets:
        logger.warning(
            "%s not sent to other hosts: the launcher would put the value on a command line; let each host read it from a file",
            ", ".join(secrets),
        )
    for file in ignored_env_files(base, Path.cwd()) if "DS_ENV_FILE" not in base else []:
        logger.warning("%s is not used; set DS_ENV_FILE to it and its lines are sent as well", file)
    write_env_file(env_file, sent)
    logger.info("%s: %s are sent to every host", env_file, ", ".join(sent))
    environment = {name: value for name, value in base.items() if name not in secrets}
    # Behind what the user has: of two settings of one option ssh takes the first.
    ssh_options = f"{base.get('PDSH_SSH_ARGS_APPEND', '')} {KEEPALIVE}".strip()
    return {**environment, "DS_ENV_FILE": str(env_file), "PDSH_SSH_ARGS_APPEND": ssh_options}


def run_launched(launch: LaunchConfig, verb: list[str], records: JobRecords, run_dir: Path, *, patience_s: float = 1800.0) -> None:
    """Run the command to its end, which its `records` tell and not its exit code. A job over a hostfile puts launch.env into `run_dir`.

    Raises LaunchError when it failed or was killed, StopRequested when it was stopped on request. A request that comes to this process
    (SIGTERM, SIGINT, SIGUSR1) is handed on to the whole job, which may save for at most `patience_s`; the same signal again kills the job.
    The launcher runs in its own process group, because it leaves its ranks running when it alone is killed.
    """
    environment = {**launch_environment(launch, os.environ), UNDER_PIPELINE: "1"}
    mark = secrets.token_hex(8)
    if launch.hostfile:
        command = launch_command(with_meeting_point(launch, str(run_dir)), verb)
        environment = {**cluster_environment(environment, run_dir / "launch.env"), MARK: mark}
    else:
        command = launch_command(with_own_port(with_meeting_point(launch, "")), verb)
    records.clear()
    stop = StopFlag()
    process: list[subprocess.Popen[bytes]] = []

    def kill_job(number: int) -> None:
        for job in process:
            _signal_group(job, signal.SIGKILL)
        cut_connections(mark)
        end_at_once(number)

    def ask_to_stop() -> None:
        if launch.hostfile:
            # Each rank sees its launcher's shell end, saves and leaves. The launcher's own way, on SIGTERM, is a pkill that ends every
            # job of this user and environment on all hosts.
            cut_connections(mark)
        else:
            _signal_group(process[0], signal.SIGTERM)

    with listening(stop, (), kill_job):
        logger.info("starting the ranks; their first line may take half a minute")
        process.append(subprocess.Popen(command, env=environment, start_new_session=True))
        try:
            code = _wait(process[0], stop, ask_to_stop, patience_s)
            cut_connections(mark)  # those of a launcher that was killed are left
            # Ranks that the launcher has left behind notice it, save and leave.
            records.await_end(patience_s)
            _await_group(process[0])
        finally:
            _signal_group(process[0], signal.SIGKILL)
            cut_connections(mark)
    ending = records.ending()
    if ending.state == "failed":
        raise LaunchError(ending.text, ending.code)
    # Stopped before there was a job, a rank leaves no record, but its code.
    if ending.state == "stopped" or stop() or (ending.state == "running" and code == STOP_CODE):
        if stop():
            records.correct_cause(stop.why)
        raise StopRequested(ending.phase, ending.step, stop.why or ending.text)
    if code != 0 or ending.state == "running":
        # 0 is what the launcher returns, too, when it finds its own child killed.
        what = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise LaunchError(f"{spell(command)} ended with {what}; {ending.text or 'its message is above'}")


def run_here(launch: LaunchConfig, verb: list[str]) -> None:
    """Run a job of this host that keeps no records, such as a benchmark. Raises LaunchError for its exit code."""
    command = launch_command(with_own_port(launch), verb)
    process = subprocess.Popen(command, env=launch_environment(launch, os.environ), start_new_session=True)
    try:
        code = process.wait()
    finally:
        _signal_group(process, signal.SIGKILL)
    if code != 0:
        raise LaunchError(f"{spell(command)} ended with exit code {code}; its message is above")


def _wait(process: subprocess.Popen[bytes], stop: StopFlag, ask_to_stop: Callable[[], None], patience_s: float) -> int:
    """The launcher's exit code. Once `stop` is set, all of the job is asked to stop."""
    deadline = float("inf")
    while process.poll() is None:
        if stop() and deadline == float("inf"):
            deadline = time.monotonic() + patience_s
            logger.info("%s: asking the job to save and stop; the same again kills it", stop.why)
            ask_to_stop()
        if time.monotonic() > deadline:
            _signal_group(process, signal.SIGKILL)
        time.sleep(0.1)
    return process.wait()


def _await_group(process: subprocess.Popen[bytes]) -> None:
    """Until nobody is left of the launcher's process group, or `LEAVE_S` has passed: ranks that have saved still flush and close."""
    deadline = time.monotonic() + LEAVE_S
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    """To whoever is left of the launcher's process group."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return
