"""distill/losses.py against numbers worked out by hand and against fp64 formulas written out here."""

import math

import pytest
import torch

from m2mkd_ds.config import DistillConfig
from m2mkd_ds.distill.losses import hard_kd_loss, logit_gradient_norms, pair_loss, soft_cross_entropy, soft_kd_loss

LN3 = math.log(3.0)


def test_soft_cross_entropy_of_two_classes_by_hand() -> None:
    # softmax([ln 3, 0]) = [3/4, 1/4]; target [1/2, 1/2] -> -(ln(3/4) + ln(1/4)) / 2
    logits = torch.tensor([[LN3, 0.0]])
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert soft_cross_entropy(logits, torch.tensor([[0.5, 0.5]])).item() == pytest.approx(expected, rel=1e-6)


def test_soft_kd_by_hand_for_both_reductions() -> None:
    # teacher softmax([ln 3, 0]) = [3/4, 1/4], student uniform [1/2, 1/2]:
    # KL(teacher || student) = 3/4 ln(3/2) + 1/4 ln(1/2), the same for both images of the batch
    teacher = torch.tensor([[LN3, 0.0], [LN3, 0.0]])
    student = torch.zeros(2, 2)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    batchmean = soft_kd_loss(student, teacher, temperature=1.0, reduction="batchmean")
    numel = soft_kd_loss(student, teacher, temperature=1.0, reduction="deit_numel")
    assert batchmean.item() == pytest.approx(kl, rel=1e-6)
    assert numel.item() == pytest.approx(kl / 2, rel=1e-6)  # divided by B * C = 4 instead of B = 2


def test_temperature_softens_both_sides_and_scales_by_its_square() -> None:
    # with T = 2 and logits 2 ln 3 the softened teacher is again [3/4, 1/4]; the loss is T^2 = 4 times the KL
    teacher = torch.tensor([[2 * LN3, 0.0]])
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    loss = soft_kd_loss(torch.zeros(1, 2), teacher, temperature=2.0, reduction="batchmean")
    assert loss.item() == pytest.approx(4 * kl, rel=1e-6)


def test_kl_goes_from_teacher_to_student_and_not_back() -> None:
    teacher, student = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    p, q = teacher.double().softmax(-1), student.double().softmax(-1)
    forward = (p * (p / q).log()).sum().item()
    backward = (q * (q / p).log()).sum().item()
    assert abs(forward - backward) > 0.1  # the example tells them apart
    assert soft_kd_loss(student, teacher, temperature=1.0, reduction="batchmean").item() == pytest.approx(forward, rel=1e-5)


def test_hard_kd_is_cross_entropy_with_the_teachers_class() -> None:
    # teacher says class 1; student softmax([0, ln 3]) = [1/4, 3/4]
    loss = hard_kd_loss(torch.tensor([[0.0, LN3]]), torch.tensor([[-1.0, 5.0]]))
    assert loss.item() == pytest.approx(-math.log(0.75), rel=1e-6)


def test_unknown_reduction_names_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match="batchmean"):
        soft_kd_loss(torch.zeros(1, 2), torch.zeros(1, 2), temperature=1.0, reduction="mean")


def test_pair_loss_weighs_task_and_kd() -> None:
    student, teacher = torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([[1.0, 0.0, -1.0]])
    targets = torch.tensor([[0.0, 1.0, 0.0]])
    losses = pair_loss(student, teacher, targets, DistillConfig(kd_weight=0.25, temperature=3.0))
    assert losses.kd is not None
    assert losses.total.item() == pytest.approx(0.75 * losses.task.item() + 0.25 * losses.kd.item(), rel=1e-6)


def test_kd_weight_zero_is_the_plain_task_loss_and_needs_no_teacher() -> None:
    student, targets = torch.randn(4, 3), torch.eye(3)[[0, 1, 2, 0]]
    losses = pair_loss(student, None, targets, DistillConfig(kd_weight=0.0))
    assert losses.kd is None
    assert torch.equal(losses.total, soft_cross_entropy(student, targets))
    with pytest.raises(ValueError, match="no teacher logits"):
        pair_loss(student, None, targets, DistillConfig(kd_weight=0.5))


def test_logit_gradient_norms_follow_the_closed_forms() -> None:
    # d CE / d logits = (softmax(s) - y) / B; d KD / d logits = T (softmax(s/T) - softmax(t/T)) / B (batchmean)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(6, 5, generator=generator), torch.randn(6, 5, generator=generator)
    targets = torch.eye(5)[torch.tensor([0, 1, 2, 3, 4, 0])]
    norms = logit_gradient_norms(student, teacher, targets, DistillConfig(temperature=2.0))
    s, t = student.double(), teacher.double()
    task = ((s.softmax(-1) - targets) / 6).norm().item()
    kd = (2.0 * ((s / 2).softmax(-1) - (t / 2).softmax(-1)) / 6).norm().item()
    assert norms == pytest.approx({"task_grad_norm": task, "kd_grad_norm": kd}, rel=1e-5)


def test_gradient_norms_leave_the_models_graph_alone() -> None:
    student = torch.randn(2, 3, requires_grad=True)
    logit_gradient_norms(student, torch.randn(2, 3), torch.eye(3)[[0, 1]], DistillConfig())
    assert student.grad is None
