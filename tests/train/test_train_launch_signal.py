"""A plain `kill` of the pipeline ends what it launched."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys
from m2mkd_ds.config import LaunchConfig
from m2mkd_ds.train import launch
job = "import os, pathlib, time; pathlib.Path(r'{pid}').write_text(str(os.getpid())); time.sleep(120)"
launch.launch_command = lambda config, verb: [sys.executable, "-c", job]
launch.run_launched(LaunchConfig(), ["train"])
"""


def test_sigterm_reaches_the_launched_job(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    pipeline = subprocess.Popen([sys.executable, "-c", SCRIPT.format(pid=pid_file)])
    try:
        deadline = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        job = int(pid_file.read_text())
        pipeline.send_signal(signal.SIGTERM)
        assert pipeline.wait(timeout=60) == 128 + signal.SIGTERM
        assert not Path(f"/proc/{job}").exists()
    finally:
        pipeline.kill()
        if pid_file.exists() and Path(f"/proc/{pid_file.read_text()}").exists():
            os.kill(int(pid_file.read_text()), signal.SIGKILL)
