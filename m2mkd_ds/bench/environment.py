"""What a result must say about where it comes from: versions, device, commit. Names no host and no folder."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "deepspeed", "tutel", "scattermoe", "numpy")


def describe(device: torch.device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Plain data; None for what is not there. `packages`: whose versions matter."""
    gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cuda": torch.version.cuda if gpu else None,
        "driver": _driver() if gpu else None,
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_model(),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **_commit(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    """Linux tells it in /proc; elsewhere only the kind of processor is known."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def _commit() -> dict[str, Any]:
    """The commit of the checkout that this package runs from, and whether files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists() or shutil.which("git") is None:
        return {"git_commit": None, "git_modified": None}

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    # Only what the package is made of counts: fresh results under docs/ do not make it another program.
    changes = git("status", "--porcelain", "--", "m2mkd_ds", "kernels", "setup.py")
    return {"git_commit": git("rev-parse", "HEAD"), "git_modified": None if changes is None else bool(changes)}
