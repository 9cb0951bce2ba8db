"""Addresses on the way from the command line to the run's config: paths become absolute, URLs stay, secrets are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from m2mkd_ds.cli.resolve import ensure_shards, resolve
from m2mkd_ds.config import ConfigError, RunConfig


def tiny(*overrides: str) -> RunConfig:
    return resolve(None, "tiny", "run", overrides)


@pytest.mark.parametrize(
    "url", ["https://host/in1k/train?revision=main", "s3://bucket/in1k", "hf://datasets/o/n@main/data", "pipe:cat /d/{}"]
)
def test_an_address_elsewhere_is_kept_as_it_is(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny(f"data.train={json.dumps(url)}", f"data.validation={json.dumps(url)}")
    assert (config.data.train, config.data.validation) == (url, url)
    assert config.data.source == "digits"
    # A recipe's source is made for folders alone: nothing appears on disk for a URL.
    assert ensure_shards(config) == config
    assert list(tmp_path.iterdir()) == []


def test_paths_are_absolute_whatever_folder_a_rank_starts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = tiny("data.train=shards/train", "data.validation=file:///d/val", "data.cache_dir=../cache").data
    assert (data.train, data.validation, data.cache_dir) == (str(tmp_path / "shards/train"), "/d/val", str(tmp_path.parent / "cache"))
    assert tiny().data.cache_dir == ""


@pytest.mark.parametrize("field", ["train", "validation", "cache_dir"])
@pytest.mark.parametrize("url", ["https://me:hunter2@host/in1k", "https://host/in1k?X-Amz-Signature=hunter2"])
def test_credentials_do_not_get_into_a_config(field: str, url: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{field} is https://.*holds credentials.*M2MKD_HTTP_TOKEN, HF_TOKEN") as caught:
        tiny(f"data.{field}={url}")
    assert "hunter2" not in str(caught.value)
