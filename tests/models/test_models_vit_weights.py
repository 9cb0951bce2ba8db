"""Weights of a stage: timm's initialisation, complete and reproducible; exact loading; weights made for another shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, adapt_weights, build_stage, empty_stage, load_stage, pretrained_weights, stage_names

TINY = VitArch("vit_tiny_patch16_224", {}, 10, 32, depth=4)
WHOLE = StageSpan.whole(4)
CUT = (StageSpan(0, 1, 4), StageSpan(2, 2, 4), StageSpan(3, 3, 4))

INITS: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {}, 32),
    "deit3": ("deit3_small_patch16_224", {}, 32),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", {}, 28),
    "siglip": ("vit_base_patch16_siglip_224", {"embed_dim": 192, "num_heads": 3}, 32),
    "rms norm, swiglu": ("aimv2_1b_patch14_224", {"embed_dim": 192, "num_heads": 3}, 28),
    "attention and mlp in parallel": ("vit_base_patch16_xp_224", {"embed_dim": 192, "num_heads": 3}, 32),
    "two of each a block": ("vit_small_patch16_18x2_224", {}, 32),
    "norm after": ("vit_base_patch16_rpn_224", {"embed_dim": 192, "num_heads": 3, "init_values": 0.1}, 32),
    "jax": ("vit_tiny_patch16_224", {"weight_init": "jax_nlhb"}, 32),
    "moco": ("vit_tiny_patch16_224", {"weight_init": "moco"}, 32),
    "scaled by depth": ("vit_tiny_patch16_224", {"fix_init": True}, 32),
}


@pytest.mark.parametrize("name", INITS)
def test_first_values_have_the_statistics_of_timms_own_init(name: str) -> None:
    timm_model, arch_args, image_size = INITS[name]
    arch = VitArch(timm_model, arch_args, 10, image_size, depth=4)
    torch.manual_seed(0)
    expected = timm.create_model(timm_model, num_classes=10, img_size=image_size, depth=4, **arch_args).state_dict()
    got: dict[str, Tensor] = {}
    for span in CUT:  # stage by stage: block numbers must be those of the whole model
        got |= build_stage(arch, span, seed=1).state_dict()
    assert got.keys() == expected.keys()
    for key, reference in expected.items():
        value = got[key]
        assert value.dtype == reference.dtype and value.shape == reference.shape
        if reference.float().std() == 0 or reference.numel() == 1:
            assert torch.equal(value, reference), key
            continue
        # Both are samples of one distribution: compare mean and std within 6 standard errors of their difference.
        n, std = reference.numel(), reference.std().item()
        assert abs(value.mean() - reference.mean()).item() < 6 * std * math.sqrt(2 / n), key
        assert abs(math.log(value.std().item() / std)) < 6 / math.sqrt(n), key


def test_known_first_values() -> None:
    weights = build_stage(TINY, WHOLE, seed=0).state_dict()
    assert weights["blocks.2.mlp.fc1.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["pos_embed"].std().item() == pytest.approx(0.02, rel=0.1)
    assert weights["cls_token"].std().item() == pytest.approx(1e-6, rel=0.2)
    assert not weights["blocks.2.attn.qkv.bias"].any() and not weights["head.bias"].any()
    assert torch.equal(weights["blocks.2.norm1.weight"], torch.ones(192)) and not weights["norm.bias"].any()
    # Convolution: uniform within 1 / sqrt(fan_in), fan_in = 3 * 16 * 16.
    assert weights["patch_embed.proj.weight"].abs().max().item() == pytest.approx(1 / math.sqrt(768), rel=1e-3)


def test_no_weight_is_a_hundred_standard_deviations_off() -> None:
    # With this seed a draw of block 0 hits the lower bound -2 of timm's trunc_normal_.
    weights = build_stage(TINY, StageSpan(0, 0, 4), seed=1).state_dict()
    assert max(tensor.abs().max().item() for name, tensor in weights.items() if name.endswith("weight") and tensor.ndim == 2) < 0.14


def test_the_same_seed_gives_the_same_bits_in_every_span_and_another_seed_others() -> None:
    whole = build_stage(TINY, WHOLE, seed=3).state_dict()
    pieces: dict[str, Tensor] = {}
    for span in CUT:
        pieces |= build_stage(TINY, span, seed=3).state_dict()
    assert whole.keys() == pieces.keys()
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    other = build_stage(TINY, WHOLE, seed=4).state_dict()
    for name in ("patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight", "head.weight"):
        assert not torch.equal(whole[name], other[name]), name
    assert not torch.equal(whole["blocks.0.attn.qkv.weight"], whole["blocks.1.attn.qkv.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    build_stage(TINY, StageSpan(1, 1, 4), seed=0)
    assert torch.equal(torch.rand(3), expected)


class ForgetfulBlock(Block):
    """Has a parameter that timm's initialisation does not know."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.gate = nn.Parameter(torch.zeros(dim, device=kwargs.get("device")))


