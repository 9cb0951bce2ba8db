"""`m2mkd WORDS` in the test's own process, in an empty folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2mkd_ds.cli import main
from tests.cli.ended import Ended, Run


@pytest.fixture
def m2mkd(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Run]:
    """Call it with the words of a command line; the environment is put back afterwards."""
    environment = dict(os.environ)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Ended:
        code = 0
        try:
            main(list(words))
        except SystemExit as end:
            code = int(end.code or 0)
        return Ended(code, *capsys.readouterr())

    yield call
    os.environ.clear()
    os.environ.update(environment)
