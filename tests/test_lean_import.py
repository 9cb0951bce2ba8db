"""Importing the package costs nothing: no optional library is loaded and no device is touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("deepspeed", "tutel", "triton", "transformers", "timm", "webdataset", "accelerate", "huggingface_hub", "safetensors", "matplotlib")


def loaded_by(statement: str, cwd: Path) -> set[str]:
    """Top-level names in sys.modules of a fresh interpreter after `statement`."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_no_library(repo_root: Path) -> None:
    assert loaded_by("import m2mkd_ds", repo_root).isdisjoint({*HEAVY, "torch", "numpy", "pydantic"})


@pytest.mark.parametrize("module", ["m2mkd_ds.config", "m2mkd_ds.logs", "m2mkd_ds.cli", "m2mkd_ds.recipes", "m2mkd_ds.report"])
def test_importing_the_command_line_loads_no_heavy_library(module: str, repo_root: Path) -> None:
    assert loaded_by(f"import {module}", repo_root).isdisjoint({*HEAVY, "torch"})


def test_importing_the_kernels_loads_no_triton(repo_root: Path) -> None:
    assert "triton" not in loaded_by("import sys; sys.modules['torch'] = None\nimport m2mkd_kernels", repo_root)


def test_the_probe_sees_a_loaded_library(repo_root: Path) -> None:
    assert "safetensors" in loaded_by("import safetensors", repo_root)