class DecayBlock(Block):
    """Has a buffer that no file holds, as timm's position tables are."""

    def __init__(self, dim: int, depth: int = 0, **kwargs: Any) -> None:
        super().__init__(dim, depth=depth, **kwargs)
        self.depth = depth
        self.register_buffer("decay", torch.empty(dim, device=kwargs.get("device")), persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        self.decay.copy_(torch.linspace(0.5, 1.0 + self.depth, len(self.decay)))

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(x * self.decay, **kwargs)


class LostBufferBlock(Block):
    """Has such a buffer and no way to restore it."""

    def __init__(self, dim: int, **kwargs: Any) -> None:
        super().__init__(dim, **kwargs)
        self.register_buffer("table", torch.arange(dim, device=kwargs.get("device")), persistent=False)


def test_a_parameter_that_the_initialisation_leaves_unset_is_an_error() -> None:
    arch = VitArch("vit_tiny_patch16_224", {"block_fn": ForgetfulBlock}, 10, 32, depth=4)
    with pytest.raises(ValueError, match=r"leaves blocks\.1\.gate unset"):
        build_stage(arch, StageSpan(1, 1, 4), seed=0)


def test_buffers_that_no_file_holds_are_right_after_building_and_loading() -> None:
    arch = VitArch("vit_tiny_patch16_224", {"block_fn": DecayBlock}, 10, 32, depth=4)
    model = timm.create_model("vit_tiny_patch16_224", block_fn=DecayBlock, num_classes=10, img_size=32, depth=4).eval()
    built = build_stage(arch, StageSpan(2, 3, 4), seed=0)
    assert torch.equal(built.blocks["2"].decay, model.blocks[2].decay)
    assert torch.equal(built.blocks["3"].decay, torch.linspace(0.5, 4.0, 192))
    assert "blocks.2.decay" not in built.state_dict()
    x = images_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    weights = model.state_dict()
    with torch.no_grad():
        for span in CUT:
            x = load_stage(arch, span, {name: weights[name] for name in stage_names(arch, span)}).eval()(x)
        assert torch.equal(x, model(images_BCHW))


def test_a_buffer_that_cannot_be_restored_is_an_error() -> None:
    arch = VitArch("vit_tiny_patch16_224", {"block_fn": LostBufferBlock}, 10, 32, depth=4)
    with pytest.raises(ValueError, match=r"no file holds the buffers blocks\.1\.table"):
        build_stage(arch, StageSpan(1, 1, 4), seed=0)


def test_a_convolutional_stem_is_loaded_but_not_made() -> None:
    arch = VitArch("vit_small_resnet26d_224", {"embed_dim": 64, "num_heads": 2}, 10, 64, depth=4)
    with pytest.raises(ValueError, match=r"stem HybridEmbed.*teacher\.source=pretrained"):
        build_stage(arch, StageSpan(0, 1, 4), seed=0)
    build_stage(arch, StageSpan(1, 3, 4), seed=0)  # the other stages are plain


def test_loading_is_exact_or_an_error_that_lists_the_names() -> None:
    span = StageSpan(1, 2, 4)
    weights = build_stage(TINY, span, seed=0).state_dict()
    missing = {name: tensor for name, tensor in weights.items() if name != "blocks.2.norm2.bias"}
    with pytest.raises(ValueError, match=r"blocks 1\.\.2 of vit_tiny.*missing \['blocks\.2\.norm2\.bias'\], unused none"):
        load_stage(TINY, span, missing)
    with pytest.raises(ValueError, match=r"missing none, unused \['blocks\.0\.norm1\.bias', 'head\.bias'\]"):
        load_stage(TINY, span, {**weights, "head.bias": torch.zeros(10), "blocks.0.norm1.bias": torch.zeros(192)})
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.bias \[5\] instead of \[192\]"):
        load_stage(TINY, span, {**weights, "blocks.1.norm1.bias": torch.zeros(5)})


def test_a_loaded_stage_owns_fp32_copies() -> None:
    span = StageSpan(1, 1, 4)
    given = {name: tensor.to(torch.bfloat16) for name, tensor in build_stage(TINY, span, seed=0).state_dict().items()}
    stage = load_stage(TINY, span, given)
    for name, parameter in stage.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.requires_grad
        assert torch.equal(parameter, given[name].float())
    with torch.no_grad():
        stage.blocks["1"].norm1.weight.add_(1)
    assert torch.equal(given["blocks.1.norm1.weight"], torch.ones(192, dtype=torch.bfloat16))


def test_a_span_of_another_depth_is_an_error() -> None:
    with pytest.raises(ValueError, match="span is one of 5 blocks and vit_tiny_patch16_224 has 4"):
        empty_stage(TINY, StageSpan(0, 1, 5))


def save_locally(folder: Path, *, num_classes: int, image_size: int = 32, arch: str = "vit_tiny_patch16_224") -> dict[str, Tensor]:
    """A hub entry on disk, written by timm itself."""
    torch.manual_seed(1)
    model = timm.create_model(arch, depth=4, num_classes=num_classes, img_size=image_size)
    save_for_hf(model, folder, model_args={"depth": 4, "img_size": image_size})
    return model.state_dict()


def test_pretrained_weights_of_a_hub_entry_come_back_as_they_are(tmp_path: Path) -> None:
    saved = save_locally(tmp_path, num_classes=10)
    weights = pretrained_weights(VitArch(f"local-dir:{tmp_path}", {}, 10, 32))
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)


