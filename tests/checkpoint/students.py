"""Small students on the disk, made without training: an exported folder, and a run folder as far as its finished students."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.checkpoint.hf.export import export_hf
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.config import DataConfig, RouterConfig, RunConfig, dump
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEArch, arch_from_config
from m2mkd_ds.recipes import get_recipe

ARCH = VMoEArch(
    image_size=16, patch_size=4, num_classes=5, embed_dim=32, num_heads=4, mlp_ratio=2.0, num_blocks=4, moe_blocks=(1, 2, 3), num_experts=4,
    router=RouterConfig(),
)  # fmt: skip
STITCHES = (StitchSpec(0, "post", 1, 32, 48), StitchSpec(1, "pre", 2, 48, 32))
DATA = DataConfig(
    num_classes=5, image_size=16, mean=(0.28, 0.3, 0.32), std=(0.35, 0.36, 0.37), crop_pct=0.8, interpolation="bilinear"
)  # fmt: skip
NAMES = ("zero", "one", "two", "three", "four")


def shaken(arch: VMoEArch = ARCH, stitches: tuple[StitchSpec, ...] = ()) -> VisionMoE:
    """A model whose every weight and buffer matters."""
    model = VisionMoE(arch, StageSpan.whole(arch.num_blocks), stitches=stitches, seed=0).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.randn(tensor.shape, generator=g) * 0.2)
    return model


def exported(model: VisionMoE, out: Path, *, dtype: str = "fp32", max_shard_size: str = "2GB") -> Path:
    """The Hugging Face folder of `model`."""
    return export_hf(
        model.state_dict(), model.arch, out, class_names=NAMES, data=DATA, license="mit", stitches=model.stitch_specs, dtype=dtype,
        max_shard_size=max_shard_size,
    )  # fmt: skip


def run_config(*, keep_stitches: bool = False) -> RunConfig:
    """Recipe `tiny`, of which the run folder below is."""
    config = get_recipe("tiny")
    return replace(config, student=replace(config.student, keep_stitches=keep_stitches))


def run_folder(root: Path, *, keep_stitches: bool = False) -> tuple[Path, VisionMoE]:
    """(folder with config.yaml and the student of end_to_end, that student)."""
    config = run_config(keep_stitches=keep_stitches)
    # The teacher's width is 64; blocks 0, 1 are stage 0 and blocks 2, 3 stage 1.
    stitches = (StitchSpec(0, "post", 1, 48, 64), StitchSpec(1, "pre", 2, 64, 48)) if keep_stitches else ()
    student = shaken(arch_from_config(config), stitches)
    (root / "end_to_end").mkdir(parents=True)
    (root / "config.yaml").write_text(dump(config))
    save_weights(root / "end_to_end" / "weights.safetensors", student.state_dict(), {"phase": "end_to_end"})
    return root, student
