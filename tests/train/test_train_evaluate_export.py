"""`m2mkd eval` of an exported folder: shards at a URL give the numbers of the same shards in a folder; an address keeps its secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.hf.export import export_hf
from m2mkd_ds.config import ConfigError, DataConfig, RouterConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.train.evaluation.of_export import evaluate_export
from tests.cli.conftest import m2mkd  # noqa: F401  (a fixture)
from tests.cli.ended import Run
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


def test_a_model_spread_over_cpu_and_disk_gives_the_same_numbers(world: World, digits_shards: Path, tmp_path: Path) -> None:
    folder = exported(tmp_path / "export", 10)
    shards = str(digits_shards / "validation")
    whole = evaluate_export(folder, shards, 64, world)
    assert evaluate_export(folder, shards, 64, world, spread=True, max_memory={"cpu": "8KB"}) == whole
    with pytest.raises(ConfigError, match="2 ranks were started; start one"):
        evaluate_export(folder, shards, 64, replace(world, size=2), spread=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device-map", "auto"), "are for an exported folder, and run is none"),
        (("--max-memory", "cpu=1GB"), "are for an exported folder, and run is none"),
    ],
)
def test_a_device_map_is_for_exports_only(m2mkd: Run, words: tuple[str, ...], message: str) -> None:  # noqa: F811
    Path("run").mkdir()
    ended = m2mkd("eval", "run", *words)
    assert ended.code == 2 and message in ended.err


def test_sizes_without_a_device_map_are_refused(tmp_path: Path, m2mkd: Run) -> None:  # noqa: F811
    exported(tmp_path / "export", 10)
    ended = m2mkd("eval", str(tmp_path / "export"), "--max-memory", "cpu=1GB")
    assert ended.code == 2 and "--max-memory says how --device-map auto spreads a model; give both" in ended.err
