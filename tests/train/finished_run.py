"""A run folder in which every node is finished, made without training: each node's output is one small file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from m2mkd_ds.config import RunConfig, apply_overrides
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.nodes import build_dag, find_node, fingerprint, write_done

DATA = {"train": "sha of train", "validation": "sha of validation"}


def tiny_config(root: Path, shards: Path, *overrides: str, recipe: str = "tiny") -> RunConfig:
    """Recipe `tiny` in the run folder `root`, with `key=value` overrides."""
    base = get_recipe(recipe)
    data = replace(base.data, train=str(shards / "train"), validation=str(shards / "validation"))
    return apply_overrides(replace(base, run_dir=str(root), data=data), list(overrides))


def finish(
    config: RunConfig, root: Path, name: str, data: Mapping[str, str] = DATA, *, content: str | None = None, world_size: int = 2
) -> None:
    """Finish one node on so many ranks: its file holds `content` (default: the node's name)."""
    node = find_node(config, name)
    file = root / name / "output.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(name if content is None else content)
    write_done(root / name, node, config, fingerprint(config, node, root, data), [file], wall_s=1.0, world_size=world_size)


def finish_all(config: RunConfig, root: Path, data: Mapping[str, str] = DATA) -> None:
    for node in build_dag(config):
        finish(config, root, node.name, data)
