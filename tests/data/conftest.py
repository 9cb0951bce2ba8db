"""Real images for the data tests: scikit-learn's digits, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.sources.registry import make_source


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and validation/ shards of the digits; tests must not change it."""
    folder = tmp_path_factory.mktemp("digits")
    make_source("digits", folder, samples_per_shard=400)
    return folder


@pytest.fixture(scope="session")
def digits_train(digits_folder: Path) -> ShardIndex:
    return ShardIndex.load(digits_folder / "train")


@pytest.fixture(scope="session")
def digits_validation(digits_folder: Path) -> ShardIndex:
    return ShardIndex.load(digits_folder / "validation")
