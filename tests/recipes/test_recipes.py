"""Recipes: each builds and documents itself; the paper's run has the paper's numbers (research notes on arXiv 2402.16918, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from m2mkd_ds.config import ConfigError, PhaseConfig, RunConfig
from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.models.vit import VitArch, empty_stage, num_blocks, width
from m2mkd_ds.models.vmoe import arch_from_config, count_parameters
from m2mkd_ds.recipes import RECIPES, get_recipe
from m2mkd_ds.train.schedule import num_steps, num_warmup_steps, scaled_lr

RANKS = 8
IMAGENET_IMAGES = 1_281_167


@pytest.mark.parametrize("name, recipe", RECIPES.items())
def test_a_recipe_builds_under_its_own_name(name: str, recipe: Callable[[], RunConfig]) -> None:
    config = recipe()
    assert config.name == name
    assert get_recipe(name) == config
    # the depth that timm builds (else ConfigError), and the meta model's equal width
    assert width(VitArch.from_teacher(config)) == width(VitArch.from_meta(config))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_a_recipe_says_its_command_hardware_and_expected_score(recipe: Callable[[], RunConfig]) -> None:
    text = recipe.__doc__ or ""
    labels = [line.split(":")[0].strip() for line in text.splitlines() if ":" in line]
    assert "Command" in labels or "Commands" in labels
    assert "Hardware" in labels
    assert "Expected" in labels
    assert text.splitlines()[0].strip().endswith(".")  # the line that `m2mkd recipes` shows


def test_a_misspelt_recipe_is_answered_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'vmoe_base_in1'; there are tiny, .*; did you mean vmoe_base_in1k\?"):
        get_recipe("vmoe_base_in1")


# phase: per-rank batch, accumulation, global batch, scaled lr, epochs, warm-up epochs, drop-path, clip (0: none)
PAPER = {
    "pretrain_meta": (256, 1, 2048, 2e-3, 300, 20, 0.0, 0.0),
    "modular_train": (128, 2, 2048, 2e-3, 100, 20, 0.1, 0.0),
    "assemble_finetune": (128, 1, 1024, 1e-3, 100, 0, 0.1, 1.0),
    "m2mkd": (128, 2, 2048, 2e-3, 100, 20, 0.1, 0.0),
    "end_to_end": (128, 1, 1024, 1e-3, 100, 0, 0.1, 1.0),
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_run_has_the_papers_numbers(name: str) -> None:
    phase: PhaseConfig = getattr(get_recipe("vmoe_base_in1k"), name)
    batch, accumulation, global_batch, lr, epochs, warmup, drop_path, clip = PAPER[name]
    assert (phase.micro_batch_size, phase.gradient_accumulation_steps) == (batch, accumulation)
    assert batch * accumulation * RANKS == global_batch
    assert scaled_lr(phase, phase.micro_batch_size * phase.gradient_accumulation_steps * RANKS) == pytest.approx(lr, rel=1e-12)
    assert (phase.epochs, phase.warmup_epochs, phase.drop_path, phase.clip_grad) == (epochs, warmup, drop_path, clip)
    assert (phase.weight_decay, phase.eps, phase.min_lr, phase.warmup_lr) == (0.05, 1e-8, 1e-5, 1e-6)


@pytest.mark.parametrize(
    # 1,281,167 / 2048 = 625.57 steps an epoch, / 1024 = 1251.14
    ("name", "steps", "warmup_steps"),
    [("pretrain_meta", 187_671, 12_511), ("m2mkd", 62_557, 12_511), ("end_to_end", 125_114, 0)],
)
def test_the_papers_steps(name: str, steps: int, warmup_steps: int) -> None:
    phase: PhaseConfig = getattr(get_recipe("vmoe_base_in1k"), name)
    global_batch = PAPER[name][2]
    assert num_steps(phase, IMAGENET_IMAGES, global_batch) == steps
    assert num_warmup_steps(phase, IMAGENET_IMAGES, global_batch) == warmup_steps


def test_the_papers_models_have_the_papers_shape() -> None:
    config = get_recipe("vmoe_base_in1k")
    assert config.teacher.depths == (6, 6, 6, 6) and config.meta.depths == (1, 1, 1, 1) and config.student.depths == (3, 3, 3, 3)
    assert (config.distill.kd_weight, config.distill.temperature, config.distill.kd_type) == (0.5, 1.0, "soft")
    assert (config.data.augment.mixup, config.data.augment.cutmix, config.data.augment.label_smoothing) == (0.8, 1.0, 0.1)
    arch = arch_from_config(config)
    assert (arch.moe_blocks, arch.num_experts, arch.router.top_k) == (tuple(range(12)), 8, 2)
    # by hand: an expert has 768 * 3072 * 2 + 3072 + 768 = 4,722,432 parameters; 12 blocks of 8 are 453.4 M of the 483.3 M
    total, active = count_parameters(arch)
    assert round(total / 1e6, 1) == 483.3
    assert round(active / 1e6, 1) == 143.3
    assert total - active == 12 * 6 * 4_722_432


def parameters(arch: VitArch, depths: tuple[int, ...]) -> list[float]:
    """Millions of parameters by stage; nothing is allocated."""
    stages = [empty_stage(arch, span) for span in stage_spans(depths)]
    assert all(p.is_meta for stage in stages for p in stage.parameters())
    return [round(sum(p.numel() for p in stage.parameters()) / 1e6, 1) for stage in stages]


def test_the_papers_teacher_and_meta_model_have_the_papers_size() -> None:
    config = get_recipe("vmoe_base_in1k")
    teacher, meta = VitArch.from_teacher(config), VitArch.from_meta(config)
    assert (num_blocks(teacher), width(teacher), num_blocks(meta), width(meta)) == (24, 1024, 4, 1024)
    by_stage = parameters(teacher, config.teacher.depths)
    assert by_stage == [76.6, 75.6, 75.6, 76.6]
    assert math.isclose(sum(by_stage), 304.3, abs_tol=0.15)  # four rounded numbers
    assert parameters(meta, (4,)) == [52.4]


def test_the_timm_route_only_changes_where_the_teacher_comes_from() -> None:
    paper, timm = get_recipe("vmoe_base_in1k"), get_recipe("vmoe_base_from_timm")
    assert timm.teacher.source == "pretrained" and timm.teacher.weights == "timm"
    assert (timm.student, timm.distill, timm.m2mkd, timm.end_to_end, timm.data) == (
        paper.student, paper.distill, paper.m2mkd, paper.end_to_end, paper.data,
    )  # fmt: skip
    assert parameters(VitArch.from_teacher(timm), timm.teacher.depths)[1] == pytest.approx(75.6, abs=0.1)  # layer scale adds little


@pytest.mark.parametrize("name", ["tiny", "fashion"])
def test_small_recipes_share_a_launch_and_run_on_a_cpu(name: str) -> None:
    config = get_recipe(name)
    assert config.launch.one_job and config.launch.num_gpus == 2
    assert all(getattr(config, phase).precision == "fp32" for phase in PAPER)
