"""AdamW and its parameter groups: which weights decay."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.distributed.expert_parallel import parallel_layers

UNDECAYED_LEAVES = ("cls_token", "dist_token", "reg_token", "mask_token", "pos_embed", "latent")
"""Last parts of the names of tokens, positions and pooling queries; timm's spelling."""


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay pulls on this parameter: matrices and convolutions do, the rest does not.

    The rest: vectors (norms, biases, layer scales), the experts' stacked biases [E, F] and [E, D], tokens, positions.
    """
    leaf = name.rsplit(".", 1)[-1]
    return parameter.ndim > 1 and not leaf.endswith("bias") and leaf not in UNDECAYED_LEAVES


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters of `module`, each in exactly one group, in the module's order.

    Groups hold `name` (`decay` | `no_decay`), `names` (of the parameters), `params` and `weight_decay`; an empty group is
    left out. Experts that are spread over ranks get two groups of their own, with what DeepSpeed asks of those: `moe`, and as `name`
    that of the process groups. Raises ValueError when nothing is trainable.
    """
    groups: list[dict[str, Any]] = [
        {"name": "decay", "names": [], "params": [], "weight_decay": weight_decay},
        {"name": "no_decay", "names": [], "params": [], "weight_decay": 0.0},
    ]
    spread = {f"{layer}.{leaf}": e.groups for layer, e in parallel_layers(module).items() for leaf, _ in e.named_parameters()}
    if spread:
        experts = next(iter(spread.values()))
        groups += [{**group, "name": experts.name, "names": [], "params": [], "moe": True, "experts": experts} for group in groups]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            group = groups[(0 if decays(name, parameter) else 1) + (2 if name in spread else 0)]
            group["names"].append(name)
            group["params"].append(parameter)
    used = [group for group in groups if group["params"]]
    if not used:
        raise ValueError(f"{type(module).__name__} has no parameter with requires_grad: there is nothing to train")
    return used


def build_adamw(module: nn.Module, phase: PhaseConfig) -> torch.optim.AdamW:
    """torch's AdamW over `param_groups`; its learning rate is a start value that the engine overwrites at every step."""
    # One kernel instead of ten over the whole flat partition. Where there is no GPU, the plain form stays the tested one.
    fused = torch.cuda.is_available()
    return torch.optim.AdamW(param_groups(module, phase.weight_decay), lr=phase.lr, betas=phase.betas, eps=phase.eps, fused=fused)
