"""What a wheel carries: both source roots, the engine settings, the exported model's files, the report's style sheet."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no build folder is left in the checkout; without isolation, so that nothing is downloaded."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    copy.mkdir()
    for folder in ("m2mkd_ds", "kernels", "ds_configs"):
        shutil.copytree(repo_root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, copy)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next((copy / "dist").glob("*.whl")))


def test_every_python_file_of_both_roots_is_in_the_wheel(wheel: zipfile.ZipFile, repo_root: Path) -> None:
    expected = {path.relative_to(repo_root).as_posix() for path in (repo_root / "m2mkd_ds").rglob("*.py")}
    expected |= {path.relative_to(repo_root / "kernels").as_posix() for path in (repo_root / "kernels").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == expected


def test_files_that_are_no_modules_are_in_the_wheel(wheel: zipfile.ZipFile, repo_root: Path) -> None:
    names = set(wheel.namelist())
    assert {f"m2mkd_ds/_ds_configs/{path.name}" for path in (repo_root / "ds_configs").glob("*.json")} <= names
    assert {"m2mkd_ds/report/page.css", "m2mkd_ds/py.typed"} <= names


def test_the_wheel_names_its_command_and_the_limits_of_its_requirements(wheel: zipfile.ZipFile) -> None:
    info = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "m2mkd = m2mkd_ds.cli:main" in info["entry_points.txt"]
    for line in (
        "Requires-Python: >=3.10",
        "Requires-Dist: torch>=2.11",
        "Requires-Dist: deepspeed<0.20,>=0.19.8",
        "Requires-Dist: pillow<13,>=",
    ):
        assert line in info["METADATA"]
