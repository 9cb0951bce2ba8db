"""`m2mkd export-teacher` and `m2mkd export-timm`: what a run has made, as folders in timm's own layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tyro

from m2mkd_ds.cli.app import app, out
from m2mkd_ds.logs import setup_logging


@app.command(name="export-teacher")
def export_teacher(run: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], /) -> None:
    """Join a run's teacher modules into one folder for timm: timm.create_model("local-dir:FOLDER", pretrained=True).

    Args:
        run: Run folder with the node split.
        folder: Target folder; an older one of this kind is replaced.
    """
    from m2mkd_ds.train.exports.timm_folders import export_run_teacher

    setup_logging()
    out(str(export_run_teacher(run, folder)))


@app.command(name="export-timm")
def export_timm(student: tyro.conf.Positional[Path], folder: tyro.conf.Positional[Path], /) -> None:
    """Write a student as a folder for timm: import m2mkd_ds.timm_models; timm.create_model("local-dir:FOLDER", pretrained=True).

    Args:
        student: Run folder, exported Hugging Face folder, or a .safetensors file of a whole student in a run folder.
        folder: Target folder; an older one of this kind is replaced.
    """
    from m2mkd_ds.checkpoint.student_files import open_student
    from m2mkd_ds.timm_models import export_student
    from m2mkd_ds.train.exports.timm_folders import class_names

    setup_logging()
    opened = open_student(student)
    if opened.run is not None:
        opened = replace(opened, class_names=class_names(opened.run))
    out(str(export_student(opened, folder)))
