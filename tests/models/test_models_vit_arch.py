"""VitArch: from the configuration to a timm model that can be cut into stages, or one clear sentence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import nn

from m2mkd_ds.config import ConfigError, DataConfig, MetaConfig, RunConfig, StudentConfig, TeacherConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import meta_device_model, timm_name
from m2mkd_ds.models.vit import VitArch, empty_stage, num_blocks, width


def test_deep_incubations_teachers_have_the_papers_sizes() -> None:
    # The authors' DeiT-L has 304.3 M parameters and width 1024; DeiT-H has 32 blocks of width 1280.
    deit_l = empty_stage(VitArch("deit_large_patch16_224"), StageSpan.whole(24))
    assert sum(p.numel() for p in deit_l.parameters()) == pytest.approx(304.3e6, abs=0.1e6)
    assert (num_blocks(VitArch("deit_huge_patch14_224")), width(VitArch("deit_huge_patch14_224"))) == (32, 1280)


def run_config(depths: tuple[int, ...], meta: tuple[int, ...], **teacher: Any) -> RunConfig:
    return RunConfig(
        name="test",
        data=DataConfig(num_classes=10, image_size=32),
        teacher=TeacherConfig(depths=depths, **teacher),
        meta=MetaConfig(depths=meta),
        student=StudentConfig(depths=(1,) * len(depths)),
    )


def test_teacher_and_meta_of_a_run() -> None:
    args = {"embed_dim": 64, "depth": 5, "num_heads": 2, "patch_size": 8}
    config = run_config((2, 3), (1, 2), arch="vit_tiny_patch16_224", arch_args=args)
    teacher, meta = VitArch.from_teacher(config), VitArch.from_meta(config)
    assert (num_blocks(teacher), width(teacher)) == (5, 64)
    assert (num_blocks(meta), width(meta)) == (3, 64)
    stage = empty_stage(meta, StageSpan(2, 2, 3))
    assert stage.head.weight.shape == (10, 64)
    assert empty_stage(meta, StageSpan(0, 0, 3)).pos_embed.shape == (1, 1 + 16, 64)


def test_depths_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"teacher\.depths \[4, 4\] has 8 blocks and teacher\.arch vit_tiny_patch16_224 has 12"):
        VitArch.from_teacher(run_config((4, 4), (1, 1), arch="vit_tiny_patch16_224"))


@pytest.mark.parametrize(
    ("arch", "arch_args", "message"),
    [
        ("vit_tiny_patch61_224", {}, r"not a model of the installed timm .*did you mean vit_tiny_patch16_224"),
        ("deit_large_patch16_224.in1k", {}, "no weights tagged 'in1k' for deit_large_patch16_224; leave the tag out"),
        ("vit_tiny_patch16_224", {"embed_dims": 64}, r"cannot build teacher\.arch .*unexpected keyword argument 'embed_dims'"),
        ("vit_tiny_patch16_224", {"embed_dim": 64, "num_heads": 3}, r"cannot build teacher\.arch .*\(dim should be divisible"),
        ("vit_tiny_patch16_224", {"global_pool": ""}, "one output a token; set arch_args.global_pool"),
        ("deit_tiny_distilled_patch16_224", {}, "is a timm VisionTransformerDistilled; only models of timm's class VisionTransformer"),
        ("eva02_tiny_patch14_224", {}, "is a timm Eva; only models"),
        ("resnet18", {}, r"cannot build teacher\.arch resnet18 .*must be a timm VisionTransformer"),
    ],
)
def test_what_cannot_be_cut_into_stages_is_refused(arch: str, arch_args: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        meta_device_model(VitArch(arch, arch_args, 10, 224))


@pytest.mark.parametrize(("key", "owner"), [("num_classes", r"data\.num_classes"), ("drop_path_rate", "drop_path of the training phase")])
def test_arch_args_may_not_set_numbers_that_others_own(key: str, owner: str) -> None:
    with pytest.raises(ValueError, match=rf"teacher\.arch_args\.{key} is 1: this number belongs to {owner}"):
        VitArch("vit_tiny_patch16_224", {key: 1})


def test_a_headless_model_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes is 0"):
        VitArch("vit_tiny_patch16_224", {}, 0)


def test_weights_shared_across_stages_are_refused() -> None:
    shared = nn.Linear(192, 192, device="meta")

    class TiedBlock(Block):
        def __init__(self, dim: int, **kwargs: Any) -> None:
            super().__init__(dim, **kwargs)
            self.shared = shared

    with pytest.raises(ValueError, match=r"shares blocks\.1\.shared\.weight between blocks\.0 and blocks\.1"):
        meta_device_model(VitArch("vit_tiny_patch16_224", {"block_fn": TiedBlock}, 10, 32))


def test_names_with_a_source_are_left_to_timm() -> None:
    assert timm_name("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k") == "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"
    assert timm_name("vit_tiny_patch16_224.augreg_in21k") == "vit_tiny_patch16_224.augreg_in21k"


def test_describing_a_model_takes_no_memory() -> None:
    # ViT-G has 1.84 billion parameters, 7.4 GB in fp32.
    model = meta_device_model(VitArch("vit_gigantic_patch14_224"))
    assert sum(p.numel() for p in model.parameters()) > 1.8e9
    assert all(p.device == torch.device("meta") for p in model.parameters())
