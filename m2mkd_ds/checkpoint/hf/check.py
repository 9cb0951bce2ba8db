"""Does an exported folder work where m2mkd_ds is not installed? Asked of a fresh, offline Python process.

This file is two things: `check_export`, called by the exporter, and, run as a script, the child that it starts. The child imports torch,
transformers and safetensors only and refuses to import m2mkd_ds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

OWN_PACKAGES = ("m2mkd_ds", "m2mkd_kernels")


class Picture(NamedTuple):
    """An image and what the evaluation transform makes of it."""

    image_HWC: Tensor
    """uint8, RGB."""
    pixels_CHW: Tensor
    """float32."""


def check_export(
    folder: Path, images_BCHW: Tensor, logits_BV: Tensor, *, picture: Picture | None = None, atol: float = 0.0, timeout_s: float = 300.0
) -> dict[str, Any]:
    """Load `folder` by transformers' auto classes in a fresh offline process and compare with `logits_BV` (CPU, fp32).

    With `picture`, the folder's image processor must give its pixels, bit for bit. Returns {"max_abs_diff": largest difference of a
    logit, "prediction": what the image-classification pipeline says of `picture`, or of a grey image}. atol=0 asks for the same bits.
    Raises ValueError when logits or pixels differ or the process fails or hangs.
    """
    with tempfile.TemporaryDirectory() as scratch:
        sample = Path(scratch) / "sample.safetensors"
        tensors = {"images": images_BCHW.float().cpu().contiguous(), "logits": logits_BV.detach().float().cpu().contiguous()}
        if picture is not None:
            tensors |= {"image": picture.image_HWC.contiguous(), "pixels": picture.pixels_CHW.contiguous()}
        save_file(tensors, sample)
        answer = Path(scratch) / "answer.json"
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_", "TRANSFORMERS_"))}
        env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": scratch, "HF_MODULES_CACHE": f"{scratch}/modules", "CUDA_VISIBLE_DEVICES": ""}
        # -I: no PYTHONPATH, no current folder; the same number of threads, because sums over threads differ in the last bit.
        command = [sys.executable, "-I", __file__, str(Path(folder).resolve()), str(sample), str(answer), str(torch.get_num_threads())]
        try:
            done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True, timeout=timeout_s, check=False)
        except subprocess.TimeoutExpired:
            raise ValueError(f"{folder}: loading in a fresh process took more than {timeout_s:g} s") from None
        if done.returncode:
            raise ValueError(f"{folder}: does not load in a fresh process (exit {done.returncode}): {done.stderr.strip()[-2000:]}")
        result: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if not result["max_abs_diff"] <= atol:  # also catches NaN
        raise ValueError(f"{folder}: logits of the exported model differ by up to {result['max_abs_diff']:g}; allowed is {atol:g}")
    if not result["same_pixels"]:
        raise ValueError(f"{folder}: the exported image processor gives other pixels than the evaluation transform")
    return result


class _Refuse:
    """An import hook under which the packages of this repository do not exist."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in OWN_PACKAGES:
            raise ModuleNotFoundError(f"{name} must not be needed by an exported model", name=name)


def _child(folder: str, sample: str, answer: str, threads: str) -> None:
    sys.meta_path.insert(0, _Refuse)
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    torch.set_num_threads(int(threads))
    tensors = load_file(sample)
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits_BV = model(pixel_values=tensors["images"]).logits
    size = tensors["images"].shape[-1]
    image, same_pixels = Image.new("L", (size + 3, size + 5), 128), True
    if "image" in tensors:
        image = Image.fromarray(tensors["image"].numpy())
        same_pixels = torch.equal(processor(image, return_tensors="pt")["pixel_values"][0], tensors["pixels"])
    classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu")
    result = {
        "max_abs_diff": (logits_BV - tensors["logits"]).abs().max().item(),
        "prediction": classify(image, top_k=1)[0],
        "same_pixels": same_pixels,
    }
    Path(answer).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    _child(*sys.argv[1:])
