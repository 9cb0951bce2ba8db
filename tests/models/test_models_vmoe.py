"""VisionMoE against timm's ViT (an independent forward pass), against itself in pieces, and its placement and counting rules."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from torch import Tensor

from m2mkd_ds.config import DataConfig, MoEConfig, RouterConfig, RunConfig, StudentConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import (
    StitchSpec,
    VisionMoE,
    VMoEArch,
    arch_from_config,
    count_parameters,
    moe_block_numbers,
    parameter_shapes,
)

ARCH = VMoEArch(
    image_size=16, patch_size=4, num_classes=10, embed_dim=32, num_heads=4, mlp_ratio=2.0, num_blocks=6,
    moe_blocks=(0, 1, 2, 3, 4, 5), num_experts=4, router=RouterConfig(importance_weight=0.1, z_weight=0.01), backend="reference",
)  # fmt: skip
DENSE = dataclasses.replace(ARCH, moe_blocks=())
WHOLE = StageSpan.whole(6)
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def timm_vit(drop_path: float = 0.0) -> torch.nn.Module:
    return timm.models.vision_transformer.VisionTransformer(
        img_size=16, patch_size=4, num_classes=10, embed_dim=32, depth=6, num_heads=4, mlp_ratio=2.0, drop_path_rate=drop_path
    )


def shake(model: torch.nn.Module) -> torch.nn.Module:
    """Large random weights everywhere, so that no branch is nearly zero."""
    g = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=g) * 0.2)
    return model


def test_without_experts_it_is_timms_vit_key_by_key_and_bit_by_bit() -> None:
    oracle = shake(timm_vit()).eval()
    ours = VisionMoE(DENSE, WHOLE, seed=0)
    assert {k: v.shape for k, v in oracle.state_dict().items()} == parameter_shapes(DENSE, WHOLE)
    ours.load_state_dict(oracle.state_dict())
    out = ours(IMAGES)
    want = oracle(IMAGES)
    assert torch.equal(out.output, want)
    assert out.router_losses == {} and out.stats == {}
    out.output.square().sum().backward()
    want.square().sum().backward()
    oracle_grads = {name: p.grad for name, p in oracle.named_parameters()}
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, oracle_grads[name], rtol=1e-5, atol=1e-5, msg=name)


def test_drop_path_is_timms_with_its_global_ramp() -> None:
    oracle = shake(timm_vit(drop_path=0.5)).train()
    ours = VisionMoE(DENSE, WHOLE, seed=0, drop_path=0.5).train()
    ours.load_state_dict(oracle.state_dict())
    assert [b.drop_path.rate for b in ours.blocks.values()] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])  # type: ignore[union-attr]
    module = VisionMoE(DENSE, StageSpan(3, 5, 6), seed=0, drop_path=0.5)
    assert module.blocks["3"].drop_path.rate == pytest.approx(0.3)  # type: ignore[union-attr]
    torch.manual_seed(4)
    want = oracle(IMAGES)
    torch.manual_seed(4)
    assert torch.equal(ours(IMAGES).output, want)
    assert not torch.equal(ours(IMAGES).output, want)  # other random numbers: something was dropped
    assert torch.equal(ours.eval()(IMAGES).output, oracle.eval()(IMAGES))


def test_one_expert_equals_the_dense_block() -> None:
    one = dataclasses.replace(ARCH, num_experts=1, router=RouterConfig(top_k=1, switch_weight=0.0))
    dense, sparse = shake(VisionMoE(DENSE, WHOLE, seed=0)), VisionMoE(one, WHOLE, seed=0)
    weights = dense.state_dict()
    stacked = {"fc1.weight": "up_proj", "fc1.bias": "up_proj_bias", "fc2.weight": "down_proj", "fc2.bias": "down_proj_bias"}
    for name in [name for name in weights if ".mlp." in name]:
        prefix, _, old = name.partition(".mlp.")
        weights[f"{prefix}.moe.experts.{stacked[old]}"] = weights.pop(name)[None]
    weights |= {k: v for k, v in sparse.state_dict().items() if ".router." in k}
    sparse.load_state_dict(weights)
    torch.testing.assert_close(sparse(IMAGES).output, dense(IMAGES).output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("span", [StageSpan(0, 2, 6), StageSpan(3, 5, 6), StageSpan(2, 2, 6)])
def test_a_module_starts_as_the_same_blocks_of_the_whole_model(span: StageSpan) -> None:
    whole = VisionMoE(ARCH, WHOLE, seed=7).state_dict()
    module = VisionMoE(ARCH, span, seed=7).state_dict()
    assert {int(k.split(".")[1]) for k in module if k.startswith("blocks.")} == set(span.blocks)
    assert ("patch_embed.proj.weight" in module) == span.is_first and ("head.weight" in module) == span.is_last
    assert all(torch.equal(v, whole[k]) for k, v in module.items())
    name = f"blocks.{span.last_block}.attn.qkv.weight"
    assert not torch.equal(VisionMoE(ARCH, span, seed=8).state_dict()[name], whole[name])


def test_fresh_weights_leave_the_global_generator_alone_and_fill_everything() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = VisionMoE(ARCH, WHOLE, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    for name, p in model.named_parameters():
        expected = 0.02 if name.endswith(("weight", "_proj", "pos_embed")) and p.ndim > 1 else 0.0
        if name == "patch_embed.proj.weight":  # uniform in +-b has std b / sqrt(3), b = 1/sqrt(48)
            expected = 1 / 12
        assert p.std().item() == pytest.approx(expected, rel=0.2, abs=2e-6), name
    assert not torch.equal(model.blocks["1"].attn.qkv.weight, model.blocks["2"].attn.qkv.weight)  # type: ignore[union-attr, arg-type]


def test_modules_composed_are_the_whole_model() -> None:
    whole = VisionMoE(ARCH, WHOLE, seed=3)
    x: Tensor = IMAGES
    losses: dict[str, Tensor] = {}
    stats = {}
    for span in (StageSpan(0, 0, 6), StageSpan(1, 3, 6), StageSpan(4, 5, 6)):
        out = VisionMoE(ARCH, span, seed=3)(x)
        x = out.output
        losses = {k: losses[k] + v if losses else v for k, v in out.router_losses.items()}
        stats |= out.stats
    want = whole(IMAGES)
    assert torch.equal(x, want.output) and x.shape == (3, 10)
    assert set(losses) == set(want.router_losses) == {"importance", "switch", "z"}
    torch.testing.assert_close(losses, want.router_losses)
    assert list(stats) == list(want.stats) == [0, 1, 2, 3, 4, 5]
    assert all(int(s.load_E.sum()) == 3 * 17 * 2 for s in stats.values())


STITCHES = (
    StitchSpec(0, "post", 1, 32, 48), StitchSpec(1, "pre", 2, 48, 32), StitchSpec(1, "post", 3, 32, 48), StitchSpec(2, "pre", 4, 48, 32),
)  # fmt: skip


def test_kept_stitches_compose_and_their_keys_carry_the_pair() -> None:
    whole = VisionMoE(ARCH, WHOLE, stitches=STITCHES, seed=3)
    weights = whole.state_dict()
    x = IMAGES
    seen: set[str] = set()
    for pair, span in enumerate((StageSpan(0, 1, 6), StageSpan(2, 3, 6), StageSpan(4, 5, 6))):
        module = VisionMoE(ARCH, span, stitches=[s for s in STITCHES if s.pair == pair], seed=3)
        part = module.state_dict()
        assert seen.isdisjoint(part)
        seen |= set(part)
        assert all(torch.equal(v, weights[k]) for k, v in part.items())
        x = module(x).output
        assert x.shape == ((3, 17, 48) if pair < 2 else (3, 10))
    assert seen == set(weights)
    assert torch.equal(x, whole(IMAGES).output)
    leaves = ("norm.bias", "norm.weight", "proj.bias", "proj.weight")
    assert sorted(k for k in weights if k.startswith("stitches.1.")) == [
        f"stitches.1.{kind}.{k}" for kind in ("post", "pre") for k in leaves
    ]
    plain = VisionMoE(ARCH, WHOLE, seed=3)
    assert not torch.allclose(plain(IMAGES).output, x)  # the stitches do something


@pytest.mark.parametrize(
    ("stitches", "message"),
    [
        ([StitchSpec(0, "post", 2, 32, 48)], "block 3 has width 32 and gets 48; a kept post stitch needs the pre stitch"),
        ([StitchSpec(0, "post", 2, 48, 32)], "in_dim does not meet the width 32 after block 2"),
        ([StitchSpec(0, "pre", 1, 48, 32)], "in_dim does not meet the width 32 before block 1"),
        ([StitchSpec(0, "pre", 0, 48, 32)], "the first block takes the image"),
        ([StitchSpec(2, "post", 5, 32, 48)], "the last one feeds the head"),
        ([StitchSpec(0, "post", 9, 32, 48)], r"block is outside the span 0\.\.5"),
        ([StitchSpec(0, "pre", 2, 32, 32), StitchSpec(1, "pre", 2, 32, 32)], "more than one of a kind"),
        ([StitchSpec(0, "pre", 2, 32, 32), StitchSpec(0, "pre", 3, 32, 32)], "more than one of a kind"),
    ],
)
def test_misplaced_stitches_are_refused(stitches: list[StitchSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionMoE(ARCH, WHOLE, stitches=stitches, seed=None)


def test_wrong_input_and_wrong_span_are_named() -> None:
    with pytest.raises(ValueError, match=r"expects images \[B, 3, 16, 16\], given \[2, 3, 20, 20\]"):
        VisionMoE(ARCH, WHOLE, seed=0)(torch.zeros(2, 3, 20, 20))
    with pytest.raises(ValueError, match="span is of a model of 5 blocks, the student has 6"):
        VisionMoE(ARCH, StageSpan.whole(5), seed=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 5}, "image_size 16 is not a multiple of patch_size 5"),
        ({"num_heads": 5}, "embed_dim 32 is not a multiple of num_heads 5"),
        ({"moe_blocks": (2, 1)}, "must be ascending block numbers from 0 to 5"),
        ({"moe_blocks": (6,)}, "must be ascending block numbers from 0 to 5"),
    ],
)
def test_an_impossible_arch_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ARCH, **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("placement", "n", "blocks"),
    [("all", 2, (0, 1, 2, 3, 4, 5)), ("every", 2, (1, 3, 5)), ("every", 4, (3,)), ("last", 2, (4, 5)), ("last", 6, (0, 1, 2, 3, 4, 5))],
)
def test_placement_by_hand(placement: str, n: int, blocks: tuple[int, ...]) -> None:
    assert moe_block_numbers(MoEConfig(placement=placement, placement_n=n), 6) == blocks  # type: ignore[arg-type]


def test_placement_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"placement_n is 7; allowed is 1 to the student's 6 blocks"):
        moe_block_numbers(MoEConfig(placement="last", placement_n=7), 6)


def test_mixed_placement_names_dense_and_sparse_blocks() -> None:
    shapes = parameter_shapes(dataclasses.replace(ARCH, moe_blocks=(1,)), StageSpan(0, 1, 6))
    assert "blocks.0.mlp.fc1.weight" in shapes and "blocks.0.moe.router.weight" not in shapes
    assert shapes["blocks.1.moe.experts.up_proj"] == (4, 64, 32) and "blocks.1.mlp.fc1.weight" not in shapes
    assert shapes["blocks.1.moe.router.weight"] == (4, 32)


def test_arch_of_a_run_and_the_size_of_v_moe_base() -> None:
    config = RunConfig(name="t", data=DataConfig(num_classes=1000, image_size=224), student=StudentConfig())
    arch = arch_from_config(config)
    assert arch.num_blocks == 12 and arch.num_tokens == 197 and arch.hidden_dim == 3072
    d, f, e = 768, 3072, 8
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (e * d + e)  # two norms, qkv, proj, router
    expert = 2 * d * f + f + d
    outside = 3 * 16 * 16 * d + d + d + 197 * d + 2 * d + 1000 * d + 1000  # patches, class token, positions, norm, head
    assert count_parameters(arch) == (12 * (block + e * expert) + outside, 12 * (block + 2 * expert) + outside)


def test_meta_construction_takes_no_memory_for_weights() -> None:
    model = VisionMoE(ARCH, WHOLE, seed=None)
    assert all(p.is_meta for p in model.parameters())


def test_every_parameter_gets_a_gradient_in_train_mode() -> None:
    model = VisionMoE(dataclasses.replace(ARCH, backend="grouped"), WHOLE, stitches=STITCHES, seed=1).train()
    out = model(IMAGES)
    (out.output.square().sum() + sum(out.router_losses.values())).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert not any(t.requires_grad for s in out.stats.values() for t in (s.load_E, s.importance_E, s.entropy, s.max_logit))
