"""Every architecture, router and expert path: the exported folder gives the training code's logits bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from m2mkd_ds.checkpoint.hf.check import Picture, check_export
from m2mkd_ds.checkpoint.hf.export import load_exported
from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from m2mkd_ds.data.pil_transforms import eval_transform
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from tests.checkpoint.exported_models import ARCH, DATA, IMAGES, NAMES, STITCHES, export, logits, make_model


def test_a_fresh_process_without_m2mkd_ds_gives_the_same_bits(tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(ARCH, moe_blocks=(1, 3)), STITCHES)
    folder = export(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (47, 61, 3), dtype=np.uint8))
    picture = Picture(torch.tensor(np.asarray(image)), eval_transform(DATA)(image))
    result = check_export(folder, IMAGES, logits(model), picture=picture)
    assert result["max_abs_diff"] == 0.0
    assert result["prediction"]["label"] in NAMES


def test_a_folder_with_other_weights_fails_the_check(tmp_path: Path) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"logits of the exported model differ by up to 0\.00\d+; allowed is 0.0001"):
        check_export(folder, IMAGES, logits(model) + 0.002, atol=1e-4)
    grey = torch.full((28, 28, 3), 128, dtype=torch.uint8)
    with pytest.raises(ValueError, match="image processor gives other pixels than the evaluation transform"):
        check_export(folder, IMAGES, logits(model), picture=Picture(grey, torch.zeros(3, 28, 28)))


@pytest.mark.parametrize(
    "change",
    [
        {"router": RouterConfig(top_k=1, softmax="before")},
        {"router": RouterConfig(top_k=4)},
        {"router": RouterConfig(top_k=2, softmax="before", renormalize=True, bias=False)},
        {"moe_blocks": (), "router": RouterConfig(top_k=2)},
        {"backend": "reference", "embed_dim": 30, "num_heads": 3, "mlp_ratio": 1.51},
    ],
    ids=["k1 before", "k4", "renormalise, no bias", "dense", "odd widths, loop"],
)
def test_every_arch_keeps_its_bits(change: dict[str, Any], tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, **change))
    folder = export(model, tmp_path / "out")
    assert torch.equal(logits(auto(folder)), logits(model))
    loaded = load_exported(folder)
    assert loaded.arch == model.arch


ROUTERS = {
    "vmoe": ROUTER_PRESETS["vmoe"],  # noise in training only, and room for everybody in evaluation
    "noisy, tight": dataclasses.replace(ROUTER_PRESETS["vmoe"], eval_capacity_factor=0.5),
    "switch": dataclasses.replace(ROUTER_PRESETS["switch"], eval_capacity_factor=0.7, capacity_multiple=2),
    "order": RouterConfig(top_k=3, eval_capacity_factor=0.6),
    "batch": RouterConfig(top_k=3, eval_capacity_factor=0.6, capacity_priority="batch"),
    "loss free": ROUTER_PRESETS["loss_free"],
    "loss free, after, batch": RouterConfig(balance_rate=0.1, eval_capacity_factor=0.8, capacity_priority="batch"),
    "expert choice": dataclasses.replace(ROUTER_PRESETS["expert_choice"], capacity_factor=1.3),
    "expert choice, eval": dataclasses.replace(ROUTER_PRESETS["expert_choice"], eval_capacity_factor=0.4, bias=True),
    "expert choice, all": dataclasses.replace(ROUTER_PRESETS["expert_choice"], capacity_factor=9.0),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_keeps_its_bits(name: str, tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, router=ROUTERS[name], backend="reference"))
    folder = export(model, tmp_path / "out")
    want = logits(model)
    assert torch.equal(logits(auto(folder)), want)
    assert torch.equal(logits(auto(folder, expert_backend="grouped")), want)
    loaded = load_exported(folder)
    assert loaded.arch == model.arch and set(loaded.tensors) == set(model.state_dict())
    # Each setting matters: the same weights behind the plain router give something else.
    plain = dataclasses.replace(ARCH, router=RouterConfig(bias=model.arch.router.bias), backend="reference")
    other = VisionMoE(plain, StageSpan.whole(4), seed=None).eval()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if "balance_bias" not in k}, assign=True)
    assert not torch.equal(logits(other), want)


def test_swiglu_experts_keep_their_bits(tmp_path: Path, auto: Any) -> None:
    for place, backend in (("a", "reference"), ("b", "grouped")):
        model = make_model(dataclasses.replace(ARCH, activation="swiglu", backend=backend))
        assert model.state_dict()["blocks.0.moe.experts.up_proj"].shape == (4, 128, 32)  # gate and value, 64 each
        folder = export(model, tmp_path / place)
        assert torch.equal(logits(auto(folder)), logits(model))
        assert load_exported(folder).arch == model.arch
    with pytest.raises(ValueError, match="expert_activation is 'relu'; allowed is gelu or swiglu"):
        auto(folder, expert_activation="relu")


@pytest.mark.parametrize("kind", ["balanced", "zipf"])
def test_a_benchmark_router_is_not_exported(kind: Any, tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(ARCH, router=RouterConfig(kind=kind)))
    with pytest.raises(ValueError, match=rf"student.moe.router.kind is '{kind}', a benchmark's router.*needs topk, noisy_topk or"):
        export(model, tmp_path / "out")


def test_balance_bias_stays_fp32_in_a_bf16_export(tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, router=ROUTER_PRESETS["loss_free"]))
    exported = auto(export(model, tmp_path / "out", dtype="bf16"))
    for loaded in (exported, exported.to(torch.bfloat16)):
        bias_E = loaded.blocks[1].moe.router.balance_bias
        assert bias_E.dtype == torch.float32
        assert torch.equal(bias_E, model.state_dict()["blocks.1.moe.router.balance_bias"])


def test_all_expert_paths_give_the_same_bits_and_unknown_ones_are_refused(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    for backend in ("auto", "grouped", "loop"):
        assert torch.equal(logits(auto(folder, expert_backend=backend)), logits(model)), backend
    torch.testing.assert_close(logits(auto(folder, expert_backend="dense")), logits(model), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="expert_backend is 'fast'; allowed is auto, grouped, loop or dense"):
        logits(auto(folder, expert_backend="fast"))
    odd = make_model(dataclasses.replace(ARCH, backend="reference", embed_dim=30, num_heads=3))
    with pytest.raises(ValueError, match="expert_backend=grouped cannot run .* widths 30 and 60; use loop or dense"):
        logits(auto(export(odd, tmp_path / "odd"), expert_backend="grouped"))