def test_pretrained_positions_are_resized_and_a_head_of_other_classes_is_fresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved = save_locally(tmp_path, num_classes=10)
    arch = VitArch(f"local-dir:{tmp_path}", {}, 7, 64)
    with pytest.raises(ValueError, match=r"head of 10 classes and data\.num_classes is 7: an untrained head cannot teach"):
        pretrained_weights(arch)
    weights = pretrained_weights(arch, head_seed=5)
    assert "the weights have 10 classes, this run 7" in caplog.text
    # The independent way: torch's antialiased bicubic on the 2 x 2 grid of positions, the class token's kept.
    grid = saved["pos_embed"][:, 1:].reshape(1, 2, 2, 192).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(4, 4), mode="bicubic", antialias=True).permute(0, 2, 3, 1).reshape(1, 16, 192)
    torch.testing.assert_close(weights["pos_embed"], torch.cat([saved["pos_embed"][:, :1], grid], dim=1))
    fresh = build_stage(arch, StageSpan(3, 3, 4), seed=5).state_dict()
    assert torch.equal(weights["head.weight"], fresh["head.weight"]) and weights["head.weight"].shape == (7, 192)
    kept = [name for name in saved if name != "pos_embed" and not name.startswith("head.")]
    assert all(torch.equal(weights[name], saved[name]) for name in kept)
    assert load_stage(arch, StageSpan.whole(4), weights).head.out_features == 7


def test_weights_under_the_authors_names_are_converted() -> None:
    arch = VitArch("deit3_small_patch16_224", {"depth": 4}, 10, 32)
    wanted = build_stage(arch, WHOLE, seed=0).state_dict()
    original = {name.replace(".ls1.gamma", ".gamma_1").replace(".ls2.gamma", ".gamma_2"): t for name, t in wanted.items()}
    assert "blocks.3.gamma_2" in original
    weights = adapt_weights(arch, original)
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_a_siglip_without_its_attention_pool_is_filled_exactly() -> None:
    args = {"embed_dim": 64, "num_heads": 2, "depth": 4}
    torch.manual_seed(2)
    saved = timm.create_model("vit_base_patch16_siglip_224", img_size=32, num_classes=0, **args).state_dict()
    arch = VitArch("vit_base_patch16_siglip_gap_224", args, 10, 32)
    weights = adapt_weights(arch, saved, head_seed=1)
    assert not [name for name in weights if name.startswith("attn_pool")]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in weights.items() if not name.startswith("head."))
    saved.pop("blocks.1.attn.qkv.weight")
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight"):
        adapt_weights(arch, saved, head_seed=1)


def test_weights_that_do_not_fill_the_model_are_an_error() -> None:
    arch = VitArch("vit_tiny_patch16_224", {"depth": 4}, 10, 32)
    weights = build_stage(arch, WHOLE, seed=0).state_dict()
    with pytest.raises(ValueError, match=r"Missing key.*blocks\.3\.norm1\.bias"):
        adapt_weights(arch, {name: tensor for name, tensor in weights.items() if name != "blocks.3.norm1.bias"})
    with pytest.raises(ValueError, match=r"Unexpected key.*blocks\.4\.norm1\.bias"):
        adapt_weights(arch, {**weights, "blocks.4.norm1.bias": torch.zeros(192)})
    with pytest.raises(ValueError, match="holds no tensors"):
        adapt_weights(arch, {})


def test_weights_that_cannot_be_reached_are_an_error_that_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"vit_small_patch16_384 cannot be used .*set teacher\.weights to a file"):
        pretrained_weights(VitArch("vit_small_patch16_384", {}, 1000, 384))
    with pytest.raises(ValueError, match=r"no weights for deit_large_patch16_224; set teacher\.weights"):
        pretrained_weights(VitArch("deit_large_patch16_224"))
