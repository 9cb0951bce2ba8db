"""Checkpoints made by hand for tests (and a hostile one): the state of a small model, cut for any cluster by plain tensor operations.

`cut` is the oracle of the layouts: it pads, chunks and concatenates whole tensors, and knows no spans.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.saves.manifest import hash_files, write_manifest
from m2mkd_ds.checkpoint.state.layout import LAYOUTS
from m2mkd_ds.checkpoint.state.rank_files import Description, Parameter, write_rank_file

EXPERTS = 4
SHAPES = {
    "cls_token": (1, 1, 5),
    "blocks.0.attn.qkv.weight": (15, 5),
    "blocks.0.moe.experts.up_proj": (EXPERTS, 7, 5),
    "blocks.0.moe.experts.up_proj_bias": (EXPERTS, 7),
    "blocks.0.moe.router.weight": (EXPERTS, 5),
    "head.weight": (3, 5),
    "head.bias": (3,),
}
"""In the module's order: experts lie between the others."""
DECAYED = ("blocks.0.attn.qkv.weight", "blocks.0.moe.experts.up_proj", "blocks.0.moe.router.weight", "head.weight")
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
State = dict[str, dict[str, Tensor]]


def make_state(seed: int = 0) -> State:
    """Random whole tensors by kind and name."""
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in KINDS}


def cut(tensors: list[Tensor], kind: str, size: int) -> list[Tensor]:
    """The parts of `size` ranks, by padding and chunking whole tensors."""
    if kind == "flat":
        row = torch.cat([t.flatten() for t in tensors])
        width = -(-row.numel() // (2 * size)) * 2
        return list(torch.nn.functional.pad(row, (0, width * size - row.numel())).chunk(size))
    columns = []
    for t in tensors:
        width = -(-t.numel() // size)
        columns.append(torch.nn.functional.pad(t.flatten(), (0, width * size - t.numel())).chunk(size))
    return [torch.cat([column[part] for column in columns]) for part in range(size)]


def groups_of(ep_size: int) -> list[tuple[list[str], int]]:
    """(names, over how many ranks they are spread) of the optimizer's groups, as AdamW's groups are built here."""
    found = []
    for spread in (False, True):
        for decayed in (False, True):  # cls_token comes first in the module, and does not decay
            names = [n for n in SHAPES if (n in DECAYED) == decayed and ("experts" in n and ep_size > 1) == spread]
            if names:
                found.append((names, ep_size if spread else 1))
    return found


def describe_by_hand(ep_size: int, data_size: int, zero_stage: int) -> Description:
    kind, size = "parted" if zero_stage == 3 else "flat", ep_size * data_size
    groups = []
    for names, spread in groups_of(ep_size):
        shapes = tuple(torch.Size((SHAPES[n][0] // spread, *SHAPES[n][1:])) for n in names)
        part_numel = cut([torch.zeros(s) for s in shapes], kind, size // spread)[0].numel()
        groups.append(LAYOUTS[kind](tuple(names), shapes, part_numel, 0, size // spread, 0, spread))
    parameters = tuple(Parameter(n, shape, int(n in DECAYED), "experts" in n) for n, shape in SHAPES.items())
    return Description(size, zero_stage, KINDS, parameters, tuple(groups))


def make_checkpoint(folder: Path, state: State, *, ep_size: int, data_size: int, zero_stage: int = 1, step: int = 7) -> Path:
    """Write a committed checkpoint of `state` as ep_size * data_size ranks would."""
    folder.mkdir(parents=True)
    description = describe_by_hand(ep_size, data_size, zero_stage)
    once = {"scalar.step": torch.tensor(7.0), "shared.blocks.0.moe.router.balance_bias": torch.arange(4.0), "shared.calls": torch.tensor(9)}
    for rank in range(description.size):
        tensors = dict(once) if rank == 0 else {}
        for index, (names, spread) in enumerate(groups_of(ep_size)):
            for kind in KINDS:
                shares = [state[kind][name].chunk(spread)[rank % spread] for name in names]
                parts = cut(shares, "parted" if zero_stage == 3 else "flat", description.size // spread)
                tensors[f"group{index}.{kind}"] = parts[rank // spread].contiguous()
        write_rank_file(folder, description, rank, tensors)
    record = {"step": step, "fingerprint": "f", "global_batch_size": 32, "stream": {"seed": 0}}
    write_manifest(folder, step, record, attempt="by hand", files=hash_files(folder))
    return folder


class Bomb:
    """Unpickling it makes a folder."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.canary),)
