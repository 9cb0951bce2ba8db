"""Old checkpoints that are refused: wrong place, disagreeing copies, missing keys, malicious and damaged files."""

from __future__ import annotations

import pathlib
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.checkpoint.legacy.imports import LegacyError, read_legacy
from m2mkd_ds.checkpoint.mapping import MappingError
from tests.checkpoint.legacy_models import DEPTHS, LegacyModel, module_files, saved, student


def test_teacher_modules_that_are_not_the_ones_asked_for_are_refused(tmp_path: Path) -> None:
    modules = module_files(LegacyModel(DEPTHS))
    paths = [saved(tmp_path / f"vit_{i}.pth", module) for i, module in enumerate(modules)]
    with pytest.raises(LegacyError, match=r"is stage 1 \(its block_index\), but stage 0 is asked for"):
        read_legacy(paths[1], stage=0)
    with pytest.raises(LegacyError, match=r"stages twice: \[1\], stages missing: \[0\]"):
        read_legacy([paths[1], paths[1], paths[2]])
    with pytest.raises(LegacyError, match=r"2 files for 3 stages; stages twice: \[\], stages missing: \[2\]"):
        read_legacy(paths[:2])
    with pytest.raises(LegacyError, match=r"cut from a model of depths \[2, 1, 3\], but depths \[2, 2, 2\] are asked for"):
        read_legacy(paths[0], depths=(2, 2, 2))
    wider = LegacyModel(DEPTHS, dim=4)
    saved(paths[1], module_files(wider)[1])
    with pytest.raises(MappingError, match=r"blocks\.2\.norm1\.weight source \[4\] target \[8\]"):
        read_legacy(paths)


def test_single_stage_file_needs_its_place_and_a_wrong_place_is_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", student(1, fused=True).checkpoint())
    with pytest.raises(LegacyError, match="is one stage and does not tell the others; give the depths"):
        read_legacy(path, stage=1)
    with pytest.raises(LegacyError, match=r"holds stages of \[1\] blocks, the whole model has \[2, 1, 3\]; say which stage"):
        read_legacy(path, depths=DEPTHS)
    with pytest.raises(LegacyError, match=r"stages of \[1\] blocks, which do not have stage 0 of depths \[2, 1, 3\]"):
        read_legacy(path, depths=DEPTHS, stage=0)
    with pytest.raises(MappingError, match=r"x\.pth: weights do not fit .*: cls_token, head\.bias"):
        read_legacy(path, depths=(1,))
    with pytest.raises(LegacyError, match="stage 3 is asked for; depths .* have stages 0 to 2"):
        read_legacy(path, depths=DEPTHS, stage=3)


def test_copies_that_disagree_are_refused_by_name(tmp_path: Path) -> None:
    content: dict[str, Any] = LegacyModel(DEPTHS).checkpoint()
    content["model"] = {**content["model"], "stages.2.blocks.1.norm1.bias": content["model"]["stages.2.blocks.1.norm1.bias"] + 1e-9}
    with pytest.raises(
        MappingError, match=r"blocks\.4\.norm1\.bias \(model\.blocks\.4\.norm1\.bias and model\.stages\.2\.blocks\.1\.norm1\.bias"
    ):
        read_legacy(saved(tmp_path / "x.pth", content))
    # PAPER: the authors' reset_classifier replaces `head` and leaves the old one in the last stage.
    model = LegacyModel(DEPTHS)
    model.head = torch.nn.Linear(8, 7).double()
    with pytest.raises(MappingError, match=r"head\.weight \(model\.head\.weight and .*stages\.2\.head\.weight"):
        read_legacy(saved(tmp_path / "x.pth", model.checkpoint()))


def test_missing_and_unknown_keys_are_named(tmp_path: Path) -> None:
    flat = {name: tensor for name, tensor in LegacyModel(DEPTHS, moe=[3]).state_dict().items() if not name.startswith("stages.")}
    lacking = {name: tensor for name, tensor in flat.items() if name not in ("blocks.3.attn.qkv.bias", "blocks.3.moe.experts.h4toh.bias")}
    with pytest.raises(MappingError, match=r"2 target keys .*blocks\.3\.attn\.qkv\.bias, blocks\.3\.moe\.experts\.down_proj_bias"):
        read_legacy(saved(tmp_path / "x.pth", lacking))
    with pytest.raises(MappingError, match=r"1 source keys that the target does not have: dist_token"):
        read_legacy(saved(tmp_path / "x.pth", {**flat, "dist_token": torch.zeros(1)}))
    gap = {name: tensor for name, tensor in flat.items() if not name.startswith("blocks.2.")}
    with pytest.raises(LegacyError, match=r"holds blocks \[0, 1, 3, 4, 5\], expected 0 to 4: keys are missing"):
        read_legacy(saved(tmp_path / "x.pth", gap))
    with pytest.raises(LegacyError, match=r"no weights found \(keys \['epoch'\]\)"):
        read_legacy(saved(tmp_path / "x.pth", {"epoch": 3}))
    with pytest.raises(LegacyError, match=r"model is a Linear|more than tensors and plain data"):
        read_legacy(saved(tmp_path / "x.pth", {"model": torch.nn.Linear(1, 1)}))


class Evil:
    """Unpickling this with the ordinary reader creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return pathlib.Path.touch, (pathlib.Path(self.marker),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_file_is_refused_and_runs_nothing(tmp_path: Path, zipped: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"model": LegacyModel(DEPTHS).state_dict(), "args": Evil(marker)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        LegacyError, match=r"evil\.pth: refused, because it holds more than tensors and plain data .*save the weights alone"
    ):
        read_legacy(path)
    assert not marker.exists()
    # The file is live: the ordinary reader does run it.
    torch.load(path, weights_only=False)
    assert marker.exists()


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pth", LegacyModel(DEPTHS).checkpoint())
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x02}q\x00(", b"<!DOCTYPE html><html>", bytes(100)):
        path.write_bytes(content)
        with pytest.raises(LegacyError, match=r"x\.pth: (damaged|refused)"):
            read_legacy(path)
    with pytest.raises(LegacyError, match="no such checkpoint file"):
        read_legacy(tmp_path / "none.pth")
