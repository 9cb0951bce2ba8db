"""What is said where the kernels cannot run, on devices and with versions that need not be here."""

from __future__ import annotations

import pytest
import torch

from m2mkd_kernels import runtime


@pytest.mark.parametrize(("shared_kib", "runs"), [(99, False), (143, False), (163, True), (227, True)])
def test_16_bit_tiles_need_a_gpu_with_room_for_them(monkeypatch: pytest.MonkeyPatch, shared_kib: int, runs: bool) -> None:
    # 99 KiB: compute capability 8.6, 8.9, 12.0; 163 KiB: 8.0; 227 KiB: 9.0.
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    monkeypatch.setattr(runtime, "shared_bytes", lambda index: shared_kib * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small GPU")
    device = torch.device("cuda:0")
    assert runtime.why_not(device, torch.float32) == ""
    for dtype in (torch.bfloat16, torch.float16):
        reason = runtime.why_not(device, dtype)
        assert reason == "" if runs else f"need 144 KiB of shared memory a program; a small GPU allows {shared_kib} KiB" in reason


def test_an_interpreter_that_numpy_has_left_behind_is_named() -> None:
    assert "triton 3.6.0 fails with numpy 2.4.6" in runtime.interpreter_fault("3.6.0", "2.4.6")
    for versions in (("3.6.0", "2.3.5"), ("3.7.0", "2.4.0"), ("3.8.0+git1", "2.4.6"), ("3.10.0", "2.10.1")):
        assert runtime.interpreter_fault(*versions) == ""
