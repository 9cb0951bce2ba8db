"""`m2mkd onnx`: a student, or a run's teacher, for runtimes that are not torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import tyro

from m2mkd_ds.cli.app import app, out
from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import setup_logging


@app.command(name="onnx", help="Write a student, or the teacher of a run, as an ONNX file.")
def onnx(
    path: tyro.conf.Positional[Path],
    file: tyro.conf.Positional[Path],
    /,
    *,
    what: Literal["student", "teacher"] = "student",
    experts: Literal["gather", "dense"] = "gather",
    batch: str = "dynamic",
    opset: int = 20,
    check: bool = True,
) -> None:
    """Write a student, or the teacher of a run, as an ONNX file with its labels and preprocessing in the metadata.

    m2mkd onnx RUN student.onnx

    Students whose routing depends on the other images of the batch (expert_choice, a capacity that drops tokens) are refused.

    Args:
        path: Run folder, exported Hugging Face folder, or a .safetensors file of a whole student in a run folder.
        file: The new file, NAME.onnx; above 2 GB the weights are FILE.data beside it. Nothing is written over.
        what: The student, or the teacher joined from RUN/split.
        experts: gather: each expert computes the tokens that chose it; needs a runtime with shapes that depend on data. dense: every
            expert computes all tokens, num_experts / top_k times the work, fixed shapes.
        batch: `dynamic`, or the number of images of every call.
        opset: ONNX opset, 18 to 23.
        check: Compare with torch by onnxruntime, to 1e-4 of the largest logit, before the file takes its place.
    """
    if batch != "dynamic" and not batch.isdecimal():
        raise ConfigError(f"--batch is {batch!r}; allowed is `dynamic` or a number from 1")
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name the file to write, such as {file / 'student.onnx'}")
    from m2mkd_ds.train.exports.onnx_files import OnnxOptions, student_onnx, teacher_onnx

    setup_logging()
    options = OnnxOptions(batch=None if batch == "dynamic" else int(batch), opset=opset, check=check)
    out(str(student_onnx(path, file, options, experts=experts) if what == "student" else teacher_onnx(path, file, options)))
