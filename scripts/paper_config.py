"""Write RUN_DIR/config.yaml of recipe vmoe_base_in1k, or check that the one there is the same.

    python scripts/paper_config.py [--any-batch] RUN_DIR SHARDS RANKS [KEY=VALUE ...]

The global batches must be the paper's on RANKS ranks (arXiv 2402.16918: 2048 for meta model and modules, 1024 for whole
models); where they are not, the overrides that make them so are printed. --any-batch takes others.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2mkd_ds.config import ConfigError, RunConfig, apply_overrides, load, to_dict
from m2mkd_ds.recipes import get_recipe

PAPER_BATCH = {"pretrain_meta": 2048, "modular_train": 2048, "assemble_finetune": 1024, "m2mkd": 2048, "end_to_end": 1024}
"""Images an optimizer step by phase."""


def make_config(run_dir: Path, shards: Path, overrides: list[str]) -> RunConfig:
    """The recipe with its paths and overrides; paths are not parsed as YAML."""
    config = apply_overrides(get_recipe("vmoe_base_in1k"), overrides)
    data = replace(config.data, train=str(shards / "train"), validation=str(shards / "validation"))
    return replace(config, run_dir=str(run_dir), data=data)


def batch_overrides(config: RunConfig, ranks: int) -> list[str]:
    """Overrides that bring every phase to the paper's global batch on `ranks` ranks; empty when all are there.

    Raises ConfigError when the ranks do not divide a batch.
    """
    wanted = []
    for phase, batch in PAPER_BATCH.items():
        p = getattr(config, phase)
        if p.micro_batch_size * p.gradient_accumulation_steps * ranks == batch:
            continue
        if batch % ranks:
            raise ConfigError(f"{ranks} ranks do not divide the paper's batch of {batch} images; take another number, or --any-batch")
        share = batch // ranks
        # The largest micro-batch up to the recipe's (which fits an 80 GB GPU) that divides a rank's share.
        micro = max(size for size in range(1, min(share, p.micro_batch_size) + 1) if share % size == 0)
        wanted += [f"{phase}.micro_batch_size={micro}", f"{phase}.gradient_accumulation_steps={share // micro}"]
    return wanted


def difference(old: RunConfig, new: RunConfig) -> list[str]:
    """`m2mkd.lr: 0.0005 -> 0.001` for each field that differs; where phases are launched is not compared."""

    def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        leaves: dict[str, Any] = {}
        for key, value in tree.items():
            leaves.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
        return leaves

    before, after = (flat({key: value for key, value in to_dict(config).items() if key != "launch"}) for config in (old, new))
    return [f"{path}: {before.get(path)} -> {after.get(path)}" for path in sorted({*before, *after}) if before.get(path) != after.get(path)]


def main(words: list[str]) -> None:
    """Raises ConfigError before anything is written."""
    any_batch = words[:1] == ["--any-batch"]
    run_dir, shards, ranks, *overrides = words[1:] if any_batch else words
    config = make_config(Path(run_dir).resolve(), Path(shards).resolve(), overrides)
    wanted = [] if any_batch else batch_overrides(config, int(ranks))
    if wanted:
        raise ConfigError(f"on {ranks} ranks the global batches are not the paper's; append {' '.join(wanted)}, or give --any-batch")
    file = Path(run_dir) / "config.yaml"
    if file.is_file():
        changed = difference(load(file), config)
        if changed:
            raise ConfigError(f"{file} is of a run with other settings ({'; '.join(changed)}); give those again, or another RUN_DIR")
        return
    from m2mkd_ds.train.pipeline import write_config  # loads torch: not needed for a refusal

    write_config(config)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    try:
        main(sys.argv[1:])
    except ConfigError as err:
        sys.exit(f"paper_config.py: {err}")
