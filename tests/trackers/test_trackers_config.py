"""`trackers` in a run's config: old files, wrong words, and what leaves the house."""

from __future__ import annotations

from pathlib import Path

import pytest

from m2mkd_ds.config import ConfigError, apply_overrides, dump, load
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.phases.jobs import without_secrets


@pytest.mark.parametrize(("old", "new"), [("true", ("tensorboard",)), ("false", ())])
def test_a_file_from_before_there_were_trackers_is_read(tmp_path: Path, old: str, new: tuple[str, ...]) -> None:
    text = dump(get_recipe("tiny"))
    before, after = text.split("trackers:\n- auto\n")
    (tmp_path / "config.yaml").write_text(f"{before}tensorboard: {old}\n{after}")
    assert load(tmp_path / "config.yaml").trackers == new


def test_trackers_are_named_in_a_list_of_known_words() -> None:
    assert apply_overrides(get_recipe("tiny"), ["trackers=[wandb, trackio]"]).trackers == ("wandb", "trackio")
    assert apply_overrides(get_recipe("tiny"), ["trackers=[]"]).trackers == ()
    with pytest.raises(ConfigError, match=r"trackers.*'auto', 'tensorboard', 'wandb' or 'trackio'"):
        apply_overrides(get_recipe("tiny"), ["trackers=[wandbb]"])


def test_addresses_lose_their_credentials_before_they_are_shown_to_a_tracker() -> None:
    data = {"train": "https://user:pw@host/a", "order": "global"}
    tree = {"data": data, "endpoints": ["10.0.0.7:8815", "pipe:aws s3 cp s3://k x"], "n": 3}
    assert without_secrets(tree) == {
        "data": {"train": "https://***@host/a", "order": "global"}, "endpoints": ["10.0.0.7:8815", "pipe:aws ***"], "n": 3,
    }  # fmt: skip
