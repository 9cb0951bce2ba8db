"""`m2mkd eval` of an exported folder: shards at a URL give the numbers of the same shards in a folder; an address keeps its secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.hf_export import export_hf
from m2mkd_ds.config import ConfigError, DataConfig, RouterConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.train.evaluate_export import evaluate_export
from tests.data.faulty_server import serving


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


def exported(folder: Path, num_classes: int) -> Path:
    arch = VMoEArch(
        image_size=8, patch_size=4, num_classes=num_classes, embed_dim=16, num_heads=2, mlp_ratio=1.0, num_blocks=2, moe_blocks=(1,),
        num_experts=2, router=RouterConfig(),
    )  # fmt: skip
    model = VisionMoE(arch, StageSpan.whole(2), seed=0)
    data = DataConfig(num_classes=num_classes, image_size=8)
    names = [f"class {i}" for i in range(num_classes)]
    return export_hf(model.state_dict(), arch, folder, class_names=names, data=data, license="mit", stitches=())


def test_shards_at_a_url_give_the_numbers_of_the_folder(
    world: World, digits_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    folder = exported(tmp_path / "export", 10)
    local = json.loads(evaluate_export(folder, str(digits_shards / "validation"), 64, world))
    with serving(digits_shards) as server:
        assert json.loads(evaluate_export(folder, f"{server.url}/validation", 64, world)) == local
        other = exported(tmp_path / "other", 3)
        with pytest.raises(ConfigError, match=r"/validation\?\*\*\* has 10 classes and the model .* has 3") as caught:
            evaluate_export(other, f"{server.url}/validation?token=hunter2", 64, world)
    assert "hunter2" not in str(caught.value)
