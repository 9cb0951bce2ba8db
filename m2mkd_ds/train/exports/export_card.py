"""What the model card of an exported folder tells: measured numbers, recipe, lineage, training jobs. All of it is read from the run folder.

Nothing in it names a host, an address or a folder of the machine: the card is public. Nor a date: a run folder gives the same bytes
each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.finished import read_done
from m2mkd_ds.checkpoint.store import read_json, read_metadata
from m2mkd_ds.config import to_dict
from m2mkd_ds.train.context import RunContext
from m2mkd_ds.train.nodes import build_dag

_TEACHER_FIELDS = ("arch", "arch_args", "depths", "source")
"""The others say where teachers are served: addresses, certificates, tokens' files."""
_ORIGIN = {
    "baseline": "trained from scratch on labels alone, as the control of a run of module-to-module knowledge distillation (m2mKD)",
    "assembled": "put together from modules that were trained by module-to-module knowledge distillation (m2mKD), and not trained since",
}
"""Of models other than the student."""


def card(ctx: RunContext, what: str, scored_as: str, weights_file: Path) -> dict[str, Any]:
    """The card of model `what`, called `scored_as` in RUN/evaluate/results.json; its keys are those of `hf_card.write_card`."""
    source = ctx.train_index.source
    results_file = ctx.root / "evaluate" / "results.json"
    results = read_json(results_file, if_damaged=f"delete it and run `m2mkd eval {ctx.root}`") if results_file.is_file() else {}
    return {
        "name": f"V-MoE {what} of recipe {ctx.config.name}",
        **({"origin": _ORIGIN[what]} if what in _ORIGIN else {}),
        "dataset": source,
        "metrics": _metrics(results, scored_as),
        "experts": _experts(results, scored_as),
        "recipe": _recipe(ctx),
        "lineage": _lineage(ctx, weights_file),
        "training": _training(ctx),
        "data_licence": f"{source}: {ctx.train_index.license}",
    }


def _metrics(results: dict[str, Any], scored_as: str) -> dict[str, Any]:
    """top1, top5 and loss with their intervals; for the student also how it stands to the same model from scratch."""
    scores = results.get("models", {}).get(scored_as, {})
    metrics = {k: v for k, v in scores.items() if k in ("top1", "top1_ci", "top5", "top5_ci", "loss", "images", "agreement_with_teacher")}
    against = results.get("student_minus_baseline")
    if metrics and scored_as == "student" and against:
        metrics |= {"top1_minus_baseline": against["top1"], "top1_minus_baseline_ci": against["ci"]}
    return metrics


def _experts(results: dict[str, Any], scored_as: str) -> list[dict[str, Any]]:
    """One row a sparse block: rows routed to each expert on the validation images, entropy in nats, share of dropped choices."""
    load, entropy, drops = (results.get(key, {}).get(scored_as, {}) for key in ("expert_load", "entropy", "drop_rate"))
    return [{"block": int(block), "load": rows, "entropy": entropy[block], "drop_rate": drops[block]} for block, rows in load.items()]


def _recipe(ctx: RunContext) -> dict[str, Any]:
    tree = to_dict(ctx.config)
    recipe = {key: tree[key] for key in ("name", "seed", "meta", "student", "distill", "m2mkd", "end_to_end")}
    recipe["teacher"] = {key: tree["teacher"][key] for key in _TEACHER_FIELDS}
    for phase in ("m2mkd", "end_to_end"):
        recipe[phase]["ds_config"] = Path(recipe[phase]["ds_config"]).stem  # may be a path of this machine
    return recipe


def _lineage(ctx: RunContext, weights_file: Path) -> dict[str, Any]:
    """Teacher, data, versions, and what the weights file says of its own making."""
    teacher = ctx.config.teacher
    made = "by Deep Incubation in this run" if teacher.source == "incubate" else "pretrained, split into modules"
    lineage = {
        "teacher": f"{teacher.arch}, {made}, {len(teacher.depths)} modules of {', '.join(map(str, teacher.depths))} blocks",
        "train_data": ctx.train_index.fingerprint,
        "validation_data": ctx.val_index.fingerprint,
        **{f"weights.{key}": value for key, value in read_metadata(weights_file).items() if key != "train_data"},
    }
    done = read_done(weights_file.parent)
    if done is not None:
        lineage |= {"commit": done["commit"], **{f"versions.{name}": version for name, version in done["versions"].items()}}
    return lineage


def _training(ctx: RunContext) -> list[dict[str, Any]]:
    """One row a trained node of the run: steps, images, ranks, hours, device of a rank; and the commit that trained it."""
    rows = []
    for node in build_dag(ctx.config):
        done = read_done(ctx.root / node.name) if node.launched else None
        if done is not None and "steps" in done:
            hours = done["wall_s"] / 3600
            rows.append(
                {"phase": node.name, "steps": done["steps"], "images": done["images"], "ranks": done["world_size"], "hours": hours,
                 "device of a rank": done.get("device", "not recorded"), "commit": done["commit"]}
            )  # fmt: skip
    return rows
