"""The loss of a teaching pair (arXiv 2402.16918 section 3): task + distillation; pure functions of logits.

    loss = (1 - kd_weight) * task(s, y) + kd_weight * KD(t, s)

Shape letters: B images, V classes. Everything is computed in fp32, whatever the dtype of the logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.config import DistillConfig


def soft_cross_entropy(logits_BV: Tensor, targets_BV: Tensor) -> Tensor:
    """Cross entropy against class probabilities (mixup and label smoothing make them soft), mean over the batch."""
    return -(targets_BV * F.log_softmax(logits_BV.float(), dim=-1)).sum(dim=-1).mean()


def soft_kd_loss(student_BV: Tensor, teacher_BV: Tensor, *, temperature: float, reduction: str) -> Tensor:
    """T^2 * KL(teacher || student) of the logits divided by the temperature T (Hinton et al. 2015).

    reduction `batchmean` divides the sum over images and classes by B. PAPER: `deit_numel` divides by B * V as the
    authors' code does (inherited from DeiT), which makes the term V times smaller.
    """
    log_student_BV = F.log_softmax(student_BV.float() / temperature, dim=-1)
    log_teacher_BV = F.log_softmax(teacher_BV.float() / temperature, dim=-1)
    total = F.kl_div(log_student_BV, log_teacher_BV, reduction="sum", log_target=True)
    count = {"batchmean": student_BV.shape[0], "deit_numel": student_BV.numel()}
    if reduction not in count:
        raise ValueError(f"kd_reduction {reduction!r}: allowed are {sorted(count)}")
    return total * (temperature**2 / count[reduction])


def hard_kd_loss(student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
    """Cross entropy with the teacher's most likely class, mean over the batch. Has no temperature (as in DeiT)."""
    return F.cross_entropy(student_BV.float(), teacher_BV.argmax(dim=-1))


@dataclass(frozen=True)
class PairLoss:
    """The loss of one pair and its unweighted parts; `kd` is None when no teacher is asked for."""

    total: Tensor
    task: Tensor
    kd: Tensor | None


def pair_loss(student_BV: Tensor, teacher_BV: Tensor | None, targets_BV: Tensor, config: DistillConfig) -> PairLoss:
    """Combine task and distillation loss; `teacher_BV` may be None only when `config.kd_weight` is 0 (the control)."""
    task = soft_cross_entropy(student_BV, targets_BV)
    if teacher_BV is None:
        if config.kd_weight > 0:
            raise ValueError(f"distill.kd_weight is {config.kd_weight} but the batch brings no teacher logits")
        return PairLoss(total=task, task=task, kd=None)
    if config.kd_type == "hard":
        kd = hard_kd_loss(student_BV, teacher_BV)
    else:
        kd = soft_kd_loss(student_BV, teacher_BV, temperature=config.temperature, reduction=config.kd_reduction)
    return PairLoss(total=(1.0 - config.kd_weight) * task + config.kd_weight * kd, task=task, kd=kd)


def logit_gradient_norms(student_BV: Tensor, teacher_BV: Tensor | None, targets_BV: Tensor, config: DistillConfig) -> dict[str, float]:
    """Norms of d(task)/d(logits) and d(kd)/d(logits): what each term really pulls with, before its weight.

    Works on a detached copy of the logits, so it costs a pass through the loss only (B x V numbers) and touches neither the
    model's graph nor the hooks that the engine has on it.
    """
    leaf_BV = student_BV.detach().float().requires_grad_()
    loss = pair_loss(leaf_BV, teacher_BV, targets_BV, config)
    norms = {}
    for name, term in (("task", loss.task), ("kd", loss.kd)):
        if term is not None:
            (grad_BV,) = torch.autograd.grad(term, leaf_BV)
            norms[f"{name}_grad_norm"] = float(grad_BV.norm())  # host sync: call only on logged steps
    return norms
