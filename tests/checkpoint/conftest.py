"""Fixtures of the Hugging Face export's tests: transformers, with what it caches kept inside the test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep transformers' copies of model code, and the modules made of them, inside this test."""
    from transformers import dynamic_module_utils

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()


@pytest.fixture
def auto(code_cache: None) -> Any:
    """AutoModelForImageClassification.from_pretrained."""
    from transformers import AutoModelForImageClassification

    def load(folder: Path, **kwargs: Any) -> Any:
        return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

    return load
