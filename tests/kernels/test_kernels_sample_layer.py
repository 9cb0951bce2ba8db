"""The launches that are built and timed are those of a layer: they run, and their operations add up."""

from __future__ import annotations

import pytest
import torch

from m2mkd_kernels.configs import TABLE, TileConfig, choose_tiles
from m2mkd_kernels.sample_layer import LayerSize, sample_launches


def test_every_sample_launch_runs(device: torch.device) -> None:
    size = LayerSize(num_tokens=6, top_k=2, num_experts=3, dim=16, hidden=32)
    names = []
    for sample in sample_launches(torch.float32, size=size, device=device.type):
        sample.launch.run()
        names.append(sample.name)
    assert len(set(names)) == len(names) == 19


def test_operations_of_the_matrix_products_add_up() -> None:
    # Forward two products, backward four, of 2*T*k*d*f each: 12 * 2 * 25216 * 768 * 3072 = 1.4278e12.
    gelu = [s for s in sample_launches(torch.bfloat16) if s.kernel and s.op == "expert_layer" and "swiglu" not in s.name]
    assert [s.name for s in gelu] == ["up gelu", "act_grad gelu", "down", "rows grad", "down grad", "up grad"]
    assert sum(s.flops for s in gelu) == 12 * 2 * 25216 * 768 * 3072


def test_the_given_tiles_reach_the_launches() -> None:
    tiles = TileConfig(64, 64, 32, 2, 4, 2)
    for sample in sample_launches(torch.bfloat16, {"weight_grad": tiles}):
        if sample.kernel:
            given = sample.launch.constants["BLOCK_M"], sample.launch.constants["BLOCK_K"], sample.launch.constants["GROUP_M"]
            assert (given == (64, 32, 2)) == (sample.kernel == "weight_grad"), sample.name


@pytest.mark.parametrize(("num_rows", "size"), [(512, "small"), (513, "large")])
def test_few_rows_a_group_get_the_small_tiles(num_rows: int, size: str) -> None:
    # 64 rows a group and less are few: with 8 groups, up to 512 rows.
    assert choose_tiles("gemm", torch.bfloat16, num_rows, 8) == TABLE["gemm", "half", size]  # type: ignore[index]
    assert choose_tiles("gemm", torch.float32, num_rows, 8) == TABLE["gemm", "float", size]  # type: ignore[index]
