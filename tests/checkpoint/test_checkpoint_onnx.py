"""ONNX files by onnxruntime against VisionMoE by torch; which routers are refused; what a file says about itself."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import onnx
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.onnx_export import compare_onnx, export_onnx, run_onnx
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig, RunConfig, dump
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.static_vmoe import (
    DenseExperts,
    GatheredExperts,
    StaticExperts,
    StaticVMoE,
    smallest_gaps,
    why_not_static,
)
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, arch_from_config
from m2mkd_ds.train.context import open_run
from m2mkd_ds.train.local_nodes import split
from tests.checkpoint.students import ARCH, DATA, NAMES, STITCHES, exported, shaken
from tests.cli.conftest import m2mkd  # noqa: F401  (a fixture)
from tests.cli.ended import Run
from tests.train.finished_run import tiny_config

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


# One sparse block is enough: an export takes a second for every two experts.
SMALL = dataclasses.replace(ARCH, num_blocks=2, moe_blocks=(1,), num_experts=3)
STITCHED = (StitchSpec(0, "post", 0, 32, 48), StitchSpec(1, "pre", 1, 48, 32))


def images(count: int, seed: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def decided(model: VisionMoE, count: int) -> Tensor:
    """Images whose experts no rounding can change."""
    many = images(4 * count)
    return many[smallest_gaps(model, many) > 2e-5][:count]


def write(model: VisionMoE, out: Path, experts: type = GatheredExperts) -> Path:
    return export_onnx(StaticVMoE(model, experts), out, image_size=16, metadata={})


VARIANTS = {
    "fastmoe": dataclasses.replace(ARCH, router=ROUTER_PRESETS["fastmoe"]),
    # Capacity 4.0 * 2 choices / 8 experts: each could take all tokens, so nothing is ever dropped.
    "vmoe": dataclasses.replace(ARCH, router=ROUTER_PRESETS["vmoe"], num_experts=8),
    "loss_free": dataclasses.replace(ARCH, router=ROUTER_PRESETS["loss_free"], activation="swiglu"),
    "renormalised": dataclasses.replace(ARCH, router=RouterConfig(softmax="before", renormalize=True, top_k=3)),
}


@pytest.mark.parametrize("experts", [GatheredExperts, DenseExperts])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_static_form_has_the_models_logits(variant: str, experts: type) -> None:
    model = shaken(VARIANTS[variant], STITCHES)
    given = decided(model, 7)
    torch.testing.assert_close(StaticVMoE(model, experts)(given), model(given).output, rtol=1e-5, atol=1e-4)


def test_experts_without_a_way_to_compute_cannot_be_made() -> None:
    layer = VisionMoE(SMALL, StageSpan.whole(2), seed=0).blocks["1"].moe
    with pytest.raises(TypeError, match="abstract class StaticExperts .*'?compute'?"):
        StaticExperts(layer)  # type: ignore[abstract, arg-type]


@pytest.mark.parametrize(
    ("router", "activation", "experts"),
    [
        ("loss_free", "swiglu", GatheredExperts),
        pytest.param("vmoe", "gelu", GatheredExperts, marks=pytest.mark.slow),
        pytest.param("fastmoe", "gelu", DenseExperts, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_onnxruntime_gives_torchs_logits_for_any_batch(tmp_path: Path, router: str, activation: str, experts: type) -> None:
    arch = dataclasses.replace(SMALL, router=ROUTER_PRESETS[router], activation=activation)  # type: ignore[arg-type]
    model = shaken(arch, STITCHED)
    file = write(model, tmp_path / "model.onnx", experts)
    onnx.checker.check_model(onnx.load(file), full_check=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    given = decided(model, 5)
    expected = model(given).output
    assert compare_onnx(file, given, expected) < 1e-5
    assert compare_onnx(file, given[3:4], expected[3:4]) < 1e-5
    with pytest.raises(ValueError, match="onnxruntime's logits differ from torch's by .* on 5 images; allowed is 0.0001"):
        compare_onnx(file, given, expected.roll(1, dims=0))


@torch.no_grad()
def test_full_and_empty_experts_and_ties_are_as_in_training(tmp_path: Path) -> None:
    model = shaken(dataclasses.replace(SMALL, num_experts=4))
    router = model.blocks["1"].moe.router
    router.weight.zero_()
    router.bias.copy_(torch.tensor([0.0, 1.0, -9.0, 0.0]))  # expert 1 first, then 0 or 3, which are equally good: the lower one
    file = write(model, tmp_path / "model.onnx")
    for count in (1, 5):  # of 17 tokens each
        expected = model(images(count))
        assert expected.stats[1].load_E.tolist() == [17 * count, 17 * count, 0, 0]
        assert compare_onnx(file, images(count), expected.output) < 1e-5


def test_routers_whose_choice_depends_on_the_batch_are_refused_by_name() -> None:
    for kind, word in (("expert_choice", "router.kind=expert_choice"), ("vmoe", "eval_capacity_factor=4 drops tokens")):
        arch = dataclasses.replace(ARCH, router=ROUTER_PRESETS[kind], num_experts=16)
        with pytest.raises(ValueError, match=f"no static graph for this student: .*{word}.*other images"):
            StaticVMoE(shaken(arch), GatheredExperts)
    assert "benchmark's router" in why_not_static(RouterConfig(kind="zipf"), 4)
    # A student without sparse blocks has no router to refuse.
    StaticVMoE(shaken(dataclasses.replace(ARCH, moe_blocks=(), router=ROUTER_PRESETS["expert_choice"])), GatheredExperts)


@torch.no_grad()
def test_the_capacity_that_is_let_pass_never_drops_and_the_refused_one_does() -> None:
    crowd = torch.zeros(64, 32)  # 64 tokens that all want the same experts
    for factor, drops in ((2.0, False), (1.9, True)):
        router = RouterConfig(softmax="before", eval_capacity_factor=factor, switch_weight=0.0)
        model = shaken(dataclasses.replace(ARCH, router=router))
        routing = model.blocks["1"].moe.router(crowd)
        assert bool(routing.stats.drop_rate > 0) is drops and bool(why_not_static(router, 4)) is drops


def test_gaps_find_the_image_whose_routing_hangs_on_rounding() -> None:
    model = shaken()
    gaps = smallest_gaps(model, images(6))
    assert gaps.shape == (6,) and bool((gaps > 0).all()) and bool((gaps < 1).all())
    torch.testing.assert_close(smallest_gaps(model, images(6)[4:5]), gaps[4:5], rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        model.blocks["2"].moe.router.weight.zero_()
        model.blocks["2"].moe.router.bias.zero_()
    assert smallest_gaps(model, images(2)).tolist() == [0.0, 0.0]


@torch.no_grad()
def test_the_verb_writes_a_file_that_describes_itself(tmp_path: Path, m2mkd: Run) -> None:  # noqa: F811
    model = shaken(SMALL)
    folder = exported(model, tmp_path / "hf")
    ended = m2mkd("onnx", str(folder), "student.onnx", "--batch", "2", "--opset", "18")
    assert (ended.code, ended.out) == (0, "student.onnx\n"), ended.err
    proto = onnx.load("student.onnx")
    assert {o.domain: o.version for o in proto.opset_import}[""] == 18
    told = {p.key: p.value for p in proto.metadata_props}
    assert json.loads(told["m2mkd_ds.labels"]) == list(NAMES) and told["m2mkd_ds.experts"] == "gather"
    steps = json.loads(told["m2mkd_ds.preprocessing"])
    assert steps["mean"] == list(DATA.mean) and steps["resize"] == 20 and steps["interpolation"] == "bilinear"  # 16 / 0.8
    assert compare_onnx(Path("student.onnx"), decided(model, 2), model(decided(model, 2)).output) < 1e-5
    with pytest.raises(Exception, match="(?i)invalid dimensions|got: 3"):
        run_onnx(Path("student.onnx"), images(3))


@pytest.fixture
def digits_run(tmp_path: Path) -> RunConfig:
    """Config of a run folder without anything in it yet, of two blocks, with real shards."""
    make_source("digits", tmp_path / "shards")
    small = ("student.depths=[1,1]", "teacher.depths=[1,1]", "teacher.arch_args.depth=2", "student.moe.num_experts=3")
    config = tiny_config(
        tmp_path / "run", tmp_path / "shards", f"teacher.weights={tmp_path / 'teacher.safetensors'}", *small, recipe="tiny_pretrained"
    )
    (tmp_path / "run" / "end_to_end").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    return config


@torch.no_grad()
def test_the_verb_compares_on_the_runs_validation_images(digits_run: RunConfig, m2mkd: Run) -> None:  # noqa: F811
    student = shaken(arch_from_config(digits_run))
    save_weights(Path(digits_run.run_dir) / "end_to_end" / "weights.safetensors", student.state_dict(), {"phase": "end_to_end"})
    ended = m2mkd("onnx", digits_run.run_dir, "student.onnx", "--experts", "dense")
    assert ended.code == 0 and "onnx: 40 images, logits of onnxruntime within" in ended.err  # 20 random ones, 20 digits
    index = ShardIndex.load(digits_run.data.validation)
    batch = next(iter(EvalLoader(index, digits_run.data, batch_size=5, rank=0, world=1))).images_BCHW
    assert compare_onnx(Path("student.onnx"), batch, student(batch).output) < 1e-5
    told = {p.key: p.value for p in onnx.load("student.onnx").metadata_props}
    assert json.loads(told["m2mkd_ds.labels"]) == [str(digit) for digit in range(10)]


@torch.no_grad()
def test_a_runs_teacher_becomes_a_file_too(digits_run: RunConfig, m2mkd: Run) -> None:  # noqa: F811
    args = digits_run.teacher.arch_args
    teacher = timm.create_model(digits_run.teacher.arch, num_classes=10, img_size=16, **args).eval()
    save_file(teacher.state_dict(), digits_run.teacher.weights)
    split(open_run(digits_run, ALONE))
    assert m2mkd("onnx", digits_run.run_dir, "teacher.onnx", "--what", "teacher").code == 0
    assert compare_onnx(Path("teacher.onnx"), images(5), teacher(images(5))) < 1e-5


def test_a_file_that_fails_its_check_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "model.onnx"
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))

    def refuse(file: Path) -> None:
        assert run_onnx(file, torch.zeros(4, 3, 2, 2)).shape == (4, 2)
        raise ValueError("not good enough")

    with pytest.raises(ValueError, match="not good enough"):
        export_onnx(module, out, image_size=2, metadata={}, check=refuse)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["student", "teacher"])
@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("there.onnx", "there.onnx: exists already; nothing is written over: name another file"),
        ("large.onnx", "large.onnx.data: exists already; nothing is written over: name another file"),
        ("nowhere/new.onnx", "nowhere/new.onnx: there is no folder nowhere; make it, or name a file elsewhere"),
        ("new.pb", "new.pb: the file to write must end in .onnx"),
    ],
)
def test_the_name_of_the_file_is_refused_before_the_model_is_read(m2mkd: Run, file: str, told: str, what: str) -> None:  # noqa: F811
    Path("there.onnx").write_bytes(b"the old one")
    Path("large.onnx.data").write_bytes(b"the old weights")
    ended = m2mkd("onnx", "no-model-here", file, "--what", what)  # which is an error, too, but comes behind
    assert (ended.code, ended.out, ended.err) == (2, "", f"m2mkd: {told}\n")
    assert {p.name: p.read_bytes() for p in Path().iterdir()} == {"there.onnx": b"the old one", "large.onnx.data": b"the old weights"}
    with pytest.raises(StoreError, match=re.escape(told)):
        export_onnx(torch.nn.Flatten(), Path(file), image_size=2, metadata={})


@pytest.mark.parametrize(("words", "message"), [(("--opset", "9"), "is 9; allowed is 18 to 23"), (("--batch", "0"), "--batch is 0")])
def test_settings_that_cannot_work_are_refused(tmp_path: Path, m2mkd: Run, words: tuple[str, str], message: str) -> None:  # noqa: F811
    folder = exported(shaken(), tmp_path / "hf")
    ended = m2mkd("onnx", str(folder), "out.onnx", *words)
    assert ended.code == 2 and message in ended.err and not Path("out.onnx").exists()
    ended = m2mkd("onnx", str(folder), ".")
    assert ended.code == 2 and ended.err == "m2mkd: .: is a folder; name the file to write, such as student.onnx\n"
