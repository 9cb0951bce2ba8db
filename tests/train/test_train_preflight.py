"""Settings of later phases are refused before the first phase starts; the control is as long as the student's training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import ConfigError, apply_overrides
from m2mkd_ds.distributed.world import World
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.evaluation.of_run import _check_equal_steps
from m2mkd_ds.train.nodes import build_dag
from m2mkd_ds.train.phases.end_to_end import baseline_phase
from m2mkd_ds.train.preflight import as_launched, check_settings


def context(folder: Path, shards: Path, *overrides: str) -> RunContext:
    base = get_recipe("tiny")
    data = replace(base.data, train=str(shards / "train"), validation=str(shards / "validation"))
    config = apply_overrides(replace(base, run_dir=str(folder), data=data), list(overrides))
    return as_launched(open_run(config, World(0, 1, 0, 1, torch.device("cpu"))))


def names(ctx: RunContext) -> list[str]:
    return [node.name for node in build_dag(ctx.config)]


def test_a_good_run_passes(tmp_path: Path, digits_shards: Path) -> None:
    ctx = context(tmp_path, digits_shards)
    check_settings(ctx, names(ctx))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.max_shard_size=2X", "2X"),
        ("export.class_names=[a, b]", "2 names and data.num_classes is 10"),
        ("m2mkd.ds_config=zeroo", "m2mkd: .*zeroo"),
        ("end_to_end.min_lr=9", "end_to_end: .*min_lr"),
        ("m2mkd.ep_size=3", "^m2mkd.ep_size is 3 and student.moe.num_experts is 4"),
        ("modular_train.ep_size=2", "^modular_train.ep_size is 2, but the model of this phase has no experts"),
        ("m2mkd.ep_size=4", "^m2mkd.ep_size is 4 and the job has 2 ranks"),
        ("student.embed_dim=30 student.mlp_ratio=1.1 student.moe.backend=grouped", "m2mkd: .*grouped"),
        ("student.moe.router.kind=zipf", "kind is 'zipf', a benchmark's router"),
    ],
)
def test_what_is_wrong_in_a_later_phase_is_said_at_once(tmp_path: Path, digits_shards: Path, override: str, message: str) -> None:
    ctx = context(tmp_path, digits_shards, *override.split(" ") if "student" in override else [override])
    with pytest.raises((ConfigError, ValueError), match=message):
        check_settings(ctx, names(ctx))


def test_an_ep_size_is_left_to_the_ranks_where_the_launcher_decides_on_their_number(tmp_path: Path, digits_shards: Path) -> None:
    ctx = context(tmp_path, digits_shards, "m2mkd.ep_size=4")
    check_settings(ctx, names(ctx), ranks_known=False)


REPEATED = ["data.augment.mixup=0.8", "data.augment.mix_group=0", "data.augment.repeats=3"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.augment.mixup=0.8", "data.augment.mix_group=4", "m2mkd.micro_batch_size=14"],
         "^m2mkd: micro_batch_size is 14 and data.augment.mix_group is 4: .*must divide micro_batch_size"),
        # tiny has 16 images a micro-batch: 7 and 8 mirror each other, and are uses of image 7 // 3 = 8 // 3 = 2
        (REPEATED, "^pretrain_meta: micro_batch_size is 16, .*mix_group is 0 and .*repeats is 3: .* a multiple of 6"),
        ([*REPEATED, "data.augment.repeat_mode=deit"], "^pretrain_meta: .*repeat_mode=deit spreads 3 uses .* there are 2: .*least 3 ranks"),
        (["data.augment.repeats=2", "data.augment.repeat_mode=deit", "launch.num_gpus=1300"],
         "^pretrain_meta: repeat_mode=deit gives no samples to 1300 ranks from 1438 images"),
        (["data.augment.auto_augment=rnad-m9"], "^data.augment: .*auto_augment 'rnad-m9'.*rand-m9-mstd0.5-inc1"),
    ],
)  # fmt: skip
def test_augmentation_that_cannot_be_is_said_before_a_loader_is_built(
    tmp_path: Path, digits_shards: Path, overrides: list[str], message: str
) -> None:
    ctx = context(tmp_path, digits_shards, *overrides)
    with pytest.raises(ConfigError, match=message):
        check_settings(ctx, names(ctx))


def test_what_depends_on_the_ranks_waits_for_them(tmp_path: Path, digits_shards: Path) -> None:
    ctx = context(tmp_path, digits_shards, *REPEATED, "data.augment.repeat_mode=deit")
    check_settings(ctx, names(ctx), ranks_known=False)
    ctx = context(tmp_path, digits_shards, *REPEATED, "data.augment.repeat_mode=deit", "launch.num_gpus=3")
    check_settings(ctx, names(ctx))


def test_odd_micro_batches_cannot_be_mixed(tmp_path: Path, digits_shards: Path) -> None:
    ctx = context(tmp_path, digits_shards, "data.augment.mixup=0.8", "end_to_end.micro_batch_size=15")
    with pytest.raises(ConfigError, match="end_to_end: micro_batch_size is 15"):
        check_settings(ctx, names(ctx))


def test_the_control_is_as_long_as_the_students_training_and_starts_as_the_modules_do(tmp_path: Path, digits_shards: Path) -> None:
    ctx = context(tmp_path, digits_shards, "m2mkd.lr=3e-3", "m2mkd.warmup_epochs=2")
    phase = baseline_phase(ctx)
    # 1438 images, 2 ranks x 16: m2mkd round(8 * 1438 / 32) = round(359.5) = 360 steps, end_to_end round(5 * 1438 / 32) = 225
    assert phase.max_steps == 360 + 225
    assert (phase.lr, phase.warmup_epochs, phase.clip_grad) == (3e-3, 2, ctx.config.end_to_end.clip_grad)


@pytest.mark.parametrize(("baseline", "good"), [(585, True), (580, False)])
def test_a_control_of_another_length_is_not_compared(tmp_path: Path, digits_shards: Path, baseline: int, good: bool) -> None:
    ctx = context(tmp_path, digits_shards)
    for name, steps in (("m2mkd", 360), ("end_to_end", 225), ("baseline", baseline)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "done.json").write_text(f'{{"steps": {steps}}}')
    if good:
        _check_equal_steps(ctx)
    else:
        with pytest.raises(ConfigError, match=r"baseline was trained for 580 steps and the student for 360 \+ 225"):
            _check_equal_steps(ctx)
