"""Old checkpoints: files of every older layout give canonical tensors that compute the same, or an error that names the keys."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.checkpoint.legacy.imports import LegacyError, convert_legacy, read_legacy
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import file_sha256, read_metadata, read_weights
from m2mkd_ds.config import RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, VMoEArch
from tests.checkpoint.legacy_models import DEPTHS, HEADS, LegacyModel, module_files, saved, student


def images() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def hidden(dim: int) -> Tensor:
    return torch.randn(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def norm(x: Tensor, w: dict[str, Tensor], at: str, eps: float) -> Tensor:
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    return (x - mean) / torch.sqrt(var + eps) * w[f"{at}.weight"] + w[f"{at}.bias"]


def linear(x: Tensor, w: dict[str, Tensor], at: str) -> Tensor:
    return x @ w[f"{at}.weight"].T + w[f"{at}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0)))


def by_hand(w: dict[str, Tensor], span: StageSpan, depths: tuple[int, ...], x: Tensor) -> Tensor:
    """The span's output from canonical tensors: a direct computation with every expert run on every token."""
    firsts = {sum(depths[:k]): k for k in range(len(depths))}
    lasts = {sum(depths[: k + 1]) - 1: k for k in range(len(depths))}
    if span.is_first:
        p = w["patch_embed.proj.weight"]
        patches = F.unfold(x, p.shape[-1], stride=p.shape[-1]).mT
        x = patches @ p.flatten(1).T + w["patch_embed.proj.bias"]
        x = torch.cat([w["cls_token"].expand(len(x), 1, -1), x], 1) + w["pos_embed"]
    for i in span.blocks:
        at = f"blocks.{i}"
        if f"stitches.{firsts.get(i)}.pre.norm.weight" in w:
            x = linear(norm(x, w, f"stitches.{firsts[i]}.pre.norm", 1e-5), w, f"stitches.{firsts[i]}.pre.proj")
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in linear(norm(x, w, f"{at}.norm1", 1e-6), w, f"{at}.attn.qkv").chunk(3, -1))
        scores = torch.einsum("blhd,bmhd->bhlm", q, k) / math.sqrt(q.shape[-1])
        x = x + linear(torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v).flatten(2), w, f"{at}.attn.proj")
        y = norm(x, w, f"{at}.norm2", 1e-6)
        if f"{at}.mlp.fc1.weight" in w:
            x = x + linear(gelu(linear(y, w, f"{at}.mlp.fc1")), w, f"{at}.mlp.fc2")
        else:
            logits = linear(y, w, f"{at}.moe.router")
            kept = logits >= logits.topk(2).values[..., -1:]
            weights = torch.where(kept, logits, -math.inf).softmax(-1)
            e = f"{at}.moe.experts."
            h = gelu(torch.einsum("bld,efd->blef", y, w[e + "up_proj"]) + w[e + "up_proj_bias"])
            x = x + torch.einsum("ble,bled->bld", weights, torch.einsum("blef,edf->bled", h, w[e + "down_proj"]) + w[e + "down_proj_bias"])
        if f"stitches.{lasts.get(i)}.post.norm.weight" in w:
            x = linear(norm(x, w, f"stitches.{lasts[i]}.post.norm", 1e-5), w, f"stitches.{lasts[i]}.post.proj")
    return linear(norm(x, w, "norm", 1e-6)[:, 0], w, "head") if span.is_last else x


def agree(a: Tensor, b: Tensor, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("entries", [("model", "model_stages"), ("model",), ("model_stages",)])
def test_whole_dense_model_computes_the_same(tmp_path: Path, entries: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    model = LegacyModel(DEPTHS)
    path = saved(
        tmp_path / "finished.pth",
        {key: value for key, value in model.checkpoint().items() if key not in {"model", "model_stages"} - set(entries)},
    )
    got = read_legacy(path)
    assert (got.kind, got.stage, got.depths, got.layout, got.experts) == ("model", None, DEPTHS, "+".join(entries), {})
    # A plain, once-registered tree has these names already: canonical means the same without `stages.`.
    expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("stages.")}
    assert got.tensors.keys() == expected.keys() and all(torch.equal(got.tensors[name], expected[name]) for name in expected)
    agree(model(images()), by_hand(got.tensors, StageSpan.whole(6), DEPTHS, images()))


def test_bare_state_dict_and_stage_list_and_args_are_read(tmp_path: Path) -> None:
    model = LegacyModel(DEPTHS)
    flat = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("stages.")}
    args = argparse.Namespace(lr=1e-3, model="vit", depths=[2, 1, 3])
    files = {
        "state_dict": flat,
        "stage list": [stage.state_dict() for stage in model.stages],
        "model": {"model": flat, "args": args, "epoch": 3},
    }
    for layout, content in files.items():
        for depths in (DEPTHS, None):
            got = read_legacy(saved(tmp_path / "x.pth", content), depths=depths)
            assert got.layout == layout and got.depths == (DEPTHS if depths or layout == "stage list" else (6,))
            assert got.tensors.keys() == flat.keys() and all(torch.equal(got.tensors[k], flat[k]) for k in flat)


