"""The experts' activation reaches the model: shapes, counts and fresh weights by hand, and what the export says to it."""

from __future__ import annotations

import dataclasses

import torch

from m2mkd_ds.config import MoEConfig, RouterConfig, RunConfig, StudentConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch, arch_from_config, count_parameters, parameter_shapes

GELU = VMoEArch(
    image_size=8, patch_size=4, num_classes=3, embed_dim=8, num_heads=2, mlp_ratio=2.0, num_blocks=2,
    moe_blocks=(1,), num_experts=4, router=RouterConfig(top_k=2),
)  # fmt: skip
SWIGLU = dataclasses.replace(GELU, activation="swiglu")
WHOLE = StageSpan.whole(2)


def test_swiglu_doubles_the_first_map_of_experts_only() -> None:
    gelu, swiglu = parameter_shapes(GELU, WHOLE), parameter_shapes(SWIGLU, WHOLE)
    changed = {name: list(shape) for name, shape in swiglu.items() if shape != gelu[name]}
    assert changed == {"blocks.1.moe.experts.up_proj": [4, 32, 8], "blocks.1.moe.experts.up_proj_bias": [4, 32]}  # 2 F = 32
    assert list(gelu) == list(swiglu)
    # An expert gains 16 rows of 8 weights and a bias: 144. A token uses 2 of the 4.
    assert [b - a for a, b in zip(count_parameters(GELU), count_parameters(SWIGLU), strict=True)] == [4 * 144, 2 * 144]


def test_fresh_weights_follow_the_names_and_train() -> None:
    model = VisionMoE(SWIGLU, WHOLE, seed=3)
    experts = model.blocks["1"].moe.experts  # type: ignore[union-attr]
    assert experts.activation == "swiglu" and not experts.up_proj_bias.any()  # type: ignore[union-attr, operator]
    assert 0.015 < experts.up_proj.std().item() < 0.025  # type: ignore[union-attr, operator]
    plain = dict(VisionMoE(GELU, WHOLE, seed=3).named_parameters())
    for name, p in model.named_parameters():
        assert p.shape != plain[name].shape or torch.equal(p, plain[name]), name
    model(torch.randn(2, 3, 8, 8)).output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_config_reaches_the_architecture() -> None:
    config = RunConfig(name="swiglu", student=StudentConfig(moe=MoEConfig(activation="swiglu", backend="fused")))
    arch = arch_from_config(config)
    assert (arch.activation, arch.backend) == ("swiglu", "fused")
