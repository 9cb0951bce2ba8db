"""Run a script on several CPU ranks by the real `deepspeed` launcher, and say what every rank printed when it fails.

One start costs several seconds of imports, so a test file bundles its checks: one script, one launch in a module-scoped
fixture, results written to a file (for example JSON in `out`), one small test for each fact.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class LaunchError(AssertionError):
    """The job failed or ran out of time; the message holds the command and the end of the ranks' output."""


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launcher_command(ranks: int, port: int) -> list[str]:
    """`deepspeed` of the running virtual environment, for this host only; the script and its arguments follow."""
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_addr", "127.0.0.1",
            "--master_port", str(port), "--quiet"]  # fmt: skip


def rank_environment(scratch: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of the job: CPU, one thread a rank, loopback, this checkout, and no compile cache shared with anybody."""
    env = dict(os.environ)
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [env.get("PYTHONPATH")])]
    env |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_EXTENSIONS_DIR": str(scratch / "torch_extensions"),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep))),
        "PYTHONFAULTHANDLER": "1",
    }
    return env | dict(extra or {})


def launch(
    script: Path | str,
    args: Sequence[str] = (),
    *,
    ranks: int = 2,
    module: bool = False,
    timeout_s: float = 180.0,
    env: Mapping[str, str] | None = None,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Run `script` (with `module`: a module name) with `args` on `ranks` CPU ranks; stdout and stderr come back as one text.

    Raises LaunchError when the launcher returns another code than 0 (unless `check` is false) or `timeout_s` passes; all
    processes of the job are killed then.
    """
    with tempfile.TemporaryDirectory(prefix="m2mkd_launch_") as scratch:
        command = [*launcher_command(ranks, free_port()), *(["--module"] if module else []), str(script), *args]
        job = subprocess.Popen(
            command,
            env=rank_environment(Path(scratch), env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # the launcher, its child and the ranks form one process group
        )
        try:
            output, _ = job.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            kill_group(job)
            output, _ = job.communicate()
            raise LaunchError(f"no end after {timeout_s:.0f} s: {' '.join(command)}\n{_tail(output)}") from None
        finally:
            kill_group(job)  # a rank may outlive a launcher that failed
    if check and job.returncode != 0:
        raise LaunchError(f"exit code {job.returncode}: {' '.join(command)}\n{_tail(output)}")
    return subprocess.CompletedProcess(command, job.returncode, output, None)


def kill_group(job: subprocess.Popen[str]) -> None:
    """Kill what is left of the job's own process group."""
    try:
        os.killpg(job.pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # everybody has left already


def _tail(output: str, characters: int = 6000) -> str:
    return output if len(output) <= characters else "[...]\n" + output[-characters:]
