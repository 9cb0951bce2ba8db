"""One forward pass and its loss, for each kind of training: batch in, StepOutput(loss, metrics) out. No state.

supervised   pretrain_meta, assemble_finetune, end_to_end, baseline      task loss of a whole model
aligned      pretrain_meta for a pretrained teacher                      task loss + match of the hidden states
pair         modular_train, m2mkd                                        the loss of a teaching pair (distill.losses)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.config import DistillConfig
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.losses import logit_gradient_norms, pair_loss, soft_cross_entropy
from m2mkd_ds.distill.pairs import TeachingPair
from m2mkd_ds.models.meta import run_stages
from m2mkd_ds.models.vmoe import VMoEOutput
from m2mkd_ds.moe.telemetry import summarise
from m2mkd_ds.teacher.feed import TeacherBatch

Forward = Callable[[Tensor], Any]
"""A module, or an engine around one: hidden states or images in."""


@dataclass(frozen=True)
class StepOutput:
    """`loss` to run backward from, `metrics` as plain numbers (filled on logged steps only: reading them syncs the device)."""

    loss: Tensor
    metrics: dict[str, Any]
    load: dict[int, Tensor] = field(default_factory=dict)
    """Choices of each expert by block, int64 [E], at every step: what loss-free balancing counts. Never read on the host here."""


def unpack(output: Tensor | list[Tensor] | VMoEOutput) -> tuple[Tensor, Mapping[str, Tensor], Mapping[int, Any]]:
    """(output, router losses, routing statistics by block) of a dense stage, of a meta model that shows its boundaries (its last
    entry: the logits), or of a V-MoE module."""
    if isinstance(output, VMoEOutput):
        return output.output, output.router_losses, output.stats
    return output[-1] if isinstance(output, list) else output, {}, {}


def router_total(losses: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Sum of the (already weighted) router losses; a zero when there are none."""
    return torch.stack([value.float() for value in losses.values()]).sum() if losses else like.new_zeros((), dtype=torch.float32)


def supervised_step(forward: Forward, batch: TeacherBatch, *, log: bool) -> StepOutput:
    """Task loss of a whole model on the images."""
    logits_BV, router_losses, stats = unpack(forward(batch.hidden[0]))
    task = soft_cross_entropy(logits_BV, batch.targets_BV)
    loss = task + router_total(router_losses, task)
    metrics = {**_numbers(loss=loss, task=task), **_router_metrics(router_losses, stats)} if log else {}
    return StepOutput(loss, metrics, _loads(stats))


def pair_step(
    forward: Forward, pair: TeachingPair, meta: FrozenMeta, batch: TeacherBatch, config: DistillConfig, *, log: bool
) -> StepOutput:
    """Loss of one pair: the module on h_i, the frozen meta suffix behind it, then task and distillation loss."""
    output, router_losses, stats = unpack(forward(batch.hidden[pair.index]))
    logits_BV = meta.suffix(pair, output)
    teacher_BV = batch.teacher_logits.get(pair.index)
    losses = pair_loss(logits_BV, teacher_BV, batch.targets_BV, config)
    loss = losses.total + router_total(router_losses, losses.total)
    if not log:
        return StepOutput(loss, {}, _loads(stats))
    terms = {"loss": loss, "task": losses.task} | ({"kd": losses.kd} if losses.kd is not None else {})
    metrics = {**_numbers(**terms), **_router_metrics(router_losses, stats)}
    norms = logit_gradient_norms(logits_BV, teacher_BV, batch.targets_BV, config)
    return StepOutput(loss, {**metrics, **norms}, _loads(stats))


def aligned_step(
    forward: Callable[[Tensor], list[Tensor]], teacher_stages: list[nn.Module], batch: TeacherBatch, weight: float, *, log: bool
) -> StepOutput:
    """Task loss of the meta model plus `weight` times the mean, over stage boundaries, of the normalised squared distance.

    `forward` returns the meta model's hidden state after each stage (the last entry: logits). The distance at boundary i
    is MSE(meta_i, teacher_i) / Var(teacher_i), so that boundaries of different scale count alike.
    """
    meta_states = forward(batch.hidden[0])
    task = soft_cross_entropy(meta_states[-1], batch.targets_BV)
    distances = []
    with torch.no_grad():
        teacher_states = run_stages(teacher_stages[:-1], batch.hidden[0])
    for meta_BLD, teacher_BLD in zip(meta_states[:-1], teacher_states, strict=True):
        target_BLD = teacher_BLD.float()
        distances.append(F.mse_loss(meta_BLD.float(), target_BLD) / target_BLD.var())
    align = torch.stack(distances).mean() if distances else task.new_zeros(())
    loss = task + weight * align
    return StepOutput(loss, _numbers(loss=loss, task=task, align=align) if log else {})


def _numbers(**terms: Tensor) -> dict[str, float]:
    return {name: float(term.detach()) for name, term in terms.items()}  # host sync


def _loads(stats: Mapping[int, Any]) -> dict[int, Tensor]:
    return {block: layer.load_E for block, layer in stats.items()}


def _router_metrics(losses: Mapping[str, Tensor], stats: Mapping[int, Any]) -> dict[str, Any]:
    return {**{f"router/{name}": value for name, value in _numbers(**losses).items()}, **summarise(stats)}
