"""How a model learns an episode: a new linear head on frozen features, or the whole model; settings are in few_shot_config.py.

Both train on all support images at every step. Shape letters: B images, D width, V = k classes of the episode.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.data.mix import soft_targets
from m2mkd_ds.distill.losses import soft_cross_entropy
from m2mkd_ds.train.few_shot.config import FitConfig
from m2mkd_ds.train.optim import param_groups
from m2mkd_ds.train.schedule import lr_at
from m2mkd_ds.train.steps import router_total, unpack

EVAL_BATCH = 256


def fresh_head_(head: nn.Linear, *key: int) -> None:
    """timm's start of a head (truncated normal of std 0.02, zero bias), as a function of `key` and the head's shape."""
    generator = torch.Generator().manual_seed(_number("head", *key))
    weight = torch.empty(head.weight.shape)
    nn.init.trunc_normal_(weight, std=0.02, generator=generator)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()


def fit_linear(features_BD: Tensor, labels_B: Tensor, ways: int, fit: FitConfig, *key: int) -> nn.Linear:
    """A head of `ways` classes, trained on the features; its start depends on `key` (seed, episode) only."""
    head = nn.Linear(features_BD.shape[1], ways).to(features_BD.device)
    fresh_head_(head, *key)
    _train(head, lambda step: features_BD, labels_B, ways, fit, clip_grad=0.0, key=key)
    return head


def finetune(model: nn.Module, images: Callable[[int], Tensor], labels_B: Tensor, ways: int, fit: FitConfig, *key: int) -> nn.Module:
    """A copy of `model` (with a head of `ways` classes, which is made fresh), trained in full; `images(step)` are its inputs.

    Router losses are added to the loss. Drop-path and router noise depend on `key` and the step only. Returned in evaluation mode.
    """
    trained = copy.deepcopy(model).requires_grad_(True).train()
    fresh_head_(trained.get_submodule("head"), *key)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[labels_B.device] if labels_B.device.type == "cuda" else []):
        _train(trained, images, labels_B, ways, fit, clip_grad=fit.clip_grad, key=key)
    return trained.eval()


def _train(
    model: nn.Module, inputs: Callable[[int], Tensor], labels_B: Tensor, ways: int, fit: FitConfig, *, clip_grad: float, key: Sequence[int]
) -> None:
    groups: list[dict[str, Any]] = param_groups(model, fit.weight_decay)
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW([{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups], lr=fit.peak)
    targets_BV = soft_targets(labels_B.cpu(), ways, fit.label_smoothing).to(labels_B.device)
    for step in range(fit.steps):
        if fit.protocol == "finetune":
            torch.manual_seed(_number("step", *key, step))
        rate = lr_at(step, total_steps=fit.steps, warmup_steps=fit.warmup_steps, peak=fit.peak, min_lr=fit.min_lr, warmup_lr=fit.warmup_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits_BV, router_losses, _ = unpack(model(inputs(step)))
        task = soft_cross_entropy(logits_BV, targets_BV)
        optimizer.zero_grad(set_to_none=True)
        (task + router_total(router_losses, task)).backward()
        if clip_grad:
            nn.utils.clip_grad_norm_(parameters, clip_grad)
        optimizer.step()


@torch.no_grad()
def outputs(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """What the model gives for the images, in batches of EVAL_BATCH: logits, or features where its head is an identity."""
    return torch.cat([unpack(model(images_bCHW))[0].float() for images_bCHW in images_BCHW.split(EVAL_BATCH)])


def num_correct(logits_BV: Tensor, labels_B: Tensor) -> int:
    """Images whose largest logit is that of their label."""
    return int((logits_BV.argmax(dim=1) == labels_B).sum())  # host sync


def _number(purpose: str, *key: int) -> int:
    """63 bits from a purpose and whole numbers, the same on every machine."""
    digest = hashlib.blake2b("/".join(map(str, (purpose, *key))).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