def test_one_stage_out_of_a_whole_model(tmp_path: Path) -> None:
    model = LegacyModel(DEPTHS)
    whole = read_legacy(saved(tmp_path / "x.pth", model.checkpoint())).tensors
    union: dict[str, Tensor] = {}
    for stage in range(3):
        got = read_legacy(tmp_path / "x.pth", stage=stage)
        assert got.kind == "stage" and got.stage == stage and not union.keys() & got.tensors.keys()
        union.update(got.tensors)
    assert union.keys() == whole.keys() and all(torch.equal(union[k], whole[k]) for k in whole)
    assert {k.split(".")[1] for k in read_legacy(tmp_path / "x.pth", stage=1).tensors} == {"2"}


def test_modular_training_hybrids_give_their_own_stage_at_its_place_in_the_teacher(tmp_path: Path) -> None:
    paths, hybrids = [], []
    for stage in range(3):
        hybrids.append(LegacyModel([DEPTHS[k] if k == stage else 1 for k in range(3)]))
        paths.append(saved(tmp_path / f"MT_{stage}.pth", hybrids[-1].checkpoint()))
    got = read_legacy(paths[2], depths=DEPTHS, stage=2)
    assert {int(k.split(".")[1]) for k in got.tensors if k.startswith("blocks")} == {3, 4, 5} and "head.weight" in got.tensors
    # Hybrid 2 has depths 1 1 3: its block 4 is block 5 of the teacher.
    assert torch.equal(got.tensors["blocks.5.attn.qkv.weight"], hybrids[2].blocks[4].attn.qkv.weight)
    whole = read_legacy(paths, depths=DEPTHS)
    assert whole.depths == DEPTHS and whole.kind == "model"
    assert torch.equal(whole.tensors["blocks.1.mlp.fc1.bias"], hybrids[0].blocks[1].mlp.fc1.bias)
    assert read_legacy(paths).tensors.keys() == whole.tensors.keys()
    # Files in another order: stage 0 has two blocks and the file in its place has one.
    with pytest.raises(
        LegacyError, match=r"MT_1\.pth: holds stages of \[1, 1, 1\] blocks, which do not have stage 0 of depths \[2, 1, 3\]"
    ):
        read_legacy([paths[1], paths[0], paths[2]], depths=DEPTHS)


def test_split_teacher_modules_one_file_each_in_any_order_or_one_list(tmp_path: Path) -> None:
    model = LegacyModel(DEPTHS)
    modules = module_files(model)
    paths = [saved(tmp_path / f"vit_{i}.pth", module) for i, module in enumerate(modules)]
    one = read_legacy(paths[1])
    assert (one.kind, one.stage, one.depths, one.model_name, one.layout) == ("stage", 1, DEPTHS, "vit_x", "teacher module")
    assert torch.equal(one.tensors["blocks.2.attn.proj.weight"], model.blocks[2].attn.proj.weight)
    whole = read_legacy([paths[2], paths[0], paths[1]])
    assert whole.kind == "model"
    agree(model(images()), by_hand(whole.tensors, StageSpan.whole(6), DEPTHS, images()))
    as_list = read_legacy(saved(tmp_path / "list.pth", modules))
    assert all(torch.equal(as_list.tensors[k], whole.tensors[k]) for k in whole.tensors)
    assert read_legacy(tmp_path / "list.pth", stage=1).tensors.keys() == one.tensors.keys()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_student_stage_with_stitches_in_both_fastmoe_layouts_computes_the_same(tmp_path: Path, stage: int, fused: bool) -> None:
    torch.manual_seed(stage)
    model = student(stage, fused=fused)
    got = read_legacy(saved(tmp_path / "x.pth", model.checkpoint()), depths=DEPTHS, stage=stage)
    span = (StageSpan(0, 1, 6), StageSpan(2, 2, 6), StageSpan(3, 5, 6))[stage]
    assert got.experts == dict.fromkeys(span.blocks, 3)
    assert got.stitches == (("0.post",), ("1.post", "1.pre"), ("2.pre",))[stage]
    assert got.tensors[f"blocks.{span.first_block}.moe.experts.up_proj"].shape == (3, 16, 8)
    x = images() if stage == 0 else hidden(12)
    expected = model(x)
    agree(expected, by_hand(got.tensors, span, DEPTHS, x))
    # And through the model that the student trains as; its router computes in fp32.
    arch = VMoEArch(8, 4, 7, 8, HEADS, 2.0, 6, tuple(range(6)), 3, RouterConfig(), backend="reference")
    pre = [StitchSpec(pair=stage, kind="pre", block=span.first_block, in_dim=12, out_dim=8)] if stage else []
    post = [StitchSpec(pair=stage, kind="post", block=span.last_block, in_dim=8, out_dim=12)] if stage < 2 else []
    module = VisionMoE(arch, span, stitches=[*pre, *post], seed=0).double()
    load_exact(module, got.tensors)
    agree(expected, module(x).output, 1e-5)


