"""Small models with the module tree, and so the key names, of the older releases; written for the tests, float64.

The trees are facts of Deep Incubation, m2mKD (vmoe.py) and fastmoe (transformer.py, gates); the forward passes are the plainest ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS = 2


class ExpertLinear(nn.Module):
    """`n` linear maps with a leading expert axis."""

    def __init__(self, n: int, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n, out_dim, in_dim) * 0.3)
        self.bias = nn.Parameter(torch.randn(n, out_dim) * 0.3)


class ExpertPair(nn.Module):
    def __init__(self, n: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.htoh4 = ExpertLinear(n, dim, hidden)
        self.h4toh = ExpertLinear(n, hidden, dim)

    def one(self, e: int, x: Tensor) -> Tensor:
        x = F.gelu(x @ self.htoh4.weight[e].T + self.htoh4.bias[e])
        return x @ self.h4toh.weight[e].T + self.h4toh.bias[e]


class Gate(nn.Module):
    def __init__(self, dim: int, n: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, n)


class FastMoE(nn.Module):
    """Top-2 of the raw logits, softmax over the two, a token at a time; experts fused or a list of single ones."""

    def __init__(self, dim: int, hidden: int, n: int, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.experts = ExpertPair(n, dim, hidden) if fused else nn.ModuleList([ExpertPair(1, dim, hidden) for _ in range(n)])
        self.gate = Gate(dim, n)

    def forward(self, x_BLD: Tensor) -> Tensor:
        out = torch.zeros_like(x_BLD)
        for b in range(x_BLD.shape[0]):
            for t in range(x_BLD.shape[1]):
                value, ids = self.gate.gate(x_BLD[b, t]).topk(2)
                for weight, e in zip(value.softmax(0), ids.tolist(), strict=True):
                    y = self.experts.one(e, x_BLD[b, t]) if self.fused else self.experts[e].one(0, x_BLD[b, t])
                    out[b, t] += weight * y
        return out


class Attention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor) -> Tensor:
        b, n, d = x_BLD.shape
        q, k, v = self.qkv(x_BLD).reshape(b, n, 3, HEADS, d // HEADS).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.mT) * (d // HEADS) ** -0.5).softmax(-1).matmul(v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def stitch(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(ln=nn.LayerNorm(in_dim), fc=nn.Linear(in_dim, out_dim)))


class Block(nn.Module):
    """A transformer block with the stitch layers inside, where there are any."""

    def __init__(self, dim: int, experts: int, fused: bool, pre: int, post: int) -> None:
        super().__init__()
        self.pre_stitch = stitch(pre, dim) if pre else None
        self.norm1, self.attn = nn.LayerNorm(dim, eps=1e-6), Attention(dim)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        if experts:
            self.moe = FastMoE(dim, 2 * dim, experts, fused)
        else:
            self.mlp = Mlp(dim, 2 * dim)
        self.post_stitch = stitch(dim, post) if post else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre_stitch(x) if self.pre_stitch else x
        x = x + self.attn(self.norm1(x))
        x = x + (self.moe if hasattr(self, "moe") else self.mlp)(self.norm2(x))
        return self.post_stitch(x) if self.post_stitch else x


class LegacyModel(nn.Module):
    """A model whose blocks and ends are registered twice, under `blocks` and under `stages`."""

    def __init__(
        self,
        depths: Sequence[int],
        *,
        dim: int = 8,
        moe: Sequence[int] = (),
        experts: int = 3,
        fused: bool = True,
        pre: Sequence[int] = (),
        post: Sequence[int] = (),
        stitch_dim: int = 12,
        first: bool = True,
        last: bool = True,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Module() for _ in depths])
        self.first, self.last = first, last
        if first:
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, dim, 4, 4)
            self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
            self.pos_embed = nn.Parameter(torch.randn(1, 5, dim))
        self.blocks = nn.ModuleList(
            [
                Block(dim, experts if i in moe else 0, fused, stitch_dim if i in pre else 0, stitch_dim if i in post else 0)
                for i in range(sum(depths))
            ]
        )
        if last:
            self.norm, self.head = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, 7)
        ids = iter(range(sum(depths)))
        for depth, stage in zip(depths, self.stages, strict=True):
            stage.blocks = nn.ModuleList([self.blocks[next(ids)] for _ in range(depth)])
        if first:
            self.stages[0].pos_embed, self.stages[0].cls_token = self.pos_embed, self.cls_token
            self.stages[0].patch_embed = self.patch_embed
        if last:
            self.stages[-1].norm, self.stages[-1].head = self.norm, self.head
        # Norms and biases start as ones and zeros, which would hide a mix-up.
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), 1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0]) if self.last else x

    def checkpoint(self) -> dict[str, object]:
        """What their trainers save."""
        optimizer = torch.optim.AdamW(self.parameters())
        return {
            "model": self.state_dict(),
            "model_stages": [stage.state_dict() for stage in self.stages],
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": {"base_values": [0.1]},
            "epoch": 99,
            "scaler": {},
        }


DEPTHS = (2, 1, 3)
"""Blocks 0-1, 2, 3-5: uneven, so that a mistaken offset cannot pass."""


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def student(stage: int, *, fused: bool) -> LegacyModel:
    """The authors' file for one student stage: blocks from 0, stitches at the inner ends, every block sparse."""
    n, depth = len(DEPTHS), DEPTHS[stage]
    return LegacyModel(
        [depth],
        moe=range(depth),
        fused=fused,
        pre=[0] if stage else [],
        post=[depth - 1] if stage < n - 1 else [],
        first=stage == 0,
        last=stage == n - 1,
    )


def module_files(model: LegacyModel) -> list[dict[str, Any]]:
    return [
        {"model_name": "vit_x", "block_index": i, "block_state_dict": stage.state_dict(), "divided_depths": list(DEPTHS)}
        for i, stage in enumerate(model.stages)
    ]
