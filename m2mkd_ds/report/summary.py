"""What both pages say in words and small tables: the cards on top, the times, the configuration in a dozen lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.logs import format_seconds
from m2mkd_ds.report.collect import NodeFacts, RunFacts, is_number
from m2mkd_ds.report.table import DASH, percent

TIME_COLUMNS = ("node", "wall time", "steps", "images", "images / s", "finished")

BAD_COLUMNS = ("list", "images", "uses replaced", "kinds")

ROUTER_TEXT = "routing entropy, busiest expert, dead experts and drop rate by block"
"""The router figure in words."""

PHASE_TITLES = {
    "pretrain_meta": "Meta model, trained on labels",
    "modular_train": "Teacher modules, each trained inside the meta model",
    "assemble_finetune": "Teacher, assembled and fine-tuned",
    "m2mkd": "Student modules, each taught by its teacher module",
    "end_to_end": "Student, assembled and trained end to end",
    "baseline": "The same V-MoE from scratch",
}


def cards(facts: RunFacts) -> list[tuple[str, str]]:
    """(value, name) of the few numbers that everyone looks for first; those that are not known are left out."""
    models = facts.results.get("models")
    models = models if isinstance(models, dict) else {}
    found = []
    for name, text in (("student", "student, final: top-1"), ("baseline", "from scratch: top-1"), ("teacher", "teacher: top-1")):
        scores = models.get(name)
        if isinstance(scores, dict) and is_number(scores.get("top1")):
            found.append((f"{percent(scores['top1'])} %", text))
    student = models.get("student")
    if isinstance(student, dict) and is_number(student.get("agreement_with_teacher")):
        found.append((f"{percent(student['agreement_with_teacher'], 1)} %", "student agrees with teacher"))
    total = total_seconds(facts.nodes)
    if total is not None:
        found.append((format_seconds(total), "wall time of all finished nodes"))
    return found


def total_seconds(nodes: Sequence[NodeFacts]) -> float | None:
    """Sum of the recorded wall times, None when none is recorded."""
    times = [node.wall_s for node in nodes if node.wall_s is not None]
    return sum(times) if times else None


def time_rows(nodes: Sequence[NodeFacts]) -> list[tuple[str, ...]]:
    """Cells of the table of times, in the order of TIME_COLUMNS, with a closing sum."""
    rows: list[tuple[str, ...]] = [
        (
            node.name,
            DASH if node.wall_s is None else _duration(node.wall_s),
            DASH if node.steps is None else f"{node.steps:,}",
            DASH if node.images is None else f"{node.images:,}",
            DASH if node.images_per_second is None else f"{node.images_per_second:,.0f}",
            _moment(node.finished),
        )
        for node in nodes
    ]
    total = total_seconds(nodes)
    return rows if total is None else [*rows, ("all", format_seconds(total), "", "", "", "")]


def bad_sample_counts(facts: RunFacts) -> dict[str, dict[str, Any]]:
    """By list: `images` (different ones), `uses` that were replaced, and `kinds` of the images; empty for a run without any."""
    counts: dict[str, dict[str, Any]] = {}
    for name, records in facts.bad_samples.items():
        kind_of = {str(record.get("sample")): str(record.get("kind")) for record in records}
        kinds = dict(sorted(Counter(kind_of.values()).items()))
        counts[name] = {"images": len(kind_of), "uses": len(records), "kinds": kinds}
    return counts


def bad_sample_rows(facts: RunFacts) -> list[tuple[str, ...]]:
    """Cells of the table of damaged training images, in the order of BAD_COLUMNS."""
    return [
        (name, f"{count['images']:,}", f"{count['uses']:,}", ", ".join(f"{kind} {number}" for kind, number in count["kinds"].items()))
        for name, count in bad_sample_counts(facts).items()
    ]


def caption_of_bad_samples() -> str:
    """What the table of damaged images says."""
    return "Training images that could not be used; another one took their place. `m2mkd shards verify` checks the shards."


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else format_seconds(seconds)


def _moment(iso: str | None) -> str:
    """`2026-01-02T03:04:05+00:00` -> `2026-01-02 03:04 UTC`; text that is no time stays as it is."""
    try:
        return datetime.fromisoformat(iso).astimezone(timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if iso else DASH
    except ValueError:
        return str(iso)


def config_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """(what, value) lines that describe the run; empty when its configuration could not be read."""
    config = facts.config
    if config is None:
        return []
    moe, router, distill = config.student.moe, config.student.moe.router, config.distill
    blocks = {"all": "every block", "every": f"every {moe.placement_n}. block", "last": f"the last {moe.placement_n} blocks"}
    return [
        ("recipe", config.name),
        ("data", f"{config.data.source or config.data.train}, {config.data.num_classes} classes, {config.data.image_size} px"),
        ("teacher", f"{config.teacher.arch}, stages of {list(config.teacher.depths)} blocks, {config.teacher.source}"),
        ("meta model", f"stages of {list(config.meta.depths)} blocks, the teacher's width"),
        ("student", f"width {config.student.embed_dim}, {config.student.num_heads} heads, patch {config.student.patch_size}, "
                    f"stages of {list(config.student.depths)} blocks"),
        ("experts", f"{moe.num_experts} in {blocks[moe.placement]}, {moe.activation}, backend {moe.backend}"),
        ("router", describe_router(router)),
        ("router losses", f"Switch {router.switch_weight:g}, importance {router.importance_weight:g}, load {router.load_weight:g}, "
                          f"z {router.z_weight:g}"),
        ("distillation", f"{distill.kd_type}, weight {distill.kd_weight:g}, temperature {distill.temperature:g}, {distill.kd_reduction}"),
        ("stitch layers", "kept after assembly" if config.student.keep_stitches else "dropped at assembly"),
        ("seed", str(config.seed)),
    ]  # fmt: skip


def describe_router(router: RouterConfig) -> str:
    """`topk, top-2, softmax after top-k, dropless` and what else is not at its default."""
    parts: list[str] = [router.kind]
    if router.kind != "expert_choice":
        parts += [f"top-{router.top_k}", f"softmax {router.softmax} top-k"]
    if router.kind == "noisy_topk":
        parts.append(f"noise {router.noise:g} / experts")
    factors = {"training": router.capacity_factor, "evaluation": router.eval_capacity_factor}
    bounds = [f"capacity factor {factor:g} in {mode}" for mode, factor in factors.items() if factor]
    parts += bounds or ["dropless"]
    if bounds and router.capacity_priority == "batch":
        parts.append("surest tokens first")
    if router.balance_rate:
        parts.append(f"loss-free balancing at rate {router.balance_rate:g}")
    return ", ".join(parts)


def caption_of_load() -> str:
    """How to read the heat map."""
    return (
        "Choices of each expert on the validation images, as a multiple of the even share: 1 is balance, 0 is an expert that nobody "
        "chooses."
    )


def caption_of_routing() -> str:
    """How to read the curves of the routers."""
    return (
        "A dead expert is chosen by no token of the step's last micro-batch on any rank. Dropped choices are those that an expert had no "
        "room for; a router without capacity drops none."
    )
