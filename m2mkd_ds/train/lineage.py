"""What made a file of a run, and from what: stands in the metadata of weights and in the record of checkpoints."""

from __future__ import annotations

from m2mkd_ds import __version__
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.nodes import Node, output_hashes


def lineage(ctx: RunContext, node: Node, pair: int | None) -> dict[str, str]:
    """Recipe, phase, seed, training data, and the SHA-256 of every file that the node has read; `pair` for one of a node of pairs."""
    inputs = {f"input.{name}/{file}": sha for name in node.inputs for file, sha in output_hashes(ctx.root, name).items()}
    return {
        "recipe": ctx.config.name,
        "phase": node.name,
        **({"pair": str(pair)} if pair is not None else {}),
        "seed": str(ctx.config.seed),
        "m2mkd_ds": __version__,
        "train_data": ctx.train_index.fingerprint,
        **inputs,
    }
