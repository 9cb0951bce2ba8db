"""The node `export`: a trained model as a Hugging Face folder, checked against the training code's own logits and pixels."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.hf.check import Picture
from m2mkd_ds.checkpoint.hf.config import DTYPES
from m2mkd_ds.checkpoint.hf.export import check_export, export_hf
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_weights
from m2mkd_ds.config import ConfigError, RunConfig
from m2mkd_ds.data.decode import rgb_image
from m2mkd_ds.data.loader import EvalLoader
from m2mkd_ds.data.pil_transforms import eval_transform
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import logger
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.exports.export_card import card
from m2mkd_ds.train.nodes import find_node, fingerprint, withdraw_done, write_done
from m2mkd_ds.train.phases.end_to_end import student_stitches

MODELS = {"student": ("end_to_end", "student"), "baseline": ("baseline", "baseline"), "assembled": ("assemble", "student_cold")}
"""What can be exported: name -> (node that holds its weights, its name in results.json)."""


def export_node(ctx: RunContext) -> None:
    """RUN/export/model, then done.json."""
    started = time.time()
    node = find_node(ctx.config, "export")
    print_ = fingerprint(ctx.config, node, ctx.root, ctx.data_fingerprints)
    (ctx.root / "export").mkdir(parents=True, exist_ok=True)
    withdraw_done(ctx.root / "export")
    folder = export_model(ctx, ctx.root / "export" / "model", what="student", dtype="fp32")
    files = [file for file in folder.rglob("*") if file.is_file()]
    write_done(ctx.root / "export", node, ctx.config, print_, files, wall_s=time.time() - started)


def export_run(config: RunConfig, out: Path, *, what: str, dtype: str) -> Path:
    """Export model `what` of a run folder to `out`; what the verb `export` calls."""
    return export_model(open_run(config, World(0, 1, 0, 1, torch.device("cpu"))), out, what=what, dtype=dtype)


def export_model(ctx: RunContext, out: Path, *, what: str, dtype: str) -> Path:
    """Write the folder, load it in a fresh process without this package, compare logits on real validation images, and put it in place.

    Logits and the image processor's pixels must be equal bit for bit. Raises ValueError when they are not, ConfigError for a model
    that the run does not hold.
    """
    node, scored_as = MODELS[what]
    weights_file = ctx.root / node / "weights.safetensors"
    if not weights_file.is_file():
        raise ConfigError(f"{weights_file}: no such file; the run holds no {what} yet, or trains none")
    weights = read_weights(weights_file)
    stitches = () if what == "baseline" else student_stitches(ctx)
    names = ctx.config.export.class_names or ctx.train_index.class_names
    model = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=stitches, seed=None)
    load_exact(model, {name: _as_stored(name, tensor, dtype) for name, tensor in weights.items()})
    with closing(EvalLoader(ctx.val_index, ctx.config.data, batch_size=8, rank=0, world=1)) as loader:
        images_BCHW = next(iter(loader)).images_BCHW
    with torch.no_grad():
        logits_BV = model.eval()(images_BCHW).output

    def check(folder: Path) -> None:
        result = check_export(folder, images_BCHW, logits_BV, picture=_picture(ctx))
        logger.info("export: logits of the exported model equal the training code's bit for bit on %d images, and so do an image's "
                    "pixels; pipeline works (%s)", len(images_BCHW), result["prediction"]["label"])  # fmt: skip

    return export_hf(
        weights,
        ctx.student_arch,
        out,
        class_names=names,
        data=ctx.config.data,
        license=ctx.config.export.license,
        stitches=stitches,
        card=card(ctx, what, scored_as, weights_file),
        dtype=dtype,
        max_shard_size=ctx.config.export.max_shard_size,
        check=check,
    )


def _as_stored(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """The weight as the folder holds it (routers stay fp32), so that the check tests the code and not the rounding."""
    return tensor if ".router." in name else tensor.to(DTYPES[dtype][1]).float()


def _picture(ctx: RunContext) -> Picture:
    """The first validation image, and what the evaluation transform makes of it."""
    image = rgb_image(ctx.val_index.read(0)[0])
    pixels_HWC = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return Picture(pixels_HWC, eval_transform(ctx.config.data)(image))
