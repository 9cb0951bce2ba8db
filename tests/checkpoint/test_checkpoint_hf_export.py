"""The exported folder against the model it came from: same bits, same classes, same preprocessing, by transformers alone."""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from m2mkd_ds.checkpoint import hf_export
from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.hf_export import check_export, class_names_of, export_hf, load_exported, parse_size
from m2mkd_ds.config import ROUTER_PRESETS, DataConfig, RouterConfig
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


@pytest.fixture
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keep transformers' copies of model code, and the modules made of them, inside this test."""
    from transformers import dynamic_module_utils

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] == "transformers_modules"]:
            del sys.modules[name]

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield
    forget()


@pytest.fixture
def auto(code_cache: None) -> Any:
    """AutoModelForImageClassification.from_pretrained."""
    from transformers import AutoModelForImageClassification

    def load(folder: Path, **kwargs: Any) -> Any:
        return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()

    return load


def logits(model: Any, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        out = model(images)
    return out.output if isinstance(model, VisionMoE) else out.logits


def test_a_fresh_process_without_m2mkd_ds_gives_the_same_bits(tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(ARCH, moe_blocks=(1, 3)), STITCHES)
    folder = export(model, tmp_path / "out", max_shard_size="40KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    result = check_export(folder, IMAGES, logits(model))
    assert result["max_abs_diff"] == 0.0
    assert result["prediction"]["label"] in NAMES


def test_a_folder_with_other_weights_fails_the_check(tmp_path: Path) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    with pytest.raises(ValueError, match=r"logits of the exported model differ by up to 0\.00\d+; allowed is 0.0001"):
        check_export(folder, IMAGES, logits(model) + 0.002, atol=1e-4)


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


class Poison(torch.autograd.Function):
    """Rows beyond the last offset hold NaN, forward and backward, as torch's grouped matmul may leave them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: Tensor) -> Tensor:
        ctx.end = int(end)
        return torch.cat([rows[: ctx.end], torch.full_like(rows[ctx.end :], float("nan"))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grads[0][: ctx.end], torch.full_like(grads[0][ctx.end :], float("nan"))]), None


def test_gradients_of_a_tight_capacity_are_those_of_the_training_code(tmp_path: Path, auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.grouped_mm

    def poisoned(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        return Poison.apply(plain(Poison.apply(rows, offs[-1]).nan_to_num(), weight, offs=offs), offs[-1])

    router = dataclasses.replace(ROUTER_PRESETS["switch"], capacity_factor=0.6)
    model = make_model(dataclasses.replace(ARCH, router=router, backend="reference")).train()
    labels = torch.tensor([0, 4, 2])
    out = model(IMAGES)
    assert all(0 < float(stats.drop_rate) < 1 for stats in out.stats.values())
    (torch.nn.functional.cross_entropy(out.output, labels) + sum(out.router_losses.values())).backward()
    for backend in ("loop", "grouped", "poisoned"):
        if backend == "poisoned":
            monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
        exported = auto(export(model, tmp_path / backend), expert_backend="loop" if backend == "loop" else "grouped").train()
        exported(IMAGES, labels=labels).loss.backward()
        theirs = dict(exported.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=f"{backend} {name}")


def test_all_expert_paths_give_the_same_bits_and_unknown_ones_are_refused(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    for backend in ("auto", "grouped", "loop"):
        assert torch.equal(logits(auto(folder, expert_backend=backend)), logits(model)), backend
    with pytest.raises(ValueError, match="expert_backend is 'fast'; allowed is auto, grouped or loop"):
        logits(auto(folder, expert_backend="fast"))
    odd = make_model(dataclasses.replace(ARCH, backend="reference", embed_dim=30, num_heads=3))
    with pytest.raises(ValueError, match="expert_backend=grouped cannot run .* widths 30 and 60; use loop"):
        logits(auto(export(odd, tmp_path / "odd"), expert_backend="grouped"))


def test_loss_in_training_mode_has_the_router_losses(tmp_path: Path, auto: Any) -> None:
    router = RouterConfig(importance_weight=0.3, switch_weight=0.2, z_weight=0.1)
    model = make_model(dataclasses.replace(ARCH, router=router))
    exported = auto(export(model, tmp_path / "out"))
    labels = torch.tensor([0, 4, 2])
    out = model(IMAGES)
    task = torch.nn.functional.cross_entropy(out.output, labels)
    torch.testing.assert_close(exported(IMAGES, labels=labels).loss, task)
    loss = exported.train()(IMAGES, labels=labels).loss
    torch.testing.assert_close(loss, task + sum(out.router_losses.values()))
    (task + sum(out.router_losses.values())).backward()
    loss.backward()
    theirs = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_of_vmoes_router_in_training_mode_has_noise_and_load_loss(tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, router=ROUTER_PRESETS["vmoe"], backend="reference")).train()
    exported = auto(export(model, tmp_path / "out")).train()
    labels = torch.tensor([0, 4, 2])
    torch.manual_seed(7)  # both draw the noise of block after block
    out = model(IMAGES)
    assert set(out.router_losses) == {"importance", "load"}
    task = torch.nn.functional.cross_entropy(out.output, labels)
    torch.manual_seed(7)
    torch.testing.assert_close(exported(IMAGES, labels=labels).loss, task + sum(out.router_losses.values()))


def test_save_pretrained_round_trip(tmp_path: Path, auto: Any) -> None:
    model = make_model(stitches=STITCHES)
    auto(export(model, tmp_path / "out")).save_pretrained(tmp_path / "again")
    assert all((tmp_path / "again" / name).is_file() for name in hf_export.CODE_FILES)
    from transformers import AutoModelForImageClassification

    second, info = AutoModelForImageClassification.from_pretrained(tmp_path / "again", trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert second.config.id2label == dict(enumerate(NAMES))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(second.eval()), logits(model))


def test_hidden_states_and_tuple_output(tmp_path: Path, auto: Any) -> None:
    exported = auto(export(make_model(), tmp_path / "out"))
    out = exported(IMAGES, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 17, 32)] * 5
    plain = exported(IMAGES, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], out.logits)
    with pytest.raises(ValueError, match="takes images of 28 x 28 pixels"):
        exported(torch.zeros(1, 3, 32, 32))


def test_bf16_keeps_the_router_in_fp32(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out", dtype="bf16")
    exported = auto(folder)
    dtypes = {name: p.dtype for name, p in exported.named_parameters()}
    assert {d for n, d in dtypes.items() if ".router." in n} == {torch.float32}
    assert {d for n, d in dtypes.items() if ".router." not in n} == {torch.bfloat16}
    torch.testing.assert_close(logits(exported).float(), logits(model), rtol=0.1, atol=0.1)
    tensors = load_exported(folder).tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["blocks.0.moe.router.weight"], model.state_dict()["blocks.0.moe.router.weight"])


def test_a_new_head_is_initialised_and_the_rest_is_kept(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    exported = auto(export(model, tmp_path / "out"), num_labels=7, ignore_mismatched_sizes=True)
    assert exported.head.weight.shape == (7, 32)
    assert exported.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    weights = model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in exported.state_dict().items() if not k.startswith("head."))


def test_a_model_from_the_config_alone_is_fully_initialised(tmp_path: Path, auto: Any) -> None:
    from transformers import AutoModelForImageClassification

    config = auto(export(make_model(), tmp_path / "out")).config
    fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    for name, p in fresh.named_parameters():
        scale = 0.02 if p.ndim > 1 and not name.endswith("bias") and name != "cls_token" else 1e-6
        assert p.std().item() == pytest.approx(scale, rel=0.35, abs=2e-6), name


def test_without_trust_the_error_names_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder = export(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match=f"(?s){folder}.*trust_remote_code=True"):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)


@pytest.mark.parametrize("case", [(28, 1.0, "bicubic", (28, 28)), (28, 0.875, "bicubic", (40, 51)), (32, 0.8, "bilinear", (72, 64))])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.usefixtures("code_cache")
def test_the_image_processor_is_timms_evaluation_transform(
    case: tuple[int, float, Any, tuple[int, int]], mode: str, tmp_path: Path
) -> None:
    from transformers import AutoImageProcessor

    size, crop_pct, interpolation, shape = case
    data = dataclasses.replace(DATA, image_size=size, crop_pct=crop_pct, interpolation=interpolation)
    model = make_model(dataclasses.replace(ARCH, image_size=size, patch_size=4))
    folder = export(model, tmp_path / "out", data=data)
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3) if mode == "RGB" else shape, dtype=np.uint8)
    image = Image.fromarray(pixels)
    oracle = create_transform(size, is_training=False, mean=data.mean, std=data.std, crop_pct=crop_pct, interpolation=interpolation)
    want = oracle(image.convert("RGB"))
    exact = AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(exact, want, rtol=0, atol=2e-6)
    # The default backend resizes tensors, off by a grey level or two: 1/255/std is about 0.011.
    default = AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(default, want, rtol=0, atol=2e-6 if shape == (size, size) else 0.05)


def test_preprocessing_survives_the_round_trip_for_many_sizes() -> None:
    for size in range(16, 520, 7):
        for crop_pct in (0.7, 0.8, 0.875, 0.9, 0.95, 0.99, 1.0):
            data = dataclasses.replace(DATA, image_size=size, crop_pct=crop_pct)
            back = hf_export._data_from_processor(hf_export.processor_config(data), 5)
            assert math.floor(size / back.crop_pct) == math.floor(size / crop_pct), (size, crop_pct)
            assert dataclasses.replace(back, crop_pct=crop_pct) == data


def test_a_second_export_has_the_same_bytes(tmp_path: Path) -> None:
    model = make_model(stitches=STITCHES)
    folders = [export(model, tmp_path / place / "out", max_shard_size="60KB", card={"metrics": {"top1": 0.5}}) for place in ("a", "b")]
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in folders]
    assert files[0] == files[1]
    shuffled = dict(reversed(model.state_dict().items()))  # order of the input does not matter either
    export_hf(shuffled, model.arch, folders[0], class_names=NAMES, data=DATA, license="mit", stitches=STITCHES,
              max_shard_size="60KB", card={"metrics": {"top1": 0.5}})  # fmt: skip
    assert {p.name: p.read_bytes() for p in folders[0].iterdir()} == files[1]


def test_load_exported_returns_what_was_exported(tmp_path: Path) -> None:
    model = make_model(dataclasses.replace(ARCH, moe_blocks=(1, 3), router=RouterConfig(z_weight=0.5)), STITCHES)
    tensors, arch, stitches, data = load_exported(export(model, tmp_path / "out", max_shard_size="60KB"))
    assert (arch, stitches, data) == (model.arch, STITCHES, DATA)
    assert set(tensors) == set(model.state_dict())
    again = VisionMoE(arch, StageSpan.whole(4), stitches=stitches, seed=5).eval()
    again.load_state_dict(tensors)
    assert torch.equal(logits(again), logits(model))
    assert class_names_of(tmp_path / "out") == NAMES


def test_manifest_holds_the_checksums_and_a_changed_file_is_named(tmp_path: Path) -> None:
    folder = export(make_model(), tmp_path / "out")
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {p.name for p in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x01\x02\x03\x04")
    with pytest.raises(StoreError, match=r"model.safetensors: changed since the export"):
        load_exported(folder)


def test_a_foreign_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="model_type 'vit'; expected 'm2mkd_vmoe'"):
        load_exported(tmp_path)
    with pytest.raises(ValueError, match="exists and is not an export"):
        export(make_model(), tmp_path)
    assert (tmp_path / "config.json").is_file()


def without(name: str) -> Any:
    return lambda w: {k: v for k, v in w.items() if k != name}


@pytest.mark.parametrize(
    ("edit", "changes", "message"),
    [
        (without("blocks.2.norm1.weight"), {}, r"1 missing: blocks.2.norm1.weight"),
        (lambda w: w | {"blocks.9.norm1.weight": torch.zeros(3)}, {}, r"1 unexpected: blocks.9.norm1.weight"),
        (lambda w: w | {"cls_token": torch.zeros(1, 1, 8)}, {}, r"1 of another shape: cls_token"),
        (dict, {"stitches": STITCHES}, r"16 missing: stitches|8 missing: stitches"),
        (dict, {"class_names": NAMES[:3]}, r"3 class names were given and the model has 5 classes"),
        (dict, {"data": dataclasses.replace(DATA, image_size=32)}, r"data.image_size is 32 and the model was built for 28"),
        (dict, {"dtype": "fp8"}, r"export dtype is 'fp8'; allowed is one of \['fp32', 'bf16', 'fp16'\]"),
        (dict, {"max_shard_size": "big"}, r"export.max_shard_size is 'big'"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left(edit: Any, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"class_names": NAMES, "data": DATA, "license": "mit"} | changes
    with pytest.raises(ValueError, match=message):
        export_hf(edit(make_model().state_dict()), ARCH, tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_the_old_export_and_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(make_model(), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hf_export, "save_file", full)
    with pytest.raises(StoreError, match="not exported .*No space left on device.*; free space"):
        export(make_model(), folder, license="apache-2.0")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_at_the_last_rename_puts_the_old_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export(make_model(), tmp_path / "out")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    replace = os.replace

    def fails_for_the_new_folder(src: Path, dst: Path) -> None:
        if str(src).endswith(".tmp") and Path(src).is_dir():
            raise OSError(errno.EIO, "Input/output error")
        replace(src, dst)

    monkeypatch.setattr(os, "replace", fails_for_the_new_folder)
    with pytest.raises(StoreError, match="Input/output error"):
        export(make_model(), folder, license="apache-2.0")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_model_card_is_read_by_the_hubs_own_parser(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = {
        "name": "vmoe-fashion", "dataset": "fashion-mnist", "metrics": {"top1": 0.91, "top5": 0.995, "loss": 0.3},
        "recipe": {"name": "fashion", "m2mkd": {"lr": 1e-3}}, "lineage": {"teacher": "abc|def"}, "intended_use": "tests",
    }  # fmt: skip
    text = (export(make_model(), tmp_path / "out", card=card) / "README.md").read_text()
    parsed = ModelCard(text)
    assert parsed.data.license == "mit" and parsed.data.library_name == "transformers"
    assert parsed.data.pipeline_tag == "image-classification" and "arxiv:2402.16918" in (parsed.data.tags or [])
    scores = {r.metric_name: r.metric_value for r in parsed.data.eval_results or []}
    assert scores == {"top-1 accuracy": 0.91, "top-5 accuracy": 0.995}
    for expected in ("# vmoe-fashion", "| m2mkd.lr | 0.001 |", "abc\\|def", "## Intended use\n\ntests", "4 blocks of width 32",
                     "m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers", "| loss | 0.3 |"):  # fmt: skip
        assert expected in text, expected


def test_the_shipped_code_imports_torch_and_transformers_only() -> None:
    folder = Path(hf_export.__file__).parent / "hf_template"
    allowed = {"torch", "transformers", "typing", "math", "configuration_vmoe", "routing_vmoe"}
    for name in hf_export.CODE_FILES:
        for node in ast.walk(ast.parse((folder / name).read_text())):
            found = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert {f.partition(".")[0] for f in found} <= allowed, (name, found)


@pytest.mark.parametrize(("text", "size"), [("123", 123), ("40KB", 40_000), ("2GB", 2_000_000_000), ("5 mb", 5_000_000)])
def test_shard_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
