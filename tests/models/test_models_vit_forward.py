"""VitStage: running the stages of any split is timm's own forward, bit for bit in fp32."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import timm
import torch
from torch import Tensor, nn

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, VitStage, load_stage, stage_names

DEPTH = 4
CLASSES = 10

# name -> (timm model, arch_args, image size): everything that differs between timm's VisionTransformers around the blocks.
MODELS = {
    "vit_tiny": ("vit_tiny_patch16_224", {}, 32),
    "vit_small": ("vit_small_patch16_224", {}, 32),
    "vit_base": ("vit_base_patch16_224", {}, 32),
    "deit3: layer scale, positions without class token": ("deit3_small_patch16_224", {}, 32),
    "dinov2: 4 registers, layer scale": ("vit_small_patch14_reg4_dinov2", {}, 28),
    "gap: no class token, fc_norm off": ("vit_base_patch16_gap_224", {}, 32),
    "gap: no class token, fc_norm": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}, 32),
    "gap: class token kept, fc_norm off": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}, 32),
    "reg4_gap": ("vit_little_patch16_reg4_gap_256", {"embed_dim": 64, "num_heads": 2}, 32),
    "siglip: attention pool": ("vit_base_patch16_siglip_224", {"embed_dim": 64, "num_heads": 2}, 32),
    "clip: norm before the blocks": ("vit_base_patch16_clip_quickgelu_224", {"embed_dim": 64, "num_heads": 2}, 32),
    "dynamic image size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 32),
    "convolutional stem with batch norm": ("vit_small_resnet26d_224", {"embed_dim": 64, "num_heads": 2}, 64),
}


def randomise(model: nn.Module) -> None:
    """Every tensor away from its neutral value, so that a forgotten norm, bias, token or layer scale changes the output."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator) * 0.1
                tensor.copy_(noise.abs() + 0.5 if name.endswith("running_var") else tensor + noise)


def make_timm(name: str, depth: int | None = DEPTH, **kwargs: object) -> tuple[nn.Module, VitArch]:
    timm_model, arch_args, image_size = MODELS[name]
    model = timm.create_model(timm_model, num_classes=CLASSES, img_size=image_size, depth=depth, **arch_args, **kwargs)
    randomise(model)
    return model, VitArch(timm_model, arch_args, CLASSES, image_size, depth)


def load_span(arch: VitArch, weights: dict[str, Tensor], span: StageSpan, **kwargs: float) -> VitStage:
    return load_stage(arch, span, {name: weights[name] for name in stage_names(arch, span)}, **kwargs)


def compositions(depth: int) -> Iterator[list[StageSpan]]:
    """All 2^(depth-1) ways to cut `depth` blocks."""
    for cuts in itertools.product((False, True), repeat=depth - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), depth]
        yield [StageSpan(a, b - 1, depth) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("name", MODELS)
def test_every_split_runs_timms_forward_bit_for_bit_and_holds_its_names_once(name: str) -> None:
    model, arch = make_timm(name)
    model.eval()
    weights = model.state_dict()
    images_BCHW = torch.randn(3, 3, arch.image_size, arch.image_size, generator=torch.Generator().manual_seed(0))
    spans = {(a, b): StageSpan(a, b, DEPTH) for a in range(DEPTH) for b in range(a, DEPTH)}
    stages = {key: load_span(arch, weights, span).eval() for key, span in spans.items()}
    with torch.no_grad():
        expected_BV = model(images_BCHW)
        seen = 0
        for split in compositions(DEPTH):
            x = images_BCHW
            for span in split:
                x = stages[span.first_block, span.last_block](x)
            assert torch.equal(x, expected_BV), split
            held = [name for span in split for name in stages[span.first_block, span.last_block].state_dict()]
            assert sorted(held) == sorted(weights)
            seen += 1
    assert seen == 8
    assert expected_BV.shape == (3, CLASSES)
    assert (expected_BV[0] - expected_BV[1]).abs().max() > 1e-3  # the output does depend on the image


@pytest.mark.parametrize(
    ("timm_model", "image_size", "depths"),
    [("vit_tiny_patch16_224", 224, (3, 3, 3, 3)), ("vit_small_patch14_reg4_dinov2", 518, (5, 1, 4, 2))],
)
def test_real_configuration_at_full_depth(timm_model: str, image_size: int, depths: tuple[int, ...]) -> None:
    arch = VitArch(timm_model, {}, CLASSES, image_size)
    model = timm.create_model(timm_model, num_classes=CLASSES, img_size=image_size).eval()
    randomise(model)
    edges = [0, *itertools.accumulate(depths)]
    x = images_BCHW = torch.randn(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for a, b in itertools.pairwise(edges):
            x = load_span(arch, model.state_dict(), StageSpan(a, b - 1, 12)).eval()(x)
        assert torch.equal(x, model(images_BCHW))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
def test_training_forward_and_gradients_equal_timms_with_the_global_drop_path_ramp(checkpointing: bool) -> None:
    model, arch = make_timm("deit3: layer scale, positions without class token", drop_path_rate=0.6)
    stages = [
        load_span(arch, model.state_dict(), span, drop_path=0.6) for span in (StageSpan(0, 0, 4), StageSpan(1, 2, 4), StageSpan(3, 3, 4))
    ]
    images_BCHW = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected_BV = model.train()(images_BCHW)
    expected_BV.square().sum().backward()
    torch.manual_seed(5)
    x = images_BCHW
    for stage in stages:
        stage.train().set_grad_checkpointing(checkpointing)
        x = stage(x)
    x.square().sum().backward()
    assert torch.equal(x, expected_BV)
    assert not torch.equal(expected_BV, model.eval()(images_BCHW))  # drop path was active
    gradients = {name: p.grad for stage in stages for name, p in stage.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(gradients[name], parameter.grad), name


def test_drop_path_ramp_is_that_of_the_whole_model() -> None:
    # timm: linspace(0, 0.3, 4) = 0, 0.1, 0.2, 0.3; the authors' release starts at 0 again in every module.
    arch = VitArch("vit_tiny_patch16_224", {}, CLASSES, 32, DEPTH)
    model, _ = make_timm("vit_tiny")
    stage = load_span(arch, model.state_dict(), StageSpan(2, 3, 4), drop_path=0.3)
    rates = [stage.blocks[str(i)].get_submodule("drop_path1").drop_prob for i in (2, 3)]
    assert rates == pytest.approx([0.2, 0.3])


def test_a_stage_says_what_input_it_takes() -> None:
    model, arch = make_timm("vit_tiny")
    stage = load_span(arch, model.state_dict(), StageSpan(1, 2, 4))
    with pytest.raises(ValueError, match=r"stage of blocks 1\.\.2 takes hidden states \[B, L, 192\] and got \[1, 3, 32, 32\]"):
        stage(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"got \[1, 5, 64\]"):
        stage(torch.zeros(1, 5, 64))
