"""Which weights decay: names listed by hand for a timm ViT and for the V-MoE's canonical names."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.train.optim import build_adamw, param_groups

VIT_BLOCK_NO_DECAY = ["norm1.weight", "norm1.bias", "attn.qkv.bias", "attn.proj.bias", "ls1.gamma",
                      "norm2.weight", "norm2.bias", "mlp.fc1.bias", "mlp.fc2.bias", "ls2.gamma"]  # fmt: skip
VIT_BLOCK_DECAY = ["attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"]


def names(module: nn.Module) -> dict[str, list[str]]:
    return {group["name"]: group["names"] for group in param_groups(module, 0.05)}


def check_each_parameter_once(module: nn.Module) -> None:
    groups = param_groups(module, 0.05)
    ids = [id(p) for group in groups for p in group["params"]]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in module.parameters()}
    own = dict(module.named_parameters())
    assert all(own[n] is p for group in groups for n, p in zip(group["names"], group["params"], strict=True))


def test_timm_vit_with_layer_scale_and_registers() -> None:
    # dinov2's shape in small: layer scale (gamma), four register tokens.
    vit = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=28, embed_dim=12, depth=2, num_heads=2, num_classes=3, pretrained=False
    )
    expected = {"cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias", "norm.weight", "norm.bias", "head.bias"}
    expected |= {f"blocks.{i}.{name}" for i in range(2) for name in VIT_BLOCK_NO_DECAY}
    got = names(vit)
    assert set(got["no_decay"]) == expected
    assert set(got["decay"]) == {"patch_embed.proj.weight", "head.weight"} | {f"blocks.{i}.{n}" for i in range(2) for n in VIT_BLOCK_DECAY}
    check_each_parameter_once(vit)


class Canonical(nn.Module):
    """Parameters under the V-MoE's names (blocks 3 and 4 of a whole model, one dense, one sparse), with their ranks."""

    SHAPES = {
        "cls_token": (1, 1, 4), "pos_embed": (1, 5, 4), "patch_embed.proj.weight": (4, 3, 2, 2), "patch_embed.proj.bias": (4,),
        "blocks.3.norm1.weight": (4,), "blocks.3.norm1.bias": (4,), "blocks.3.attn.qkv.weight": (12, 4), "blocks.3.attn.qkv.bias": (12,),
        "blocks.3.mlp.fc1.weight": (8, 4), "blocks.3.mlp.fc1.bias": (8,),
        "blocks.4.moe.router.weight": (2, 4), "blocks.4.moe.router.bias": (2,),
        "blocks.4.moe.experts.up_proj": (2, 8, 4), "blocks.4.moe.experts.up_proj_bias": (2, 8),
        "blocks.4.moe.experts.down_proj": (2, 4, 8), "blocks.4.moe.experts.down_proj_bias": (2, 4),
        "stitches.1.pre.norm.weight": (6,), "stitches.1.pre.proj.weight": (4, 6), "stitches.1.pre.proj.bias": (4,),
        "norm.weight": (4,), "head.weight": (3, 4), "head.bias": (3,),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        for name, shape in self.SHAPES.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for part in path:
                if part not in node._modules:
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            node.register_parameter(leaf, nn.Parameter(torch.zeros(shape)))


def test_canonical_moe_names() -> None:
    module = Canonical()
    got = names(module)
    assert set(got["decay"]) == {
        "patch_embed.proj.weight", "blocks.3.attn.qkv.weight", "blocks.3.mlp.fc1.weight", "blocks.4.moe.router.weight",
        "blocks.4.moe.experts.up_proj", "blocks.4.moe.experts.down_proj", "stitches.1.pre.proj.weight", "head.weight",
    }  # fmt: skip
    assert set(got["no_decay"]) == set(Canonical.SHAPES) - set(got["decay"])
    check_each_parameter_once(module)


def test_frozen_parameters_are_in_no_group_and_empty_groups_are_left_out() -> None:
    module = nn.Linear(2, 3)
    module.bias.requires_grad_(False)
    assert names(module) == {"decay": ["weight"]}
    module.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="Linear has no parameter with requires_grad"):
        param_groups(module, 0.05)


def test_adamw_takes_its_numbers_from_the_phase() -> None:
    phase = PhaseConfig(lr=0.5, weight_decay=0.25, betas=(0.8, 0.9), eps=1e-3)
    optimizer = build_adamw(nn.Linear(2, 3), phase)
    assert [(g["name"], g["weight_decay"], g["lr"], g["betas"], g["eps"]) for g in optimizer.param_groups] == [
        ("decay", 0.25, 0.5, (0.8, 0.9), 1e-3),
        ("no_decay", 0.0, 0.5, (0.8, 0.9), 1e-3),
    ]


def test_decay_pulls_on_matrices_only() -> None:
    # With zero gradients AdamW only decays: w <- w * (1 - lr * weight_decay) = 0.95 w, biases stay.
    module = nn.Linear(2, 3)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    optimizer = build_adamw(module, PhaseConfig(lr=0.1, weight_decay=0.5))
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.allclose(module.weight, 0.95 * before["weight"])
    assert torch.equal(module.bias, before["bias"])
