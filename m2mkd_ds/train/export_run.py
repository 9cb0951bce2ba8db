"""The node `export`: the final student as a Hugging Face folder, checked against the training code's own logits."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.checkpoint.hf_export import check_export, export_hf
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_json, read_metadata, read_weights
from m2mkd_ds.config import RunConfig, to_dict
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import logger
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.nodes import find_node, fingerprint, withdraw_done, write_done
from m2mkd_ds.train.phases.end_to_end import student_stitches


def export_node(ctx: RunContext) -> None:
    """RUN/export/model, then done.json."""
    started = time.time()
    node = find_node(ctx.config, "export")
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    (ctx.root / "export").mkdir(parents=True, exist_ok=True)
    withdraw_done(ctx.root / "export")
    folder = export_student(ctx, ctx.root / "export" / "model", dtype="fp32")
    files = [file for file in folder.rglob("*") if file.is_file()]
    write_done(ctx.root / "export", node, ctx.config, print_, files, wall_s=time.time() - started)


def export_run(config: RunConfig, out: Path, *, dtype: str) -> Path:
    """Export the student of a run folder to `out`; what the verb `export` calls."""
    return export_student(open_run(config, World(0, 1, 0, 1, torch.device("cpu"))), out, dtype=dtype)


def export_student(ctx: RunContext, out: Path, *, dtype: str) -> Path:
    """Write the folder, load it in a fresh process without this package, and compare logits on real validation images.

    They must be equal bit for bit. Raises ValueError when they are not.
    """
    weights_file = ctx.root / "end_to_end" / "weights.safetensors"
    weights = read_weights(weights_file)
    names = ctx.config.export.class_names or ctx.train_index.class_names
    folder = export_hf(
        weights,
        ctx.student_arch,
        out,
        class_names=names,
        data=ctx.config.data,
        license=ctx.config.export.license,
        stitches=student_stitches(ctx),
        card=card(ctx, weights_file),
        dtype=dtype,
        max_shard_size=ctx.config.export.max_shard_size,
    )
    student = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=student_stitches(ctx), seed=None)
    # With bf16 the rounded weights (routers stay fp32) are compared, so that the check tests the code and not the rounding.
    stored = {n: t.to(torch.bfloat16).float() if dtype == "bf16" and ".router." not in n else t for n, t in weights.items()}
    load_exact(student, stored)
    with closing(EvalLoader(ctx.val_index, ctx.config.data, batch_size=8, rank=0, world=1)) as loader:
        images_BCHW = next(iter(loader)).images_BCHW
    with torch.no_grad():
        logits_BV = student.eval()(images_BCHW).output
    result = check_export(folder, images_BCHW, logits_BV)
    logger.info("export: logits of the exported model equal the training code's bit for bit on %d images; pipeline works (%s)",
                len(images_BCHW), result["prediction"]["label"])  # fmt: skip
    return folder


def card(ctx: RunContext, weights_file: Path) -> dict[str, Any]:
    """What the model card tells: data, metrics with their intervals, recipe, lineage."""
    results_file = ctx.root / "evaluate" / "results.json"
    metrics = {}
    if results_file.is_file():
        models = read_json(results_file)["models"]
        metrics = {k: v for k, v in models["student"].items() if k in ("top1", "top1_ci", "top5", "top5_ci", "loss", "images")}
    tree = to_dict(ctx.config)
    recipe = {key: tree[key] for key in ("name", "seed", "teacher", "meta", "student", "distill", "m2mkd", "end_to_end")}
    for key in ("weights", "feed"):
        recipe["teacher"].pop(key)
    source = ctx.train_index.source
    return {
        "name": f"V-MoE student of recipe {ctx.config.name}",
        "dataset": source,
        "metrics": metrics,
        "recipe": recipe,
        "lineage": read_metadata(weights_file),
        "data_licence": f"{source}: {ctx.train_index.license}",
    }
