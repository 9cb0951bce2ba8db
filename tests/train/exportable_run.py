"""A run folder with everything that an export reads, made without training."""

from __future__ import annotations

from pathlib import Path

import torch

from m2mkd_ds.checkpoint.store import save_weights, write_json_atomic
from m2mkd_ds.config import dump
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.phases.end_to_end import student_stitches
from tests.train.finished_run import finish, tiny_config

OVERRIDES = ("student.keep_stitches=true", "data.crop_pct=0.9", "m2mkd.ds_config=zero1")


def score(top1: float) -> dict[str, object]:
    return {"top1": top1, "top1_ci": [top1 - 0.01, top1 + 0.01], "top5": 1.0, "top5_ci": [0.99, 1.0], "loss": 0.5, "images": 359}


def make_run(root: Path, shards: Path) -> RunContext:
    """A run folder with weights of three models, results, and the records of two phases; nothing was trained."""
    config = tiny_config(root, shards, *OVERRIDES)
    ctx = open_run(config, World(0, 1, 0, 1, torch.device("cpu")))
    for seed, (node, stitches) in enumerate({"end_to_end": True, "assemble": True, "baseline": False}.items()):
        specs = student_stitches(ctx) if stitches else ()
        model = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=specs, seed=seed)
        (root / node).mkdir(parents=True)
        save_weights(root / node / "weights.safetensors", model.state_dict(), {"recipe": "tiny", "seed": "0"})
    results = {
        "models": {"student": score(0.9), "baseline": score(0.8), "student_cold": score(0.1)},
        "expert_load": {"student": {"0": [3, 1, 0, 0], "2": [1, 1, 1, 1]}, "baseline": {"0": [4, 0, 0, 0]}},
        "entropy": {"student": {"0": 0.5, "2": 1.0}, "baseline": {"0": 0.1}},
        "drop_rate": {"student": {"0": 0.0, "2": 0.25}, "baseline": {"0": 0.0}},
        "student_minus_baseline": {"top1": 0.1, "ci": [0.05, 0.15]},
    }
    (root / "evaluate").mkdir()
    (root / "config.yaml").write_text(dump(config))
    write_json_atomic(root / "evaluate" / "results.json", results)
    for name in ("pretrain_meta", "modular_train", "assemble_finetune", "split"):
        finish(config, root, name)
    return ctx
