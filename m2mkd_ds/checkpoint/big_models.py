"""Students larger than one device's memory, by accelerate: built without memory, placed block by block on GPUs, CPU and disk.

    open_student (headers only) -> empty model -> device map within max_memory -> tensors one by one to their places -> hooks

What is left on the disk is read from the student's own safetensors files when its module runs, and forgotten behind it: no copy is
made and no offload folder is needed. The largest single piece is one layer's stacked experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from m2mkd_ds.checkpoint.hf.files import parse_size
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.checkpoint.student_files import StudentFiles, open_student
from m2mkd_ds.logs import logger
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE

Device = int | str
"""A GPU's number, `cpu` or `disk`."""


def load_big_model(
    path: str | Path | StudentFiles,
    *,
    device_map: Literal["auto"] | Mapping[str, Device] = "auto",
    max_memory: Mapping[Device, int | str] | None = None,
) -> VisionMoE:
    """The student at `path` (run, export, weights file) in evaluation mode, fp32, spread over what there is; call it as any VisionMoE.

    `device_map`: `auto` fills GPUs first, then the CPU, then leaves blocks on the disk; or module names -> devices. `max_memory`: bytes
    (or `2GB`) by device; devices that it does not name are not used, but for the disk. The default is what is free now. Inputs may be
    on any device; logits come back there. Keep the files while the model is in use. Raises ImportError without accelerate, ValueError
    for a map or sizes that cannot work.
    """
    try:
        from accelerate import dispatch_model, init_empty_weights
        from accelerate.utils import set_module_tensor_to_device
    except ImportError as err:
        raise ImportError(f"spreading a model over devices needs accelerate ({err}): pip install accelerate") from err

    student = path if isinstance(path, StudentFiles) else open_student(path)
    with init_empty_weights(include_buffers=True):
        model = VisionMoE(student.arch, StageSpan.whole(student.arch.num_blocks), stitches=student.stitches, seed=None).eval()
    places = _device_map(model, max_memory) if device_map == "auto" else dict(device_map)
    main = next((device for device in places.values() if device not in ("cpu", "disk")), "cpu")
    _keep_near(model, places, main)
    on_disk: dict[str, dict[str, str]] = {}
    is_buffer = {name for name, _ in model.named_buffers()}
    for name, file in student.file_of.items():
        device = _place_of(name, places)
        if device == "disk" and name not in is_buffer:
            on_disk[name] = {"safetensors_file": str(file.resolve()), "weight_name": name, "dtype": "float32"}
            continue
        # A copy: a tensor as it is read may be a view of the file, which somebody may write over.
        tensor = read_weights(file, [name])[name].to(torch.float32, copy=True)
        set_module_tensor_to_device(model, name, main if device == "disk" else device, value=tensor)
    _announce(model, places, on_disk)
    with warnings.catch_warnings():
        # cls_token and pos_embed are parameters: named in the map all the same, because accelerate wants a device for every tensor.
        warnings.filterwarnings("ignore", "The following device_map keys do not match any submodules")
        return dispatch_model(model, places, main_device=main, offload_index=on_disk or None)


def parse_max_memory(words: Sequence[str]) -> dict[Device, int | str]:
    """`0=10GB`, `cpu=2GB` -> {0: "10GB", "cpu": "2GB"}. Raises ValueError for other words."""
    limits: dict[Device, int | str] = {}
    for word in words:
        device, equals, size = word.partition("=")
        if not equals or not (device == "cpu" or device.isdecimal()):
            raise ValueError(f"--max-memory {word}: expected DEVICE=SIZE, for example 0=10GB (a GPU's number) or cpu=2GB")
        parse_size(size, f"--max-memory {device}")
        limits[int(device) if device.isdecimal() else device] = size
    return limits


def _device_map(model: VisionMoE, max_memory: Mapping[Device, int | str] | None) -> dict[str, Device]:
    """Whole blocks to devices, in running order. Raises ValueError for sizes that are none and for GPUs that there are not."""
    from accelerate.utils import get_max_memory, infer_auto_device_map

    limits = (
        None if max_memory is None else {d: parse_size(m, f"max_memory of {d}") if isinstance(m, str) else m for d, m in max_memory.items()}
    )
    gpus = torch.cuda.device_count()
    for device in limits or ():
        if isinstance(device, int) and device >= gpus:
            have = f"are GPUs 0 to {gpus - 1}" if gpus else "is none"
            raise ValueError(f"max_memory names GPU {device}; here {have}; name those, or cpu")
    # dtype: the files may hold bf16, but the model computes, and lies in memory, in fp32.
    return dict(infer_auto_device_map(model, get_max_memory(limits), no_split_module_classes=["Block"], dtype=torch.float32))


def _keep_near(model: VisionMoE, places: dict[str, Device], main: Device) -> None:
    """Class token, positions and patch embedding to the main device: the model itself reads them, and only modules have hooks."""
    if "" in places:
        if places[""] != "disk":
            return
        del places[""]
        places |= {name: "disk" for name, _ in model.named_children()}
    for name in ("cls_token", "pos_embed"):
        places[name] = main
    if places.get("patch_embed") not in (main, "cpu", "disk"):
        places["patch_embed"] = main


def _place_of(name: str, places: Mapping[str, Device]) -> Device:
    """The device of a tensor: that of the longest module name in the map that it belongs to. Raises ValueError if there is none."""
    parts = name.split(".")
    for length in range(len(parts), -1, -1):
        prefix = ".".join(parts[:length])
        if prefix in places:
            return places[prefix]
    raise ValueError(f"device_map names no device for {name}; name its module, or '' for everything else")


def _announce(model: VisionMoE, places: Mapping[str, Device], on_disk: Mapping[str, Any]) -> None:
    sizes: dict[Device, int] = {}
    for name, parameter in model.named_parameters():
        device = "disk" if name in on_disk else _place_of(name, places)
        sizes[device] = sizes.get(device, 0) + 4 * parameter.numel()
    logger.info("weights: %s", ", ".join(f"{size / 1e9:.2f} GB on {device}" for device, size in sizes.items()))
