"""TimmVMoE against VisionMoE (same bits), against hooks on its blocks, and under timm's own tools."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from m2mkd_ds.models.timm_vmoe import TimmVMoE, arch_from_dict, arch_to_dict
from m2mkd_ds.models.vmoe import VisionMoE
from tests.checkpoint.students import ARCH, STITCHES, shaken

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def timm_of(model: VisionMoE) -> TimmVMoE:
    ours = TimmVMoE(model.arch, model.stitch_specs, seed=None)
    ours.load_state_dict(model.state_dict(), assign=True)
    return ours.eval()


def block_outputs(model: TimmVMoE, images: Tensor) -> list[Tensor]:
    """What hooks on the blocks see, in running order."""
    seen: list[Tensor] = []
    handles = [block.register_forward_hook(lambda module, inputs, output: seen.append(output)) for block in model.blocks]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("router", ["fastmoe", "vmoe", "switch", "loss_free", "expert_choice"])
@pytest.mark.parametrize("stitches", [(), STITCHES], ids=["bare", "stitched"])
def test_logits_are_visionmoes_bit_for_bit(router: str, stitches: tuple) -> None:
    model = shaken(dataclasses.replace(ARCH, router=ROUTER_PRESETS[router]), stitches)
    ours = timm_of(model)
    assert ours.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        expected = model(IMAGES)
        assert torch.equal(ours(IMAGES), expected.output)
        routed = ours.forward_routed(IMAGES)
    assert torch.equal(routed.output, expected.output)
    assert routed.router_losses == expected.router_losses
    assert {i: s.load_E.tolist() for i, s in routed.stats.items()} == {i: s.load_E.tolist() for i, s in expected.stats.items()}


def test_fresh_weights_and_drop_path_are_visionmoes() -> None:
    model, ours = VisionMoE(ARCH, shaken().span, drop_path=0.3, seed=7), TimmVMoE(ARCH, drop_path_rate=0.3, seed=7)
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    assert [b.drop_path.rate for b in ours.blocks] == [b.drop_path.rate for b in model.blocks.values()]


@pytest.mark.parametrize("stitches", [(), STITCHES], ids=["bare", "stitched"])
@torch.no_grad()
def test_intermediates_are_what_hooks_on_the_blocks_see(stitches: tuple) -> None:
    model = timm_of(shaken(stitches=stitches))
    seen = block_outputs(model, IMAGES)
    final, taken = model.forward_intermediates(IMAGES, output_fmt="NLC")
    assert len(taken) == 4 and all(torch.equal(ours, hooked[:, 1:]) for ours, hooked in zip(taken, seen, strict=True))
    assert torch.equal(final, model.forward_features(IMAGES))
    chosen = model.forward_intermediates(IMAGES, [-1, 1], output_fmt="NCHW", intermediates_only=True)
    # 16 patches: 4 x 4, row by row; given in running order whatever the order of the numbers.
    for ours, hooked in zip(chosen, [seen[1], seen[3]], strict=True):
        assert ours.shape == (3, 32, 4, 4)
        assert torch.equal(ours[:, :, 2, 3], hooked[:, 1 + 2 * 4 + 3])
    normed = model.forward_intermediates(IMAGES, 1, norm=True, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True)
    patches, token = normed[0]
    assert torch.equal(torch.cat([token, patches], dim=1), model.norm(seen[3]))


@torch.no_grad()
def test_stop_early_leaves_later_blocks_out() -> None:
    model = timm_of(shaken())
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, inputs, output, i=i: ran.append(i))
    final, _ = model.forward_intermediates(IMAGES, [1], stop_early=True)
    assert ran == [0, 1]
    ran.clear()
    later, _ = model.forward_intermediates(IMAGES, [1])
    assert ran == [0, 1, 2, 3] and not torch.equal(final, later)


@torch.no_grad()
def test_the_head_can_be_read_reset_and_taken_off() -> None:
    model = timm_of(shaken())
    features = model.forward_features(IMAGES)
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, features[:, 0])
    assert torch.equal(model.get_classifier()(pooled), model(IMAGES))
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(IMAGES).shape == (3, 7)
    model.reset_classifier(0, "avg")
    torch.testing.assert_close(model(IMAGES), features[:, 1:].mean(dim=1))
    model.reset_classifier(0, "")
    assert torch.equal(model(IMAGES), features)
    with pytest.raises(ValueError, match="global_pool is 'map'; allowed"):
        model.reset_classifier(0, "map")
    assert TimmVMoE(ARCH, num_classes=0)(IMAGES).shape == (3, 32)


def test_gradient_checkpointing_changes_no_gradient() -> None:
    plain, saving = (TimmVMoE(ARCH, seed=3).train() for _ in range(2))
    saving.set_grad_checkpointing()
    calls: list[int] = []
    saving.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model in (plain, saving):
        model(IMAGES).square().sum().backward()
    assert len(calls) == 2  # once forward, once again for the backward pass
    for (name, a), (_, b) in zip(plain.named_parameters(), saving.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name


def test_timms_optimizer_factory_decays_matrices_only() -> None:
    model = TimmVMoE(ARCH)
    name_of = {id(p): name for name, p in model.named_parameters()}
    groups = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5).param_groups
    decayed = {name_of[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert "pos_embed" not in decayed and "cls_token" not in decayed
    assert {"head.weight", "blocks.2.moe.experts.up_proj", "patch_embed.proj.weight"} <= decayed
    scale = {name_of[id(p)]: g["lr_scale"] for g in groups for p in g["params"]}
    # Stem, four blocks, then norm and head: the stem is five layers below the head.
    assert scale["head.weight"] == 1.0 and scale["patch_embed.proj.weight"] == 0.5**5 and scale["blocks.3.norm1.weight"] == 0.5


def test_an_architecture_survives_json() -> None:
    arch = dataclasses.replace(ARCH, router=ROUTER_PRESETS["vmoe"], activation="swiglu")
    assert arch_from_dict(arch_to_dict(arch)) == arch
    with pytest.raises(ValueError, match="arch: .*'wings'"):
        arch_from_dict({**arch_to_dict(arch), "wings": 2})


@pytest.mark.parametrize(("given", "message"), [({"img_size": 32}, "img_size is 32"), ({"in_chans": 1}, "in_chans is 1")])
def test_sizes_that_the_model_does_not_have_are_refused(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmVMoE(ARCH, **given)


def test_a_router_config_is_part_of_the_architecture() -> None:
    assert arch_to_dict(ARCH)["router"]["top_k"] == RouterConfig().top_k


@pytest.mark.parametrize(("indices", "message"), [(5, "indices is 5"), (0, "indices is 0"), ([4], r"are \[4\]"), ([], r"are \[\]")])
def test_blocks_that_there_are_not_are_refused(indices: int | list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TimmVMoE(ARCH).forward_intermediates(IMAGES, indices)
