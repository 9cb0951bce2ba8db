"""The files of an exported folder: same bytes each time, whole or not there, refused where something does not fit."""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.hf import export as hf_export
from m2mkd_ds.checkpoint.hf import files as hf_files
from m2mkd_ds.checkpoint.hf.export import class_names_of, export_hf, load_exported, parse_size
from m2mkd_ds.config import RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from tests.checkpoint.exported_models import ARCH, DATA, NAMES, STITCHES, export, logits, make_model


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

    monkeypatch.setattr(hf_files, "save_file", full)
    with pytest.raises(StoreError, match="not exported .*No space left on device.*; free space"):
        export(make_model(), folder, license="apache-2.0")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_that_fails_its_check_or_is_interrupted_in_it_never_takes_its_place(tmp_path: Path, error: type[BaseException]) -> None:
    model = make_model(stitches=STITCHES)
    settings: dict[str, Any] = {"class_names": NAMES, "data": DATA, "license": "mit", "stitches": STITCHES}
    checked: list[Path] = []
    export_hf(model.state_dict(), model.arch, tmp_path / "out", check=checked.append, **settings)
    old = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert checked[0].parent == tmp_path and checked[0] != tmp_path / "out"

    def check(folder: Path) -> None:
        assert (folder / "model.safetensors").is_file() and (folder / "manifest.json").is_file()
        raise error("the logits differ")

    for name in ("out", "new"):
        with pytest.raises(error, match="the logits differ"):
            export_hf({key: value + 1 for key, value in model.state_dict().items()}, model.arch, tmp_path / name, check=check, **settings)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == old


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


def test_the_shipped_code_imports_torch_and_transformers_only() -> None:
    folder = Path(hf_export.__file__).parents[1] / "hf_template"
    allowed = {"torch", "transformers", "typing", "collections"} | {name.removesuffix(".py") for name in hf_export.CODE_FILES}
    assert {p.name for p in folder.glob("*.py")} == set(hf_export.CODE_FILES)
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
