"""`m2mkd doctor`: what this machine has, and what it lacks with the reason, in lines that fit into a bug report."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from m2mkd_ds import __version__
from m2mkd_ds.distributed.world import has_fast_bf16
from m2mkd_ds.moe.backends import BACKENDS

PACKAGES = ("torch", "torchvision", "timm", "deepspeed", "webdataset", "transformers", "safetensors", "numpy", "pillow")
OPTIONAL = {
    "triton": "own kernels", "tutel": "peer MoE layer",
    **{name: f"trackers=[{name}]" for name in ("tensorboard", "wandb", "trackio")},
}  # fmt: skip


def describe_machine() -> str:
    """Versions, devices, precision and optional parts; a missing part comes with the reason that its import gave."""
    lines = [f"m2mkd_ds {__version__}, Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores"]
    for name in PACKAGES:
        try:
            lines.append(f"{name:13} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"{name:13} MISSING: pip install {name}")
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        lines += [f"GPU {i}         {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    else:
        lines.append("GPU           none: the launcher starts CPU ranks (gloo); pass launch.num_gpus=N for N of them")
    fast = has_fast_bf16(device)
    lines.append(f"precision     auto means {'bf16' if fast else 'fp32'} here ({device.type} {'has' if fast else 'has no'} bf16 units)")
    dtype = torch.bfloat16 if fast else torch.float32
    for name, backend in BACKENDS.items():
        reason = backend.why_not(device=device, dtype=dtype, dim=768, hidden=3072, activation="gelu")  # V-MoE-Base
        lines.append(f"{'experts':13} moe.backend={name}: {'not here: ' + reason if reason else 'runs'}")
    for name, use in OPTIONAL.items():
        try:
            importlib.import_module(name)
            lines.append(f"{name:13} available ({use})")
        except ImportError as err:
            lines.append(f"{name:13} not available ({use}): {err}")
    return "\n".join(lines)
