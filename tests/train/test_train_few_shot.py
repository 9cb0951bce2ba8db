"""Learning an episode and summing episodes up: intervals by hand, probes with known answers, features against timm."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scipy.stats
import timm
import torch
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.train.few_shot.config import FitConfig
from m2mkd_ds.train.few_shot.fit import finetune, fit_linear, fresh_head_, num_correct, outputs
from m2mkd_ds.train.few_shot.models import pre_logits
from m2mkd_ds.train.few_shot.run import summarise
from m2mkd_ds.train.few_shot.stats import mean_interval, t_quantile

ARCH = VMoEArch(
    image_size=16, patch_size=4, num_classes=3, embed_dim=16, num_heads=2, mlp_ratio=2.0, num_blocks=2, moe_blocks=(0, 1), num_experts=4,
    router=RouterConfig(top_k=2),
)  # fmt: skip


def student(arch: VMoEArch = ARCH, drop_path: float = 0.0) -> VisionMoE:
    return VisionMoE(arch, StageSpan.whole(arch.num_blocks), drop_path=drop_path, seed=0).eval().requires_grad_(False)


def pictures(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_t_quantiles_are_those_of_the_tables() -> None:
    # Two-sided 95 %: 1, 2, 4, 9 and 99 degrees of freedom, as printed in any table.
    assert [round(t_quantile(n), 3) for n in (1, 2, 4, 9, 99)] == [12.706, 4.303, 2.776, 2.262, 1.984]
    assert [t_quantile(n) for n in range(1, 300)] == pytest.approx(scipy.stats.t.ppf(0.975, range(1, 300)), rel=1e-9)
    with pytest.raises(ValueError, match="at least two episodes"):
        t_quantile(0)


def test_interval_of_three_episodes_by_hand() -> None:
    # Mean 0.9, standard deviation 0.1; half width 4.302653 * 0.1 / sqrt(3) = 0.248414.
    mean, interval = mean_interval([0.8, 1.0, 0.9])
    assert mean == pytest.approx(0.9)
    assert interval == pytest.approx([0.651586, 1.148414], abs=1e-6)
    assert mean_interval([0.5]) == (0.5, None)
    with pytest.raises(ValueError, match="no episodes"):
        mean_interval([])


def test_differences_are_paired_by_episode() -> None:
    records = [
        {"episode": n, "queries": 10, "correct": {"student": s, "baseline": b, "teacher": s}}
        for n, (s, b) in enumerate([(2, 1), (9, 7), (5, 2)])
    ]
    summary = summarise(records, ["student", "baseline", "teacher"])
    assert summary["models"]["student"]["accuracy"] == pytest.approx(16 / 30)
    assert summary["models"]["baseline"] == {
        "accuracy": pytest.approx(1 / 3), "ci": pytest.approx(mean_interval([0.1, 0.7, 0.2])[1]), "lowest": 0.1, "highest": 0.7
    }  # fmt: skip
    # Differences 0.1, 0.2, 0.3: mean 0.2, deviation 0.1, half width 0.248414 as above; far narrower than unpaired ones would be.
    paired = summary["differences"]["student_minus_baseline"]
    assert paired == {"accuracy": pytest.approx(0.2), "ci": pytest.approx([-0.048414, 0.448414], abs=1e-6)}
    assert summary["differences"]["student_minus_teacher"] == {"accuracy": 0.0, "ci": [0.0, 0.0]}


def test_a_probe_on_separable_features_is_always_right() -> None:
    # Class c has feature c at 4, the others at 0, with noise far below the gap; features the size of a normalised vector.
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(5).repeat_interleave(5)
    features = 4 * nn.functional.one_hot(labels, 16).float() + 0.3 * torch.randn(25, 16, generator=generator)
    asked = torch.arange(5).repeat_interleave(15)
    questions = 4 * nn.functional.one_hot(asked, 16).float() + 0.3 * torch.randn(75, 16, generator=generator)
    for episode in range(5):
        head = fit_linear(features, labels, 5, FitConfig(), 0, episode)
        assert num_correct(outputs(head, questions), asked) == 75


def test_a_probe_on_features_that_say_nothing_is_at_chance() -> None:
    right = 0
    labels, asked = torch.arange(4).repeat_interleave(5), torch.arange(4).repeat_interleave(15)
    for episode in range(40):
        generator = torch.Generator().manual_seed(episode)
        head = fit_linear(torch.randn(20, 16, generator=generator), labels, 4, FitConfig(), 0, episode)
        right += num_correct(outputs(head, torch.randn(60, 16, generator=generator)), asked)
    # 2,400 questions at 1/4: 600, sigma sqrt(2400 / 4 * 3 / 4) = 21.2.
    assert abs(right - 600) < 5 * 21.2


def test_a_head_is_a_function_of_its_key() -> None:
    features, labels = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 0, 1, 1, 2, 2])
    first = fit_linear(features, labels, 3, FitConfig(), 5, 1).weight
    torch.manual_seed(123)  # the global stream has no say
    assert torch.equal(fit_linear(features, labels, 3, FitConfig(), 5, 1).weight, first)
    assert not torch.equal(fit_linear(features, labels, 3, FitConfig(), 5, 2).weight, first)


def test_one_step_of_the_head_is_adamw_by_hand() -> None:
    # The last step's rate is min_lr, and one step has no other. AdamW's first step moves a weight by lr * sign(gradient), after
    # shrinking it by lr * decay. Two images, two classes, zero features but one: the gradient's signs are plain.
    fit = FitConfig(steps=1, warmup_steps=0, lr=0.5, min_lr=0.5, weight_decay=0.1, label_smoothing=0.0)
    features, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), torch.tensor([0, 1])
    start = nn.Linear(2, 2)
    fresh_head_(start, 3)
    head = fit_linear(features, labels, 2, fit, 3)
    moved = head.weight - start.weight * (1 - 0.5 * 0.1)
    assert torch.allclose(moved[:, 0], torch.tensor([0.5, -0.5]), atol=1e-4)  # towards class 0 for +1, class 1 for -1
    assert torch.allclose(moved[:, 1], torch.zeros(2), atol=1e-6)  # no feature, no gradient


def test_features_are_timms_pre_logits() -> None:
    args = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    for extra in ({}, {"global_pool": "avg", "class_token": False}):
        arch = VitArch("vit_tiny_patch16_224", {**args, **extra}, 3, 16)
        stage = build_stage(arch, StageSpan.whole(2), seed=0).eval()
        whole = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, **args, **extra).eval()
        whole.load_state_dict(stage.state_dict())
        images = pictures(3)
        expected = whole.forward_head(whole.forward_features(images), pre_logits=True)
        assert torch.equal(pre_logits(stage)(images), expected)
        assert torch.equal(stage.head(expected), whole(images))  # the model itself keeps its head
    # A V-MoE without experts is a timm ViT, key by key: its features are timm's too.
    dense = student(replace(ARCH, moe_blocks=()))
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=16, mlp_ratio=2.0, **args).eval()
    whole.load_state_dict(dense.state_dict())
    expected = whole.forward_head(whole.forward_features(pictures(3)), pre_logits=True)
    assert torch.allclose(outputs(pre_logits(dense), pictures(3)), expected, atol=1e-6)


def test_the_head_of_a_sparse_model_on_its_features_gives_its_logits() -> None:
    model = student()
    features = outputs(pre_logits(model), pictures(4))
    assert features.shape == (4, 16)
    assert torch.equal(model.head(features), outputs(model, pictures(4)))


def test_finetuning_trains_a_copy_and_repeats_exactly() -> None:
    model = student(drop_path=0.3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.arange(3).repeat_interleave(2)
    fit = FitConfig(protocol="finetune", steps=4, warmup_steps=1)
    state = torch.random.get_rng_state()
    trained = finetune(model, lambda step: pictures(6), labels, 3, fit, 0, 1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    assert not trained.training
    changed = {name for name, value in trained.state_dict().items() if not torch.equal(value, before[name])}
    assert {"patch_embed.proj.weight", "blocks.1.moe.experts.up_proj", "blocks.0.moe.router.weight", "head.weight"} <= changed
    torch.manual_seed(99)
    again = finetune(model, lambda step: pictures(6), labels, 3, fit, 0, 1).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in trained.state_dict().items())


def test_finetuning_learns_its_support() -> None:
    labels = torch.arange(3).repeat_interleave(4)
    images = pictures(12)
    fit = FitConfig(protocol="finetune", steps=60, lr=3e-3, drop_path=0.0)
    trained = finetune(student(), lambda step: images, labels, 3, fit, 0, 0)
    assert num_correct(outputs(trained, images), labels) == 12


def test_finetuning_adds_the_router_losses() -> None:
    # The weight of the Switch loss reaches the routers' gradient: without it in the loss, both would end the same.
    ends = []
    for weight in (0.0, 10.0):
        arch = replace(ARCH, router=RouterConfig(top_k=2, switch_weight=weight))
        fit = FitConfig(protocol="finetune", steps=3, warmup_steps=0, drop_path=0.0)
        trained = finetune(student(arch), lambda step: pictures(6), torch.arange(3).repeat_interleave(2), 3, fit, 0)
        ends.append(trained.state_dict()["blocks.1.moe.router.weight"])
    assert not torch.allclose(ends[0], ends[1])


def test_images_are_asked_for_at_every_step() -> None:
    asked: list[int] = []

    def images(step: int) -> Tensor:
        asked.append(step)
        return pictures(4, seed=step)

    finetune(student(), images, torch.tensor([0, 0, 1, 1]), 3, FitConfig(protocol="finetune", steps=3, warmup_steps=0), 0)
    assert asked == [0, 1, 2]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "at least one step"),
        ({"warmup_steps": 100}, "warmup_steps is 100"),
        ({"lr": 1e-6}, "lr not below min_lr"),
        ({"lr": math.inf}, "lr is inf"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5; allowed is 0 to 1"),
        ({"augment": True}, "--protocol finetune"),
    ],
)
def test_impossible_settings_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FitConfig(**wrong).check()  # type: ignore[arg-type]
