"""Real shards for tests of runs: scikit-learn's digits, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2mkd_ds.data.sources.registry import make_source


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and validation/; tests must not change it."""
    folder = tmp_path_factory.mktemp("shards")
    make_source("digits", folder)
    return folder
