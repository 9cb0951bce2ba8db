"""The router's branch of the config: presets by name, refinement by later words, refusals."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from m2mkd_ds import router_config
from m2mkd_ds.config import ROUTER_PRESETS, ConfigError, RouterConfig, RunConfig, apply_overrides, check_router, dump, load


def router_of(*assignments: str) -> RouterConfig:
    return apply_overrides(RunConfig(name="x"), list(assignments)).student.moe.router


@pytest.mark.parametrize("name", ROUTER_PRESETS)
def test_a_preset_replaces_the_branch_and_survives_the_file(name: str, tmp_path: Path) -> None:
    config = apply_overrides(RunConfig(name="x"), ["student.moe.router.z_weight=0.5", f"student.moe.router={name}"])
    assert config.student.moe.router == ROUTER_PRESETS[name]  # the word before it is gone
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_later_words_refine_a_preset() -> None:
    router = router_of("student.moe.router=vmoe", "student.moe.router.top_k=1", "student.moe.router.capacity_priority=batch")
    assert router == dataclasses.replace(ROUTER_PRESETS["vmoe"], top_k=1, capacity_priority="batch")


def test_the_presets_are_the_published_settings() -> None:
    vmoe = ROUTER_PRESETS["vmoe"]
    assert (vmoe.kind, vmoe.top_k, vmoe.softmax, vmoe.renormalize, vmoe.bias, vmoe.noise) == ("noisy_topk", 2, "before", False, False, 1.0)
    assert (vmoe.importance_weight, vmoe.load_weight, vmoe.switch_weight, vmoe.z_weight) == (0.005, 0.005, 0.0, 0.0)
    assert (vmoe.capacity_factor, vmoe.eval_capacity_factor, vmoe.capacity_multiple, vmoe.capacity_priority) == (1.05, 4.0, 4, "order")
    fastmoe = ROUTER_PRESETS["fastmoe"]
    assert fastmoe == RouterConfig(kind="topk", top_k=2, softmax="after", bias=True, switch_weight=0.0)
    assert (fastmoe.capacity_factor, fastmoe.eval_capacity_factor, fastmoe.balance_rate) == (0.0, 0.0, 0.0)
    switch = ROUTER_PRESETS["switch"]
    assert (switch.top_k, switch.softmax, switch.capacity_factor, switch.switch_weight) == (1, "before", 1.25, 0.01)
    free = ROUTER_PRESETS["loss_free"]
    assert free.balance_rate == 0.001 and not (free.switch_weight or free.importance_weight or free.load_weight)


def test_every_preset_fits_a_usual_number_of_experts() -> None:
    for preset in ROUTER_PRESETS.values():
        check_router(preset, 8)


@pytest.mark.parametrize("value", ["tutel", "3", "{top_k: 1}", "", "true"])
def test_an_unknown_preset_is_answered_with_the_list(value: str) -> None:
    with pytest.raises(ConfigError, match=r"--set student\.moe\.router is .*presets fastmoe, vmoe, switch, loss_free, expert_choice, or"):
        router_of(f"student.moe.router={value}")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["student.moe.router.kind=hash"], r"student\.moe\.router\.kind: .*'zipf' \(given 'hash'\)"),
        (["student.moe.router.capacity_factor=-1"], r"student\.moe\.router\.capacity_factor is -1\.0; it must be at least 0"),
        (["student.moe.router=vmoe", "student.moe.num_experts=1"], r"router\.top_k is 2; allowed is 1 to student\.moe\.num_experts = 1"),
        (["student.moe.router.load_weight=1"], r"student\.moe\.router\.load_weight is 1\.0 with student\.moe\.router\.kind=topk"),
        (["student.moe.router=expert_choice", "student.moe.router.capacity_factor=0"], "set it above 0, for example to 2"),
        (["student.moe.activation=relu"], r"student\.moe\.activation: .*'gelu' or 'swiglu'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_under_its_path(texts: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        router_of(*texts)


def test_expert_choice_does_not_look_at_top_k() -> None:
    assert router_of("student.moe.router=expert_choice", "student.moe.router.top_k=99").top_k == 99


def test_every_field_says_what_it_means() -> None:
    tree = ast.parse(Path(router_config.__file__).read_text())
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    fields = [i for i, statement in enumerate(cls.body) if isinstance(statement, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(RouterConfig)) == 16
    for i in fields:
        text = cls.body[i + 1]
        assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and str(text.value.value).strip()
