"""The config tree: types, names, ranges, files; every refusal is one sentence that names the field."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from m2mkd_ds import config as config_module
from m2mkd_ds.config import (
    ConfigError,
    PhaseConfig,
    RunConfig,
    WatchConfig,
    apply_overrides,
    dump,
    field_paths,
    from_dict,
    load,
    to_dict,
)
from m2mkd_ds.recipes import RECIPES


def changed(*assignments: str) -> RunConfig:
    return apply_overrides(RunConfig(name="x"), list(assignments))


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("m2mkd.lr=1e-3", "m2mkd.lr", 0.001),  # YAML 1.1 alone would read text
        ("m2mkd.lr=.5", "m2mkd.lr", 0.5),
        ("m2mkd.lr=2", "m2mkd.lr", 2.0),
        ("m2mkd.betas=[0.8, 1e-1]", "m2mkd.betas", (0.8, 0.1)),
        ("student.depths=[1,2,3,4]", "student.depths", (1, 2, 3, 4)),
        ("seed=7", "seed", 7),
        ("baseline=false", "baseline", False),
        ("baseline=no", "baseline", False),
        ("data.train=", "data.train", ""),
        ("data.train=a=b", "data.train", "a=b"),
        ("name='5'", "name", "5"),
        ("m2mkd.precision=bf16", "m2mkd.precision", "bf16"),
        ("launch.extra=[--include, 'host:0']", "launch.extra", ("--include", "host:0")),
        ("teacher.arch_args={depth: 4}", "teacher.arch_args", {"depth": 4}),
        (" m2mkd.lr = 0.25", "m2mkd.lr", 0.25),
    ],
)
def test_values_are_yaml_of_the_fields_type(text: str, path: str, expected: object) -> None:
    value: object = changed(text)
    for part in path.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


def test_arch_args_take_any_key_with_its_yaml_type() -> None:
    args = changed(
        "teacher.arch_args.depth=4", "teacher.arch_args.init_values=1e-5", "teacher.arch_args.class_token=false"
    ).teacher.arch_args
    assert args == {"depth": 4, "init_values": 0.00001, "class_token": False}
    assert isinstance(args["init_values"], float) and args["class_token"] is False


def test_all_overrides_are_applied_before_the_tree_is_checked() -> None:
    # each of these alone would disagree with the other two about the number of stages
    assert changed("teacher.depths=[8,16]", "meta.depths=[1,1]", "student.depths=[6,6]").num_stages == 2


def test_the_original_is_not_changed() -> None:
    base = RunConfig(name="x")
    apply_overrides(base, ["teacher.arch_args.depth=3", "seed=5"])
    assert base == RunConfig(name="x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed=1.5", r"seed: .*integer.*\(given 1\.5\)"),
        ("seed=true", "seed: expected a number or text, and true or false was given"),
        ("m2mkd.lr=fast", r"m2mkd\.lr: .*number.*\(given 'fast'\)"),
        ("m2mkd.lr=.nan", r"m2mkd\.lr: .*finite"),
        ("m2mkd.lr=.inf", r"m2mkd\.lr: .*finite"),
        ("name=5", r"name: .*string \(given 5\)"),
        ("baseline=2", "baseline: .*boolean"),
        ("data.mean=[0.1, 0.2]", r"data\.mean\.2: Field required"),
        ("data.mean=[0.1, 0.2, 0.3, 0.4]", r"data\.mean: .*at most 3"),
        ("m2mkd.betas=[0.9]", r"m2mkd\.betas\.1: Field required"),
        ("student.depths=3", r"student\.depths: expected a list, written '\[A,B\]' \(given 3\)"),
        ("trackers=wandb", r"trackers: expected a list, written '\[A,B\]' \(given 'wandb'\)"),
        ("student.depths=[3, 2.5, 3, 3]", r"student\.depths\.1: .*integer"),
        ("m2mkd.precision=fp16", r"m2mkd\.precision: .*'auto', 'fp32' or 'bf16' \(given 'fp16'\)"),
        ("teacher.arch_args=4", r"teacher\.arch_args: .*dictionary"),
        ("teacher.arch_args.a.b=4", r"teacher\.arch_args\.a\.b: no such field"),
        ("m2mkd.lr=[1", r"m2mkd\.lr=\[1: not a YAML value"),
        ("m2mkd.lr", "'m2mkd.lr': expected key=value"),
        ("m2mkd=3", "m2mkd: no such field"),
    ],
)
def test_wrong_types_are_refused_in_one_line_that_names_the_field(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as err:
        changed(text)
    assert "\n" not in str(err.value) and str(err.value).startswith("--set")


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("m2mkd.lrr", "m2mkd.lr"),
        ("student.moe.top_k", "student.moe.router.top_k"),
        ("distil.temperature", "distill.temperature"),
        ("data.augment.mixupp", "data.augment.mixup"),
        ("lr", "m2mkd.lr"),
        ("temprature", "distill.temperature"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest_name(wrong: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"--set {wrong}: no such field; did you mean .*") as err:
        changed(f"{wrong}=1")
    assert nearest in str(err.value).partition("did you mean")[2]


def test_an_unknown_key_in_a_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("name: x\nm2mkd: {lrr: 1}\nstudent: {moe: {routr: {}}}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml: .*m2mkd\.lrr: no such field; did you mean m2mkd\.lr\?") as err:
        load(file)
    assert "student.moe.routr: no such field" in str(err.value)  # every wrong field, not only the first


PHASE_REFUSALS = [
    ("micro_batch_size=0", "micro_batch_size is 0; it must be at least 1"),
    ("gradient_accumulation_steps=0", "gradient_accumulation_steps is 0; it must be at least 1"),
    ("checkpoint_steps=0", "checkpoint_steps is 0; it must be at least 1"),
    ("log_steps=0", "log_steps is 0; it must be at least 1"),
    ("max_steps=-1", "max_steps is -1; it must be at least 0"),
    ("epochs=0", "epochs is 0.0 and {phase}.lr is .*both must be positive"),
    ("lr=0", "epochs is 100.0 and {phase}.lr is 0.0; both must be positive"),
    ("warmup_epochs=100", "warmup_epochs is 100.0; allowed is 0 to less than {phase}.epochs = 100.0"),
    ("warmup_epochs=-1", "warmup_epochs is -1.0; allowed is 0 to less than"),
    ("drop_path=1", "drop_path is 1.0; allowed is 0 to 0.99"),
    ("ema_decay=1", "ema_decay is 1.0; allowed is 0 to 0.999999"),
    ("clip_grad=-1", "clip_grad is -1.0; it must be at least 0"),
    ("weight_decay=-1", "weight_decay is -1.0; it must be at least 0"),
]


@pytest.mark.parametrize("phase", ["pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end"])
@pytest.mark.parametrize(("text", "message"), PHASE_REFUSALS)
def test_numbers_of_a_phase_out_of_range_are_refused(phase: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{phase}\." + message.format(phase=phase)):
        changed(f"{phase}.{text}")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["teacher.depths=[]"], r"teacher\.depths is \[\]: every stage needs at least one block"),
        (["meta.depths=[1,0,1,1]"], r"meta\.depths is \[1, 0, 1, 1\]: every stage needs at least one block"),
        (["meta.depths=[1,1]"], r"meta\.depths has 2 stages and teacher\.depths has 4.*same number of stages"),
        (["student.depths=[3,3,3]"], r"student\.depths has 3 stages and teacher\.depths has 4"),
        (["teacher.source=pretrained"], r"teacher\.source=pretrained needs teacher\.weights"),
        (["student.num_heads=7"], r"student\.embed_dim 768 is not a multiple of student\.num_heads 7"),
        (["student.num_heads=0"], r"student\.num_heads is 0; it must be at least 1"),
        (["student.patch_size=0"], r"student\.patch_size is 0; it must be at least 1"),
        (["student.patch_size=15"], r"data\.image_size 224 is not a multiple of student\.patch_size 15"),
        (["student.mlp_ratio=0"], r"student\.mlp_ratio is 0\.0; it must be at least 0\.01"),
        (["distill.kd_weight=1.5"], r"distill\.kd_weight is 1\.5; allowed is 0 \(no teacher\) to 1 \(no labels\)"),
        (["distill.kd_weight=-0.1"], r"distill\.kd_weight is -0\.1"),
        (["distill.temperature=0"], r"distill\.temperature is 0\.0; it must be positive"),
        (["student.moe.router.top_k=9"], r"student\.moe\.router\.top_k is 9; allowed is 1 to student\.moe\.num_experts = 8"),
        (["student.moe.router.top_k=0"], r"student\.moe\.router\.top_k is 0; allowed is 1"),
        (["student.moe.num_experts=0"], r"student\.moe\.num_experts is 0; it must be at least 1"),
        (["student.moe.placement_n=0"], r"student\.moe\.placement_n is 0; it must be at least 1"),
        (["data.num_classes=0"], r"data\.num_classes is 0; it must be at least 1"),
        (["data.num_workers=-1"], r"data\.num_workers is -1; it must be at least 0"),
        (["data.io_deadline_s=0"], r"data\.io_deadline_s is 0: no read could succeed"),
        (["data.cache_dir=/c", "data.cache_gb=0"], r"data\.cache_gb is 0 with data\.cache_dir /c: no shard fits in"),
        (["data.crop_pct=0"], r"data\.crop_pct is 0\.0; allowed is 0\.01 to 1"),
        (["data.augment.crop_scale=[0.5,0.1]"], r"data\.augment\.crop_scale is \[0\.5, 0\.1\]: give \[smallest, largest\]"),
        (["data.augment.crop_scale=[0,1]"], r"data\.augment\.crop_scale is \[0\.0, 1\.0\]"),
        (["data.std=[0.2,0,0.2]"], r"data\.std is \[0\.2, 0\.0, 0\.2\]: .* above 0"),
        (
            ["data.augment.mixup=1", "data.augment.repeats=3"],
            r"mix_group is 2 and .*repeats is 3: .* multiple of 6, or 0 for the whole micro-batch and a micro_batch_size that is one$",
        ),
        (["data.augment.hflip=2"], r"data\.augment\.hflip is 2\.0; allowed is 0 to 1"),
        (["data.augment.label_smoothing=-1"], r"data\.augment\.label_smoothing is -1\.0; allowed is 0 to 1"),
        (["launch.num_gpus=-2"], r"launch\.num_gpus is -2; it must be at least 0"),
        (["launch.threads_per_rank=0"], r"launch\.threads_per_rank is 0; it must be at least 1"),
    ],
)
def test_a_tree_that_cannot_run_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as err:
        changed(*texts)
    assert "\n" not in str(err.value)


def test_python_callers_are_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"m2mkd\.log_steps is 0"):
        RunConfig(name="x", m2mkd=PhaseConfig(log_steps=0))


@pytest.mark.parametrize("recipe", RECIPES)
def test_dump_and_load_give_the_same_tree(recipe: str, tmp_path: Path) -> None:
    config = RECIPES[recipe]()
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


def test_awkward_values_survive_the_file(tmp_path: Path) -> None:
    # text that YAML would take for a number, a truth value or nothing; a float that YAML 1.1 would take for text
    config = changed("teacher.arch_args={init_values: 1e-5, note: '1e-5', other: 'yes', empty: null}", "m2mkd.lr=1e-7")
    config = replace(config, name="1e3", run_dir="a: b # c", export=replace(config.export, class_names=("no", "1", "ä", "")))
    file = tmp_path / "config.yaml"
    file.write_text(dump(config))
    assert load(file) == config


def test_the_file_holds_every_field(tmp_path: Path) -> None:
    tree = yaml.safe_load(dump(RunConfig(name="x")))

    def leaves(node: dict[str, object], prefix: str = "") -> list[str]:
        found: list[str] = []
        for key, value in node.items():
            inner = isinstance(value, dict) and key != "arch_args"
            found += leaves(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]  # type: ignore[arg-type]
        return found

    assert leaves(tree) == field_paths()
    assert {"student.moe.router.top_k", "data.augment.mixup", "teacher.arch_args", "m2mkd.lr"} <= set(field_paths())
    assert to_dict(from_dict(tree)) == tree


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("a: [1", "not YAML"),
        ("- 1\n- 2", "expected a mapping of fields, found list"),
        ("", "expected a mapping of fields, found NoneType"),
        ("seed: 1", "name: Field required"),
    ],
)
def test_files_that_are_no_config_are_refused_by_name(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"my\.yaml: .*{message}") as err:
        load(file)
    assert "\n" not in str(err.value)


def test_the_tree_is_frozen_all_the_way_down() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig(name="x").student.moe.router.top_k = 1  # type: ignore[misc]


def test_every_field_says_what_it_means() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text())
    silent = []
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")):
        for statement, behind in zip(cls.body, [*cls.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                text = behind.value.value if isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant) else None
                if not isinstance(text, str) or not text.strip():
                    silent.append(f"{cls.name}.{statement.target.id}")
    assert silent == []


def test_limits_of_the_watchdog_are_checked_against_the_wait_for_a_checkpoint() -> None:
    with pytest.raises(ConfigError, match=r"watch\.save_s is 100 and checkpoint\.deadline_s is 50: a rank may wait twice the second"):
        from_dict({"name": "x", "checkpoint": {"deadline_s": 50.0}, "watch": {"save_s": 100.0}})
    from_dict({"name": "x", "checkpoint": {"deadline_s": 50.0}, "watch": {"save_s": 101.0}})


def test_limits_of_the_watchdog_are_checked_against_the_teacher_s_patience() -> None:
    feed = {"feed": "remote", "endpoints": ["10.0.0.7:8815"], "patience_s": 300.0}
    with pytest.raises(ConfigError, match=r"watch\.step_s is 200 and teacher\.patience_s is 300: a rank that waits for its teacher"):
        from_dict({"name": "x", "teacher": feed, "watch": {"step_s": 200.0}})
    watch = from_dict({"name": "x", "teacher": feed, "watch": {"step_s": 0, "save_s": 4000}}).watch  # 0: no limit at all
    assert (watch.first_step_s, watch.collective_timeout_s) == (0, 4060)
    assert WatchConfig(start_s=900).first_step_s == 900 and WatchConfig().first_step_s == 600
    # A step or an evaluation, whichever may be longer, and the save: 1800 + 1800.
    assert WatchConfig().stop_s == 3600 and WatchConfig(eval_s=0).stop_s == 0
    with pytest.raises(ConfigError, match=r"watch\.heartbeat_s is 0\.0"):
        from_dict({"name": "x", "watch": {"heartbeat_s": 0}})
