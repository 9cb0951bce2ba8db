"""Stitch layer: LayerNorm, then a linear map between two widths."""

from __future__ import annotations

import pytest
import torch

from m2mkd_ds.models.stitch import Stitch


def test_forward_is_layer_norm_then_linear_by_hand() -> None:
    stitch = Stitch(2, 3).double()
    with torch.no_grad():
        stitch.norm.weight.copy_(torch.tensor([2.0, 1.0]))
        stitch.norm.bias.copy_(torch.tensor([0.0, 5.0]))
        stitch.proj.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]]))
        stitch.proj.bias.copy_(torch.tensor([0.5, 0.0, 0.0]))
    # Token (1, 3): mean 2, variance 1, eps 1e-5 -> +-s with s = 1 / sqrt(1.00001); scaled and shifted (-2s, s + 5).
    s = 1.00001**-0.5
    expected = torch.tensor([[[-2 * s + 0.5, s + 5, -2 * s - (s + 5)]]], dtype=torch.float64)
    torch.testing.assert_close(stitch(torch.tensor([[[1.0, 3.0]]], dtype=torch.float64)), expected, rtol=0, atol=1e-12)


def test_names_shapes_and_first_values() -> None:
    torch.manual_seed(0)
    stitch = Stitch(256, 512)
    shapes = {name: tuple(tensor.shape) for name, tensor in stitch.state_dict().items()}
    assert shapes == {"norm.weight": (256,), "norm.bias": (256,), "proj.weight": (512, 256), "proj.bias": (512,)}
    assert stitch.norm.eps == 1e-5
    assert torch.equal(stitch.norm.weight, torch.ones(256))
    assert not stitch.norm.bias.any() and not stitch.proj.bias.any()
    # 131072 draws: the standard error of the estimate is 0.02 / sqrt(2 * 131072) = 4e-5.
    assert stitch.proj.weight.std().item() == pytest.approx(0.02, abs=2e-4)


def test_the_same_seed_gives_the_same_bits() -> None:
    draws = []
    for _ in range(2):
        torch.manual_seed(7)
        draws.append(Stitch(8, 16).proj.weight)
    assert torch.equal(*draws)


def test_a_width_must_be_positive() -> None:
    with pytest.raises(ValueError, match="in_dim 0, out_dim 4"):
        Stitch(0, 4)
