"""Labs of two and four hosts for the tests of this folder; skipped, with the reason, where a machine cannot make them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab, why_no_lab


def _lab(factory: pytest.TempPathFactory, hosts: int) -> Iterator[Lab]:
    reason = why_no_lab()
    if reason:
        pytest.skip(reason)
    with Lab.start(factory.mktemp("lab"), hosts) as lab:
        yield lab


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two hosts, for the tests of one file; a test that breaks one mends it."""
    yield from _lab(tmp_path_factory, 2)


@pytest.fixture(scope="module")
def lab_of_four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Four hosts, for the tests of one file."""
    yield from _lab(tmp_path_factory, 4)
