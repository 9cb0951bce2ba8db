"""The runs that `m2mkd bench memory` measures: digits, and models so large that weights or activations are measured, not noise."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from m2mkd_ds.config import (
    AugmentConfig,
    DataConfig,
    MetaConfig,
    MoEConfig,
    PhaseConfig,
    RouterConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)

STEPS = 3
"""Of which the first is not looked at: the optimizer makes its state in it."""


@dataclass(frozen=True, kw_only=True)
class MemoryCase:
    """One launch; its phases m2mkd (all pairs) and end_to_end are measured."""

    name: str
    ranks: int
    stage: int
    ep_size: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    micro_batch: int = 8
    accumulation: int = 1
    bucket: int = 50_000_000
    """Elements; the default of ds_configs."""
    width: int = 384
    """Of the student; the teacher has half of it."""
    blocks: int = 2
    """Blocks of a module of student and teacher."""
    ema_decay: float = 0.999
    """Of end_to_end."""


CASES = (
    MemoryCase(name="weights, 1 rank", ranks=1, stage=1),
    MemoryCase(name="weights, 2 ranks", ranks=2, stage=1),
    MemoryCase(name="weights, small buckets", ranks=2, stage=2, bucket=5_000_000),
    MemoryCase(name="weights, spread experts", ranks=2, stage=2, ep_size=2),
    MemoryCase(name="weights, spread, ZeRO-1", ranks=2, stage=1, ep_size=2, accumulation=2, bucket=5_000_000),
    MemoryCase(name="activations", ranks=1, stage=2, micro_batch=96, width=192, bucket=1_000_000),
    MemoryCase(name="activations, spread experts", ranks=2, stage=1, ep_size=2, micro_batch=64, width=192, bucket=1_000_000),
    MemoryCase(name="bf16, ZeRO-1", ranks=2, stage=1, precision="bf16", width=192),
    MemoryCase(name="bf16, ZeRO-2", ranks=2, stage=2, precision="bf16", width=192, bucket=2_000_000),
)
SPREAD_CASE = MemoryCase(name="small, spread experts", ranks=2, stage=2, ep_size=2, width=128, micro_batch=16, bucket=500_000, blocks=1)
SMALL_CASE = MemoryCase(name="small", ranks=1, stage=2, width=128, micro_batch=16, bucket=100_000, blocks=1)
"""For a first look, and for tests."""


def case_config(case: MemoryCase, folder: Path) -> RunConfig:
    """The run of a case below `folder`; writes the engine's file there."""
    folder.mkdir(parents=True, exist_ok=True)
    zero = {"stage": case.stage, "reduce_scatter": True, "contiguous_gradients": True, "reduce_bucket_size": case.bucket}
    engine = folder / f"zero{case.stage}.json"
    engine.write_text(json.dumps({"zero_optimization": zero, "timers": {"throughput": {"enabled": False}}}))
    width = case.width // 2
    phase = PhaseConfig(
        epochs=1.0, max_steps=STEPS, micro_batch_size=case.micro_batch, gradient_accumulation_steps=case.accumulation, lr=1e-4, lr_batch=0,
        min_lr=1e-5, clip_grad=1.0, precision=case.precision, ds_config=str(engine), eval_epochs=0.0, checkpoint_steps=1000, log_steps=1,
    )  # fmt: skip
    spread = replace(phase, ep_size=case.ep_size)
    shards = folder / "shards"
    return RunConfig(
        name="memory", run_dir=str(folder / "run"), baseline=False,
        data=DataConfig(
            source="digits", train=str(shards / "train"), validation=str(shards / "validation"), num_classes=10, image_size=32,
            mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, interpolation="bilinear", num_workers=0,
            augment=AugmentConfig(crop_scale=(0.9, 1.0), hflip=0.0),
        ),
        teacher=TeacherConfig(
            arch="vit_tiny_patch16_224", depths=(case.blocks,) * 2, source="pretrained", weights=str(folder / "teacher.safetensors"),
            arch_args={"patch_size": 4, "embed_dim": width, "depth": 2 * case.blocks, "num_heads": width // 32},
        ),
        meta=MetaConfig(depths=(1, 1)),
        student=StudentConfig(
            embed_dim=case.width, num_heads=case.width // 64, patch_size=4, depths=(case.blocks,) * 2,
            moe=MoEConfig(num_experts=8, router=RouterConfig(top_k=2)),
        ),
        pretrain_meta=replace(phase, max_steps=1), m2mkd=spread, end_to_end=replace(spread, ema_decay=case.ema_decay),
    )  # fmt: skip