def test_fused_and_listed_experts_give_the_same_tensors(tmp_path: Path) -> None:
    model = student(0, fused=True)
    fused = model.state_dict()
    listed: dict[str, Tensor] = {}
    for name, tensor in fused.items():
        head, sep, tail = name.partition(".moe.experts.")
        listed.update({f"{head}{sep}{i}.{tail}": tensor[i : i + 1] for i in range(3)} if sep else {name: tensor})
    a = read_legacy(saved(tmp_path / "a.pth", {"model": fused}), depths=DEPTHS, stage=0).tensors
    b = read_legacy(saved(tmp_path / "b.pth", {"model": listed}), depths=DEPTHS, stage=0).tensors
    assert len(listed) > len(fused) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_assembled_student_with_kept_stitches_and_student_stages_together(tmp_path: Path) -> None:
    whole = LegacyModel(DEPTHS, moe=[1, 3, 4], fused=False, pre=[2, 3], post=[1, 2])
    got = read_legacy(saved(tmp_path / "whole.pth", whole.checkpoint()))
    assert got.experts == {1: 3, 3: 3, 4: 3} and got.stitches == ("0.post", "1.post", "1.pre", "2.pre")
    agree(whole(images()), by_hand(got.tensors, StageSpan.whole(6), DEPTHS, images()))
    stages = [student(i, fused=bool(i % 2)) for i in range(3)]
    paths = [saved(tmp_path / f"m2mKD_{i}.pth", stage.checkpoint()) for i, stage in enumerate(stages)]
    together = read_legacy(paths)
    assert together.depths == DEPTHS and together.stitches == got.stitches
    x = images()
    for stage in stages:
        x = stage(x)
    agree(x, by_hand(together.tensors, StageSpan.whole(6), DEPTHS, images()))


def test_whole_model_may_be_cut_anew_unless_stitches_tie_it(tmp_path: Path) -> None:
    model = LegacyModel(DEPTHS)
    path = saved(tmp_path / "x.pth", model.checkpoint())
    got = read_legacy(path, depths=(3, 3))
    assert got.depths == (3, 3) and got.kind == "model" and got.tensors.keys() == read_legacy(path).tensors.keys()
    with pytest.raises(LegacyError, match=r"stages of \[2, 1, 3\] blocks, the whole model has \[3, 4\]; say which"):
        read_legacy(path, depths=(3, 4))
    tied = LegacyModel(DEPTHS, pre=[2]).state_dict()
    with pytest.raises(LegacyError, match=r"stitch layers between stages of \[2, 1, 3\] blocks, so it cannot be cut into \[3, 3\]"):
        read_legacy(saved(path, {"model": tied}), depths=(3, 3))
    flat = {name: tensor for name, tensor in tied.items() if not name.startswith("stages.")}
    with pytest.raises(LegacyError, match=r"block 2 is not the first of a stage of depths \[3, 3\]"):
        read_legacy(saved(path, {"model": flat}), depths=(3, 3))


def test_convert_writes_safetensors_with_description_and_lineage(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", student(1, fused=False).checkpoint())
    got = convert_legacy(path, tmp_path / "x.safetensors", depths=DEPTHS, stage=1, metadata={"note": "test"})
    back, metadata = read_weights(tmp_path / "x.safetensors"), read_metadata(tmp_path / "x.safetensors")
    assert back.keys() == got.tensors.keys() and all(torch.equal(back[k], got.tensors[k]) for k in back)
    # One sparse block: 4 norm, 4 attention, 2 router and 4 expert tensors; two stitches of 4.
    assert str(got) == "stage 1 of depths [2, 1, 3], 22 tensors, 1 sparse blocks, stitches 1.post, 1.pre (model+model_stages)"
    assert metadata["kind"] == "stage" and metadata["stage"] == "1" and metadata["depths"] == "[2, 1, 3]"
    assert metadata["experts"] == '{"2": 3}' and metadata["stitches"] == '["1.post", "1.pre"]' and metadata["note"] == "test"
    assert metadata["sources"] == f'{{"x.pth": "{file_sha256(path)}"}}'
