"""Small models, and folders exported from them, for the tests of the Hugging Face export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.hf.export import export_hf
from m2mkd_ds.config import DataConfig, RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEArch

ARCH = VMoEArch(
    image_size=28, patch_size=7, num_classes=5, embed_dim=32, num_heads=4, mlp_ratio=2.0, num_blocks=4,
    moe_blocks=(0, 1, 2, 3), num_experts=4, router=RouterConfig(),
)  # fmt: skip
STITCHES = (StitchSpec(0, "post", 1, 32, 48), StitchSpec(1, "pre", 2, 48, 32))
DATA = DataConfig(num_classes=5, image_size=28, mean=(0.28, 0.3, 0.32), std=(0.35, 0.36, 0.37), crop_pct=1.0)
NAMES = ["zero", "one", "two", "three", "four"]
IMAGES = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))


def make_model(arch: VMoEArch = ARCH, stitches: tuple[StitchSpec, ...] = ()) -> VisionMoE:
    """A model whose every weight matters."""
    model = VisionMoE(arch, StageSpan.whole(arch.num_blocks), stitches=stitches, seed=0).eval()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
        for buffer in model.buffers():  # the routers' balance biases, large enough to move choices
            buffer.add_(torch.randn(buffer.shape, generator=g) * 0.2)
    return model


def export(model: VisionMoE, out: Path, **changes: Any) -> Path:
    settings = {"class_names": NAMES, "data": DATA, "license": "mit", "stitches": model.stitch_specs} | changes
    return export_hf(model.state_dict(), model.arch, out, **settings)


def logits(model: Any, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        out = model(images)
    return out.output if isinstance(model, VisionMoE) else out.logits
