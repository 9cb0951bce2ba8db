"""Bytes counted on the meta device against torch's own allocator, and by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2mkd_ds.bench.live_memory import watch
from m2mkd_ds.config import ROUTER_PRESETS
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch
from m2mkd_ds.models.vit import build_stage, empty_stage
from m2mkd_ds.models.vmoe import Attention, VisionMoE, VMoEArch, VMoEOutput
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.planner.live_bytes import LiveBytes
from m2mkd_ds.planner.shapes_of_experts import ShapedExperts, prepare_experts_

IMAGES, SIZE = 4, 32


def loss_of(output: Tensor | VMoEOutput) -> Tensor:
    if isinstance(output, VMoEOutput):
        return output.output.logsumexp(-1).mean() + sum(output.router_losses.values(), torch.zeros((), device=output.output.device))
    return output.logsumexp(-1).mean()


def counted(module: nn.Module) -> tuple[int, int]:
    """(alive after the forward pass, peak of both passes) on the meta device."""
    with LiveBytes(module.parameters()) as live:
        loss = loss_of(module(torch.empty(IMAGES, 3, SIZE, SIZE, device="meta")))
        saved = live.now
        loss.backward()
        return saved, live.peak


def allocated(module: nn.Module) -> tuple[int, int]:
    """The same by the allocator."""
    drawn_BCHW = torch.randn(IMAGES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with watch() as live:
        images_BCHW = drawn_BCHW.clone()
        loss = loss_of(module(images_BCHW))
        live.mark("backward")
        loss.backward()
    peaks = {name: (at, peak) for name, at, peak in live.peaks}
    return peaks["backward"][0], max(peak for _, peak in peaks.values())


def test_a_dense_vit_keeps_to_the_byte_what_the_allocator_hands_out() -> None:
    arch = VitArch("vit_tiny_patch16_224", {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}, 10, SIZE)
    span = StageSpan.whole(2)
    assert counted(empty_stage(arch, span).train()) == allocated(build_stage(arch, span, seed=0).train())


@pytest.mark.parametrize("backend", ["fused", "loop"])
@pytest.mark.parametrize("preset", ["fastmoe", "vmoe", "expert_choice"])
def test_a_v_moe_keeps_what_the_allocator_hands_out_within_three_percent(preset: str, backend: str) -> None:
    # Not to the byte: real routing is not even, so the largest block of rows is another one, and a capacity drops some rows.
    arch = VMoEArch(
        image_size=SIZE, patch_size=8, num_classes=10, embed_dim=64, num_heads=2, mlp_ratio=4, num_blocks=2, moe_blocks=(0, 1),
        num_experts=4, router=ROUTER_PRESETS[preset], backend=backend,
    )  # fmt: skip
    shapes = VisionMoE(arch, StageSpan.whole(2), seed=None).train()
    prepare_experts_(shapes, backend, 1)
    torch.manual_seed(0)
    real = allocated(VisionMoE(replace(arch), StageSpan.whole(2), seed=0).train())
    assert counted(shapes) == pytest.approx(real, rel=0.03)


def test_attention_keeps_no_scores() -> None:
    b, length, d, heads = 2, 50, 32, 4
    with torch.device("meta"):
        attention = Attention(d, heads)
    with LiveBytes(attention.parameters()) as live:
        y = attention(torch.empty(b, length, d, device="meta"))
        # Input, qkv (three times as wide), the output of the kernel, that of the projection, one fp32 number a head and row. The
        # scores alone would be heads * length = 200 numbers a row.
        assert live.now == 4 * b * length * (d + 3 * d + d + d + heads)
        del y
        assert live.now == 0  # the input had no other name


def test_views_cost_nothing_and_what_is_released_counts_no_more() -> None:
    given = torch.empty(100, device="meta")
    with LiveBytes([given]) as live:
        x = given.view(10, 10).t() * 2.0
        y = x[3:]
        assert (live.now, live.peak) == (400, 400)  # one product; views of it and of what was given are free
        del x
        assert live.now == 400  # y holds it
        del y
        assert (live.now, live.peak) == (0, 400)
        assert live.take_peak() == 400
        assert live.peak == 0


def with_experts_of(ep_size: int, call: Callable[[nn.Module], int]) -> int:
    arch = VMoEArch(
        image_size=SIZE, patch_size=8, num_classes=10, embed_dim=64, num_heads=2, mlp_ratio=4, num_blocks=1, moe_blocks=(0,),
        num_experts=4, router=ROUTER_PRESETS["fastmoe"],
    )  # fmt: skip
    module = VisionMoE(arch, StageSpan.whole(1), seed=None)
    prepare_experts_(module, "loop", ep_size)
    return call(module)


def test_spread_experts_hold_a_share_of_the_weights_and_buffers_of_the_exchange() -> None:
    whole, half = (with_experts_of(ep, lambda m: sum(p.numel() for p in m.parameters())) for ep in (1, 2))
    # Two of four experts are elsewhere: each 64 x 256 twice, and biases of 256 and 64.
    assert whole - half == 2 * (2 * 64 * 256 + 256 + 64)
    saved, saved_spread = (with_experts_of(ep, lambda m: counted(m)[0]) for ep in (1, 2))
    rows = IMAGES * 17 * 2
    # More: the order of the rows, forth and back, int64, and the ends of the experts' rows, four int32. The gathered rows themselves
    # are there in either case.
    assert saved_spread - saved == 2 * 8 * rows + 4 * 4


def test_the_fullest_rank_gets_the_rows_of_the_busiest_expert() -> None:
    # 4 experts, R = 80 rows a rank, 2 ranks: 160 rows, 40 an expert on the average. The busiest has 2.5 times that, 100; 20 are left for
    # each of the others, so the rank of the busiest computes 100 and then 20 rows.
    experts = ShapedExperts(Experts(8, 8, 4), "loop", ep_size=2, imbalance=2.5)
    assert experts.ends(80).tolist() == [100, 120]
    # Told that 130 rows arrive (1.625 a row sent), the busiest keeps its 100.
    assert ShapedExperts(Experts(8, 8, 4), "loop", ep_size=2, imbalance=2.5, arriving=1.625).ends(80).tolist() == [100, 130]
    assert ShapedExperts(Experts(8, 8, 4), "loop", ep_size=1, imbalance=1.0).ends(80).tolist() == [20, 40, 60, 80]


def test_a_share_that_does_not_divide_the_experts_is_refused() -> None:
    with pytest.raises(ValueError, match="4 experts cannot be spread over ep_size 3"):
        with_experts_of(3, lambda module: 0)


def test_gelu_keeps_its_input_only() -> None:
    with LiveBytes() as live:
        x = torch.empty(8, 8, device="meta", requires_grad=True)
        y = F.gelu(x).sum()
        assert live.now == 256 + 4  # x, and the sum: gelu's output is not needed by anybody
        y.backward()
        assert live.peak == 256 + 4 + 4 + 256  # the gradient of the sum (a view expands it) and that of x
