"""`m2mkd teacher-export`: logits for as many steps as phase m2mkd of this config will take, on as many ranks as it will have."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.distill.pairs import parse_pairs
from m2mkd_ds.teacher.server.produce import Producer
from m2mkd_ds.teacher.stored.export import export_logits, positions_of_steps
from m2mkd_ds.train.feeds import FeedPlan
from m2mkd_ds.train.phases.jobs import phase_steps
from m2mkd_ds.train.teacher.run import run_fingerprints, teacher_parts
from m2mkd_ds.train.teacher.serve import SERVED_PHASE, open_teacher


def export(config: RunConfig, out: Path, *, pairs: str = "all", ranks: int = 0, dtype: Literal["fp16", "bf16", "fp32"] = "fp16") -> str:
    """Store the logits and say what is there. Raises ConfigError or StoreError before anything is computed."""
    ranks = ranks or config.launch.num_gpus or 1
    if ranks < 1:
        raise ConfigError(f"--ranks is {ranks}; give the number of ranks of the training to come")
    ctx = open_teacher(config)
    phase = getattr(config, SERVED_PHASE)
    chosen = tuple(ctx.pairs[i] for i in parse_pairs(pairs, len(ctx.pairs)))
    to_come = replace(ctx, world=replace(ctx.world, size=ranks))
    steps = phase_steps(to_come, phase)
    parts = teacher_parts(ctx, phase, chosen)
    layout = FeedPlan(to_come, phase, steps, chosen, parts.meta, dict, with_teacher=True).layout
    with closing(Producer(parts)) as producer:
        manifest = export_logits(
            producer, out, layout=layout, pairs=tuple(pair.index for pair in chosen), positions=positions_of_steps(layout, range(steps)),
            dtype=dtype, prints=run_fingerprints(ctx, phase, chosen),
        )  # fmt: skip
    stored = sum(file.bytes for part in manifest.parts for file in part.files)
    return (
        f"{out}: logits of pairs {[pair.index for pair in chosen]} for {steps} steps of {layout.global_batch} images, "
        f"{stored / 1e6:,.1f} MB; use them by --set teacher.feed=replay teacher.replay={out}"
    )
