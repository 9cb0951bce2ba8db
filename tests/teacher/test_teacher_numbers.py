"""Hidden states on the wire: exact where promised, else within the bounds that are promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.distill.pairs import stage_spans
from m2mkd_ds.models.vit import VitArch, build_stage
from m2mkd_ds.teacher.protocol.numbers import bytes_of_hidden, from_wire, largest, peaks, quantise, to_wire
from m2mkd_ds.teacher.protocol.wire import WireDtype


def there_and_back(hidden: Tensor, wire_dtype: WireDtype, dtype: torch.dtype = torch.float32) -> Tensor:
    sent = to_wire(hidden, wire_dtype)
    return from_wire(sent[""], sent.get(".scale"), dtype)


def test_a_block_by_hand() -> None:
    # largest 254 -> scale 2; 3 / 2 = 1.5 rounds to the even 2 -> 4; 5 / 2 = 2.5 -> 2 -> 4; -254 -> -127; 1 / 2 = 0.5 -> 0
    x = torch.zeros(1, 1, 130)
    x[0, 0, :5] = torch.tensor([254.0, 3.0, 5.0, -254.0, 1.0])
    x[0, 0, 128:] = torch.tensor([127.0, 12.4])  # the short block: scale 1, 12.4 -> 12
    quantised, scale = quantise(x)
    assert quantised.dtype == torch.int8 and quantised.shape == (1, 1, 130)
    assert scale.tolist() == [[[2.0, 1.0]]]
    assert quantised[0, 0, :6].tolist() == [127, 2, 2, -127, 0, 0] and quantised[0, 0, 128:].tolist() == [127, 12]
    back = from_wire(quantised, scale, torch.float32)[0, 0]
    assert back[:5].tolist() == [254.0, 4.0, 4.0, -254.0, 0.0] and back[128:].tolist() == [127.0, 12.0]


def test_a_block_of_zeros_stays_zero() -> None:
    assert there_and_back(torch.zeros(2, 3, 200), "int8").equal(torch.zeros(2, 3, 200))


@given(
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
    st.floats(-44, 38, allow_nan=False),
)
@settings(max_examples=60, deadline=None)
def test_no_number_is_off_by_more_than_half_a_scale(width: int, seed: int, exponent: float) -> None:
    rng = np.random.default_rng(seed)
    numbers = (rng.standard_cauchy((1, 2, width)).clip(-3, 3) * 10.0**exponent).astype(np.float32)
    back = there_and_back(torch.from_numpy(numbers), "int8").numpy()
    for first in range(0, width, 128):
        block = numbers[..., first : first + 128].astype(np.float64)
        most = np.abs(block).max(axis=-1, keepdims=True)
        # Below 1e-36 a scale is a subnormal number, with bits of its own lost: then a scale's error, 2^-149 / 2, counts 127 times.
        allowed = most / 254 * (1 + 1e-5) + 127 * 2.0**-149
        assert (np.abs(back[..., first : first + 128] - block) <= allowed).all()


@pytest.mark.parametrize(("wire_dtype", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_the_precision_that_was_computed_in_travels_without_loss(wire_dtype: WireDtype, dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert there_and_back(hidden, wire_dtype, dtype).equal(hidden)
    assert there_and_back(hidden, "fp32", dtype).equal(hidden)


def test_a_scale_that_does_not_belong_is_refused() -> None:
    sent = to_wire(torch.ones(1, 2, 130), "int8")
    with pytest.raises(ValueError, match="int8 hidden state came without its scale"):
        from_wire(sent[""], None, torch.float32)
    with pytest.raises(ValueError, match=r"a scale \[1, 2, 1\] for a hidden state \[1, 2, 130\] of torch.int8; int8 has \[1, 2, 2\]"):
        from_wire(sent[""], sent[".scale"][..., :1], torch.float32)


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "fp16", "int8"])
def test_bytes_are_counted_as_they_are_sent(wire_dtype: WireDtype) -> None:
    sent = to_wire(torch.ones(2, 3, 300), wire_dtype)
    assert 2 * bytes_of_hidden(3, 300, wire_dtype) == sum(t.numel() * t.element_size() for t in sent.values())


def test_peaks_are_by_image_and_show_what_is_not_finite() -> None:
    x = torch.tensor([[1.0, -3.0], [float("nan"), 2.0], [float("-inf"), 0.0], [0.0, 0.0]])[:, None]
    found = peaks(x)
    assert found[0] == 3.0 and np.isnan(found[1]) and found[2] == float("inf") and found[3] == 0.0
    assert largest("fp16") == 65504.0


def test_errors_on_hidden_states_of_images(tiny_config: RunConfig, tiny_index: ShardIndex) -> None:
    """Three blocks of width 192 on augmented digits, also with massive channels as trained ViTs have them; relative root mean square."""
    arch = VitArch(
        arch="vit_tiny_patch16_224", arch_args={"depth": 3, "embed_dim": 192, "num_heads": 3, "patch_size": 4}, image_size=16,
        num_classes=10,
    )  # fmt: skip
    loader = TrainLoader(tiny_index, tiny_config.data, seed=1, micro_batch_size=32, accumulation=1, rank=0, world=1, start_step=0,
                         total_steps=1)  # fmt: skip
    with torch.no_grad():
        x = next(iter(loader)).images_BCHW
        for span in stage_spans((1, 1, 1))[:2]:
            x = build_stage(arch, span, seed=0)(x)
    massive = x.clone()
    massive[:, 3, [5, 100]] = 100 * x.std()
    # bf16 keeps 8 bits of a number, so no error is above 2^-8 = 0.4 % of it; fp16 keeps 11: 2^-11 = 0.05 %.
    bounds: dict[WireDtype, tuple[float, float]] = {"bf16": (2**-8, 2**-8), "fp16": (2**-11, 2**-11), "int8": (0.01, 0.02)}
    for wire_dtype, allowed in bounds.items():
        for hidden, bound in zip((x, massive), allowed, strict=True):
            error = float((there_and_back(hidden, wire_dtype) - hidden).norm() / hidden.norm())
            print(f"{wire_dtype}: {error:.5f}")
            assert bound / 100 < error <= bound
