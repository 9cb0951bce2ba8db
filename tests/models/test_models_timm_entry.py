"""`timm.create_model("m2mkd_vmoe", weights=...)` and `m2mkd_ds.create_model`: the weights of a run or an export under timm's own tools."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import m2mkd_ds
from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.config import ConfigError
from m2mkd_ds.data.pil_transforms import eval_transform
from m2mkd_ds.models.timm_vmoe import TimmVMoE
from m2mkd_ds.timm_models import NAME
from tests.checkpoint.students import ARCH, DATA, NAMES, STITCHES, exported, run_folder, shaken

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("stitches", [(), STITCHES], ids=["bare", "stitched"])
@torch.no_grad()
def test_an_export_gives_the_logits_of_the_model_it_was_made_of(tmp_path: Path, stitches: tuple) -> None:
    model = shaken(stitches=stitches)
    folder = exported(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    expected = model(IMAGES).output
    assert torch.equal(timm.create_model(NAME, weights=folder).eval()(IMAGES), expected)
    assert torch.equal(m2mkd_ds.create_model(folder).eval()(IMAGES), expected)
    overlaid = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay={"file": str(folder)})
    assert torch.equal(overlaid.eval()(IMAGES), expected)


@pytest.mark.parametrize("keep_stitches", [False, True])
@torch.no_grad()
def test_a_run_and_its_weights_file_give_the_runs_student(tmp_path: Path, keep_stitches: bool) -> None:
    run, student = run_folder(tmp_path / "run", keep_stitches=keep_stitches)
    expected = student(IMAGES).output
    assert torch.equal(m2mkd_ds.create_model(run).eval()(IMAGES), expected)
    assert torch.equal(m2mkd_ds.create_model(run / "end_to_end" / "weights.safetensors").eval()(IMAGES), expected)


def test_weights_of_a_module_are_no_student(tmp_path: Path) -> None:
    run, student = run_folder(tmp_path / "run")
    file = run / "m2mkd" / "weights.safetensors"
    file.parent.mkdir()
    save_weights(file, student.state_dict(), {"phase": "m2mkd", "pair": "0"})
    with pytest.raises(ValueError, match="the phase 'm2mkd'; a whole student comes from"):
        m2mkd_ds.create_model(file)
    tensors = student.state_dict()
    tensors.pop("blocks.1.norm1.weight")
    save_weights(run / "end_to_end" / "weights.safetensors", tensors, {"phase": "end_to_end"})
    with pytest.raises(ValueError, match=r"1 missing: blocks\.1\.norm1\.weight"):
        m2mkd_ds.create_model(run)


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    folder = exported(shaken(), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(StoreError, match="changed since the export"):
        m2mkd_ds.create_model(folder)


@torch.no_grad()
def test_another_number_of_classes_gives_a_fresh_head_on_the_same_features(tmp_path: Path) -> None:
    model = shaken()
    folder = exported(model, tmp_path / "model")
    other, none = m2mkd_ds.create_model(folder, num_classes=9).eval(), m2mkd_ds.create_model(folder, num_classes=0).eval()
    assert other(IMAGES).shape == (3, 9) and other.pretrained_cfg["num_classes"] == 5
    features = m2mkd_ds.create_model(folder).eval().forward_features(IMAGES)
    assert torch.equal(other.forward_features(IMAGES), features) and torch.equal(none(IMAGES), features[:, 0])


def test_pretrained_false_takes_the_architecture_only(tmp_path: Path) -> None:
    folder = exported(shaken(stitches=STITCHES), tmp_path / "model")
    fresh = m2mkd_ds.create_model(folder, pretrained=False)
    expected = TimmVMoE(ARCH, STITCHES, seed=0).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fresh.state_dict().items())
    assert fresh.pretrained_cfg["mean"] == DATA.mean


@torch.no_grad()
def test_features_only_extracts_what_the_blocks_put_out(tmp_path: Path) -> None:
    folder = exported(shaken(), tmp_path / "model")
    extractor = m2mkd_ds.create_model(folder, features_only=True, out_indices=[0, 2]).eval()
    whole = m2mkd_ds.create_model(folder).eval()
    expected = whole.forward_intermediates(IMAGES, [0, 2], intermediates_only=True)
    assert [a.shape == b.shape and torch.equal(a, b) for a, b in zip(extractor(IMAGES), expected, strict=True)] == [True, True]
    assert extractor.feature_info.channels() == [32, 32] and extractor.feature_info.reduction() == [4, 4]
    assert len(extractor.model.blocks) == 3  # the last block and the head are not kept
    hooked = m2mkd_ds.create_model(folder, features_only=True, out_indices=[0, 2], feature_cls="hook").eval()
    assert torch.equal(hooked(IMAGES)[1][:, 1:], whole.forward_intermediates(IMAGES, [2], output_fmt="NLC", intermediates_only=True)[0])


def test_timms_transform_prepares_images_as_our_evaluation_does(tmp_path: Path) -> None:
    model = m2mkd_ds.create_model(exported(shaken(), tmp_path / "model"))
    config = resolve_model_data_config(model)
    assert config["input_size"] == (3, 16, 16) and config["mean"] == DATA.mean and config["std"] == DATA.std
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 0.8)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 31, 3), dtype=np.uint8))
    assert torch.equal(create_transform(**config, is_training=False)(image), eval_transform(DATA)(image))
    assert model.pretrained_cfg["label_names"] == NAMES


def test_a_recipe_gives_a_fresh_student() -> None:
    model = m2mkd_ds.create_model("tiny", pretrained=False, num_classes=3)
    assert model.arch.num_experts == 4 and model(torch.zeros(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(ValueError, match="tiny is a recipe, for which there are no published weights"):
        m2mkd_ds.create_model("tiny")
    with pytest.raises(ConfigError, match="no recipe 'tinny'; .* did you mean tiny"):
        m2mkd_ds.create_model("tinny")


def test_without_weights_timm_is_told_what_to_give() -> None:
    with pytest.raises(ValueError, match="m2mkd_vmoe: say which model: weights="):
        timm.create_model(NAME)
    with pytest.raises(ValueError, match="weights and arch were given"):
        timm.create_model(NAME, weights="anywhere", arch=ARCH)


def test_timm_finds_the_architecture_only_after_the_import() -> None:
    known = "timm.is_model('m2mkd_vmoe')"
    code = f"import timm, json; before = {known}; import m2mkd_ds.timm_models; print(json.dumps([before, {known}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout) == [False, True]


@torch.no_grad()
def test_a_bf16_export_gives_the_rounded_weights_in_fp32(tmp_path: Path) -> None:
    model = shaken()
    rounded = {n: t if ".router." in n else t.to(torch.bfloat16).float() for n, t in model.state_dict().items()}
    ours = m2mkd_ds.create_model(exported(model, tmp_path / "model", dtype="bf16"))
    assert all(torch.equal(tensor, rounded[name]) for name, tensor in ours.state_dict().items())
    assert dataclasses.replace(ours.arch, backend=ARCH.backend) == ARCH
