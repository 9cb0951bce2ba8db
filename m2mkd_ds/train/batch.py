"""The layout of a phase's batch: how it is dealt to ranks and forward passes. What of it a node remembers, and when that matters.

    global batch = micro_batch_size * gradient_accumulation_steps * ranks

Layouts with the same product use the same images in the same steps (except as `layout_of_images` says), so a phase goes on, and its
result stays good, when only the layout changes: these fields are no part of a node's fingerprint. Its done.json keeps them under
`layout`. The number of ranks is not a setting of the run: a finished node is asked about its batch only where a setting of it has
changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from m2mkd_ds.config import AugmentConfig, LaunchConfig

LAYOUT_FIELDS = ("micro_batch_size", "gradient_accumulation_steps", "ep_size", "ds_config")
"""Fields of a phase that say where work is done, not which."""

_RANK_FLAGS = ("-i", "--include", "-e", "--exclude", "--num_nodes", "--num_gpus")


def is_layout(path: str) -> bool:
    """Whether the dotted field is a layout field of a phase."""
    return path.rpartition(".")[2] in LAYOUT_FIELDS


def layout_of_images(augment: AugmentConfig) -> tuple[str, ...]:
    """Layout fields that the images of a step depend on: `repeat_mode=deit` deals them to ranks, `mix_group=0` mixes micro-batches."""
    if augment.repeats_as_deit:  # with these and the global batch, the number of ranks is fixed too
        return ("micro_batch_size", "gradient_accumulation_steps")
    return ("micro_batch_size",) if augment.mixes and augment.mix_group == 0 else ()


def expected_ranks(launch: LaunchConfig) -> int | None:
    """Ranks that the pipeline's launches will have; None when only the launcher knows (hostfile, flags that choose devices, CPUs)."""
    if launch.hostfile or any(word.split("=")[0] in _RANK_FLAGS for word in launch.extra):
        return None
    return launch.num_gpus or torch.accelerator.device_count() or None


def batch_change(done: Mapping[str, Any], layout: Mapping[str, Any], ranks: int | None) -> str:
    """How the global batch of a finished node differs from what `layout` (settings now) gives on `ranks` ranks; empty if it does not.

    With `ranks` unknown, any number that gives the recorded batch is taken for it. Where the settings are as recorded nothing has
    changed, whatever the number of ranks.
    """
    before, world = done.get("layout", {}), int(done.get("world_size", 1))
    for phase in sorted({path.partition(".")[0] for path in layout}):
        had, has = _images_a_rank(before, phase), _images_a_rank(layout, phase)
        batch = had * world
        if had == has or (batch % has == 0 if ranks is None else batch == has * ranks):
            continue
        now = f"{has} images a rank and step" if ranks is None else f"{has} x {ranks} ranks = {has * ranks}"
        return f"the global batch of {phase} changed: {had} x {world} ranks = {batch} -> {now}"
    return ""


def _images_a_rank(layout: Mapping[str, Any], phase: str) -> int:
    return int(layout.get(f"{phase}.micro_batch_size", 0)) * int(layout.get(f"{phase}.gradient_accumulation_steps", 0))
