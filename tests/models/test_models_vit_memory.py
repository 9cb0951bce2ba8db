"""A stage alone: what building or loading it costs is the stage's size, and nothing of the other stages is read.

Measured in a fresh process by the kernel's own peak (VmHWM of /proc/self/status), which also counts mapped file pages that
were touched, so it bounds memory and file reads at once. The model is ViT-B (330 MiB); the stage is a quarter of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, empty_stage

ARCH = VitArch("vit_base_patch16_224")
STAGE = StageSpan(3, 5, 12)

CHILD = """
import json, sys
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, build_stage, load_stage, stage_names


def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


class OneAtATime(Mapping):
    def __init__(self, path, names):
        self.path, self.names = path, names

    def __getitem__(self, name):
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


path, how = sys.argv[1:]
arch, span = VitArch("vit_base_patch16_224"), StageSpan(3, 5, 12)
names = stage_names(arch, span)
before = memory("VmRSS")
if how == "build":
    stage = build_stage(arch, span, seed=0)
elif how == "one at a time":
    stage = load_stage(arch, span, OneAtATime(path, names))
else:
    with safe_open(path, "pt") as file:
        stage = load_stage(arch, span, {name: file.get_tensor(name) for name in names})
growth = memory("VmHWM") - before
finite = all(bool(p.isfinite().all()) for p in stage.parameters())
print(json.dumps({"growth": growth, "finite": finite, "bytes": sum(p.nbytes for p in stage.parameters())}))
"""


@pytest.fixture(scope="module")
def poisoned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViT-B in one file; every tensor that the stage does not own is NaN."""
    own = empty_stage(ARCH, STAGE).state_dict().keys()
    whole = empty_stage(ARCH, StageSpan.whole(12)).state_dict()
    path = tmp_path_factory.mktemp("weights") / "whole.safetensors"
    save_file({name: torch.full(t.shape, 0.5 if name in own else float("nan")) for name, t in whole.items()}, path)
    assert path.stat().st_size > 320 * 2**20
    return path


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel offers no /proc/self/status")
@pytest.mark.parametrize(
    ("how", "copies"),
    [
        ("build", 1.0),
        ("one at a time", 1.0),  # the stage; one mapped tensor at a time
        ("slices", 2.0),  # the stage, and the file's pages of the stage while they are mapped
    ],
)
def test_a_stage_costs_its_own_size(poisoned_file: Path, how: str, copies: float) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, str(poisoned_file), how], capture_output=True, text=True, timeout=120, check=False)
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout.splitlines()[-1])
    assert report["finite"]  # the NaNs of the other stages reached nothing
    # Hand count: 3 blocks of 12 * 768^2 + 13 * 768 values of 4 bytes = 85 054 464 bytes; the whole model has 346 MB.
    assert report["bytes"] == 3 * (12 * 768**2 + 13 * 768) * 4
    assert report["growth"] < copies * report["bytes"] + 24 * 2**20
    assert report["growth"] > 0.9 * report["bytes"]  # the measurement does see the stage


def test_an_empty_stage_has_names_and_shapes_but_no_memory() -> None:
    stage = empty_stage(ARCH, STAGE)
    assert all(tensor.is_meta for tensor in stage.state_dict().values())
    assert {name.split(".")[1] for name in stage.state_dict()} == {"3", "4", "5"}
