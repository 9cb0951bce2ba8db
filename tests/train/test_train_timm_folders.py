"""Teacher modules back into timm: `m2mkd export-teacher` against the stages in series and against the file that they came from."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor

from m2mkd_ds.checkpoint.mapping import MappingError, same_bits
from m2mkd_ds.checkpoint.store import read_weights, save_weights
from m2mkd_ds.checkpoint.timm_export import join_modules
from m2mkd_ds.config import ConfigError, dump, load
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.meta import run_stages
from m2mkd_ds.models.vit import VitArch
from m2mkd_ds.timm_models import create_model
from m2mkd_ds.train.context import load_teacher_stages, open_run
from m2mkd_ds.train.exports.timm_folders import export_run_teacher
from m2mkd_ds.train.local_nodes import split
from tests.checkpoint.students import ARCH, NAMES, STITCHES, exported, run_folder, shaken
from tests.cli.conftest import m2mkd  # noqa: F401  (a fixture)
from tests.cli.ended import Run
from tests.train.finished_run import tiny_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))


class SplitRun(NamedTuple):
    """A run with teacher modules, and the weights that they were cut from."""

    folder: Path
    original: dict[str, Tensor]


@pytest.fixture(scope="module")
def run(digits_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> SplitRun:
    root = tmp_path_factory.mktemp("run")
    weights = root / "teacher.safetensors"
    config = tiny_config(root, digits_shards, f"teacher.weights={weights}", recipe="tiny_pretrained")
    # Registers, layer scale and an average pool: more than the plainest ViT has.
    args = {**config.teacher.arch_args, "reg_tokens": 2, "init_values": 0.1, "global_pool": "avg"}
    config = replace(config, teacher=replace(config.teacher, arch_args=args))
    torch.manual_seed(4)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=16, **args)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    save_file(theirs.state_dict(), weights)
    (root / "config.yaml").write_text(dump(config))
    split(open_run(config, ALONE))
    return SplitRun(root, load_file(weights))


def test_the_joined_teacher_is_the_file_it_came_from_bit_for_bit(run: SplitRun, tmp_path: Path) -> None:
    out = export_run_teacher(run.folder, tmp_path / "teacher")
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    ours = model.state_dict()
    assert ours.keys() == run.original.keys() and all(same_bits(ours[name], run.original[name]) for name in ours)
    ctx = open_run(replace(load(run.folder / "config.yaml"), run_dir=str(run.folder)), ALONE)
    stages = load_teacher_stages(ctx, torch.float32)
    with torch.no_grad():
        assert torch.equal(model(IMAGES), run_stages([s.eval() for s in stages], IMAGES)[-1])


def test_timm_alone_loads_it_and_transformers_does_too(run: SplitRun, tmp_path: Path) -> None:
    out = export_run_teacher(run.folder, tmp_path / "teacher")
    code = (
        "import json, sys, timm, torch; from timm.data import resolve_model_data_config as r; from safetensors.torch import load_file\n"
        f"m = timm.create_model('local-dir:{out}', pretrained=True).eval(); c = r(m)\n"
        "assert not any(n.startswith('m2mkd') for n in sys.modules)\n"
        "x = torch.randn(2, 3, 16, 16)\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        f"wrapped = Auto.from_pretrained('{out}').eval()\n"
        "with torch.no_grad(): assert torch.equal(wrapped(pixel_values=x).logits, m(x))\n"
        "assert wrapped.config.id2label[9] == '9', wrapped.config.id2label\n"
        "print(json.dumps([c['mean'], c['input_size'], c['interpolation'], c['crop_pct'], m.pretrained_cfg['label_names']]))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=120, check=True)
    mean, size, interpolation, crop, labels = json.loads(done.stdout)
    assert (mean, size, interpolation, crop) == ([0.5] * 3, [3, 16, 16], "bilinear", 1.0)
    assert labels == [str(digit) for digit in range(10)]
    config = json.loads((out / "config.json").read_text())
    assert config["m2mkd_ds"]["phase"] == "split" and "pair" not in config["m2mkd_ds"]
    again = export_run_teacher(run.folder, tmp_path / "again")
    assert [(again / name).read_bytes() == (out / name).read_bytes() for name in ("config.json", "model.safetensors")] == [True, True]


def test_another_head_can_be_put_on_it(run: SplitRun, tmp_path: Path) -> None:
    out = export_run_teacher(run.folder, tmp_path / "teacher")
    model = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=3)
    assert model.head.weight.shape[0] == 3 and torch.equal(model.state_dict()["pos_embed"], run.original["pos_embed"])


def test_missing_and_foreign_modules_are_named(run: SplitRun, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    (copy / "split").mkdir(parents=True)
    (copy / "config.yaml").write_text((run.folder / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"module_0\.safetensors: not there; make the modules with .* --until split"):
        export_run_teacher(copy, tmp_path / "out")
    first = read_weights(run.folder / "split" / "module_0.safetensors")
    save_weights(copy / "split" / "module_0.safetensors", first)
    save_weights(copy / "split" / "module_1.safetensors", first)
    with pytest.raises(ValueError, match=r"module_1\.safetensors: does not hold blocks 2\.\.3"):
        export_run_teacher(copy, tmp_path / "out")
    arch = VitArch.from_teacher(load(run.folder / "config.yaml"))
    with pytest.raises(ValueError, match="comes from a and from b"):
        join_modules(arch, {"a": first, "b": first})
    with pytest.raises(MappingError, match="32 target keys that the source does not fill"):
        join_modules(arch, {"a": first})
    assert not (tmp_path / "out").exists()


def test_a_foreign_folder_is_not_overwritten(run: SplitRun, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="exists and is no folder in timm's layout"):
        export_run_teacher(run.folder, tmp_path / "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_the_verbs_write_folders_that_timm_loads(run: SplitRun, tmp_path: Path, m2mkd: Run) -> None:  # noqa: F811
    assert m2mkd("export-teacher", str(run.folder), "teacher").out == "teacher\n"
    assert timm.create_model("local-dir:teacher", pretrained=True).num_classes == 10
    root, student = run_folder(tmp_path / "run", keep_stitches=True)
    assert m2mkd("export-timm", str(root), "student").out == "student\n"
    with torch.no_grad():
        assert torch.equal(timm.create_model("local-dir:student", pretrained=True).eval()(IMAGES), student(IMAGES).output)
        assert torch.equal(create_model("student").eval()(IMAGES), student(IMAGES).output)
    refused = m2mkd("export-timm", str(tmp_path / "nothing"), "out")
    assert refused.code == 2 and "no student here" in refused.err


def test_an_export_becomes_a_timm_folder_with_its_labels(tmp_path: Path, m2mkd: Run) -> None:  # noqa: F811
    model = shaken(stitches=STITCHES)
    assert m2mkd("export-timm", str(exported(model, tmp_path / "hf")), "student").code == 0
    ours = timm.create_model("local-dir:student", pretrained=True).eval()
    assert list(ours.pretrained_cfg["label_names"]) == list(NAMES) and ours.arch == ARCH
    assert resolve_model_data_config(ours)["crop_pct"] == 0.8
    with torch.no_grad():
        assert torch.equal(ours(IMAGES), model(IMAGES).output)
    fresh = timm.create_model("local-dir:student", pretrained=True, num_classes=9).eval()
    assert fresh(IMAGES).shape == (3, 9) and torch.equal(fresh.forward_features(IMAGES), ours.forward_features(IMAGES))
