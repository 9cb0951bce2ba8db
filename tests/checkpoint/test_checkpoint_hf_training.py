"""Fine-tuning an exported model: losses and gradients are the training code's, and transformers' Trainer works with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from tests.checkpoint.exported_models import ARCH, IMAGES, export, make_model


class Poison(torch.autograd.Function):
    """Rows beyond the last offset hold NaN, forward and backward, as torch's grouped matmul may leave them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: Tensor) -> Tensor:
        ctx.end = int(end)
        return torch.cat([rows[: ctx.end], torch.full_like(rows[ctx.end :], float("nan"))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grads[0][: ctx.end], torch.full_like(grads[0][ctx.end :], float("nan"))]), None


def test_gradients_of_a_tight_capacity_are_those_of_the_training_code(tmp_path: Path, auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.grouped_mm

    def poisoned(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        return Poison.apply(plain(Poison.apply(rows, offs[-1]).nan_to_num(), weight, offs=offs), offs[-1])

    router = dataclasses.replace(ROUTER_PRESETS["switch"], capacity_factor=0.6)
    model = make_model(dataclasses.replace(ARCH, router=router, backend="reference")).train()
    labels = torch.tensor([0, 4, 2])
    out = model(IMAGES)
    assert all(0 < float(stats.drop_rate) < 1 for stats in out.stats.values())
    (torch.nn.functional.cross_entropy(out.output, labels) + sum(out.router_losses.values())).backward()
    for backend in ("loop", "grouped", "poisoned"):
        if backend == "poisoned":
            monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
        exported = auto(export(model, tmp_path / backend), expert_backend="loop" if backend == "loop" else "grouped").train()
        exported(IMAGES, labels=labels).loss.backward()
        theirs = dict(exported.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=f"{backend} {name}")


def test_loss_in_training_mode_has_the_router_losses(tmp_path: Path, auto: Any) -> None:
    router = RouterConfig(importance_weight=0.3, switch_weight=0.2, z_weight=0.1)
    model = make_model(dataclasses.replace(ARCH, router=router))
    exported = auto(export(model, tmp_path / "out"))
    labels = torch.tensor([0, 4, 2])
    out = model(IMAGES)
    task = torch.nn.functional.cross_entropy(out.output, labels)
    torch.testing.assert_close(exported(IMAGES, labels=labels).loss, task)
    loss = exported.train()(IMAGES, labels=labels).loss
    torch.testing.assert_close(loss, task + sum(out.router_losses.values()))
    (task + sum(out.router_losses.values())).backward()
    loss.backward()
    theirs = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_of_vmoes_router_in_training_mode_has_noise_and_load_loss(tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, router=ROUTER_PRESETS["vmoe"], backend="reference")).train()
    exported = auto(export(model, tmp_path / "out")).train()
    labels = torch.tensor([0, 4, 2])
    torch.manual_seed(7)  # both draw the noise of block after block
    out = model(IMAGES)
    assert set(out.router_losses) == {"importance", "load"}
    task = torch.nn.functional.cross_entropy(out.output, labels)
    torch.manual_seed(7)
    torch.testing.assert_close(exported(IMAGES, labels=labels).loss, task + sum(out.router_losses.values()))
