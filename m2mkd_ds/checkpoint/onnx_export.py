"""A student, or a teacher, as an ONNX file that says by itself how images are prepared and what its classes are.

    images [batch, 3, S, S] fp32, normalised  ->  logits [batch, V] fp32         metadata: m2mkd_ds.preprocessing, m2mkd_ds.labels

Models above 2 GB, which one protobuf cannot hold, get a second file beside the first, OUT.onnx.data. The file is written beside its
place, compared with torch by onnxruntime if asked, and renamed; nothing is written over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds import __version__
from m2mkd_ds.checkpoint.atomic import StoreError, check_new_file, fsync_path
from m2mkd_ds.config import DataConfig

OPSETS = (18, 23)
"""Smallest and largest opset that torch's exporter writes."""
TOLERANCE = 1e-4
"""Largest allowed difference from torch, of a logit, relative to the largest one (at least 1)."""
INPUT, OUTPUT = "images", "logits"


def onnx_metadata(data: DataConfig, class_names: Sequence[str], more: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a user of the file must know, as texts; preprocessing and labels are JSON.

    resize: length of the shorter side before the centre crop. Pixels are RGB in [0, 1], less mean, over std.
    """
    steps = {
        "resize": math.floor(data.image_size / data.crop_pct),
        "interpolation": data.interpolation,
        "center_crop": data.image_size,
        "channels": "RGB",
        "scale": 1 / 255,
        "mean": data.mean,
        "std": data.std,
    }
    labels = {"m2mkd_ds.labels": json.dumps(list(class_names))} if class_names else {}
    return {"m2mkd_ds.version": __version__, "m2mkd_ds.preprocessing": json.dumps(steps), **labels, **(more or {})}


def export_onnx(
    module: nn.Module,
    out: Path,
    *,
    image_size: int,
    metadata: Mapping[str, str],
    batch: int | None = None,
    opset: int = 20,
    check: Callable[[Path], None] | None = None,
) -> Path:
    """Write `module` (images -> logits, evaluation mode, on the CPU) to `out`, a new file NAME.onnx, and return it.

    `batch`: that many images and no others; None: any number. `check` gets the finished file before it takes its place, and may raise.
    Raises ImportError without onnx and onnxscript, ValueError for an opset that there is not, StoreError for a name that
    `check_new_onnx` refuses and when the disk is full.
    """
    out = Path(out)
    check_new_onnx(out)
    _need_onnx()
    if not OPSETS[0] <= opset <= OPSETS[1]:
        raise ValueError(f"--opset is {opset}; allowed is {OPSETS[0]} to {OPSETS[1]}")
    if batch is not None and batch < 1:
        raise ValueError(f"--batch is {batch}; allowed is `dynamic` or a number from 1")
    program = _program(module, image_size, batch, opset)
    program.model.metadata_props.update(metadata)
    program.model.producer_name, program.model.producer_version = "m2mkd_ds", __version__
    temp = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temp.mkdir()
        program.save(temp / out.name)
        if check is not None:
            check(temp / out.name)
        # The weights first: a graph without them must never be seen.
        for file in sorted(temp.iterdir(), key=lambda file: file.name == out.name):
            fsync_path(file)
            os.replace(file, out.with_name(file.name))
        fsync_path(out.parent)
    except OSError as err:
        raise StoreError(f"{out}: not written ({err.strerror or err}); free space or choose another place, then run it again") from err
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return out


def check_new_onnx(out: Path) -> None:
    """Raises StoreError unless `out` can be a new file NAME.onnx; its weights beside it, which large models have, count as well."""
    check_new_file(out, ".onnx")
    check_new_file(out.with_name(f"{out.name}.data"), ".data")


def run_onnx(file: Path, images_BCHW: Tensor) -> Tensor:
    """Logits by onnxruntime on the CPU. Raises ImportError without it."""
    try:
        import onnxruntime
    except ImportError as err:
        raise ImportError(f"comparing an ONNX file with torch needs onnxruntime ({err}): pip install m2mkd_ds[onnx]") from err
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run([OUTPUT], {INPUT: images_BCHW.numpy()})
    return torch.from_numpy(logits)


def compare_onnx(file: Path, images_BCHW: Tensor, logits_BV: Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit (at least 1), between onnxruntime and `logits_BV`.

    Raises ValueError above TOLERANCE.
    """
    given_BV = run_onnx(file, images_BCHW)
    difference = float((given_BV - logits_BV).abs().max() / logits_BV.abs().max().clamp_min(1.0))
    if not difference <= TOLERANCE:  # also catches NaN
        raise ValueError(
            f"{file.name}: onnxruntime's logits differ from torch's by {difference:g} of the largest one on {len(images_BCHW)} images; "
            f"allowed is {TOLERANCE:g}"
        )
    return difference


def _program(module: nn.Module, image_size: int, batch: int | None, opset: int) -> Any:
    """torch's exporter, with the one operation that it lacks."""
    example_BCHW = torch.zeros(3 if batch is None else batch, 3, image_size, image_size)
    shapes = None if batch is not None else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecations inside torch and onnxscript, about which nobody here can do anything
        return torch.onnx.export(
            module.eval(), (example_BCHW,), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], dynamic_shapes=shapes,
            opset_version=opset, custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()}, verbose=False,
        )  # fmt: skip


def _stable_sort() -> Callable[..., Any]:
    """ONNX for the sort by which routers choose: of equal values TopK puts the lower index first, as a stable sort does."""
    from onnxscript import opset18

    def sort(x: Any, stable: bool | None = None, dim: int = -1, descending: bool = False) -> Any:
        assert stable and descending and dim in (-1, 1)
        return opset18.TopK(x, opset18.Shape(x, start=-1), axis=-1, largest=1, sorted=1)

    return sort


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as err:
        raise ImportError(f"writing ONNX needs onnx and onnxscript ({err}): pip install m2mkd_ds[onnx]") from err
