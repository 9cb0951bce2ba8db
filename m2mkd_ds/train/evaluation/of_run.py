"""The node `evaluate`: every model of a run on every validation image, decoded once, with the meta prefix chain run once.

meta, teacher            whole models
teacher_hybrid_i         T_i between meta stages: what the student of pair i is taught by
student_hybrid_i         S_i (with stitches) between meta stages: what m2mkd trained
student_cold             the S_i put together, before any end-to-end step
student, baseline        after end_to_end; from scratch with as many steps
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.finished import read_done
from m2mkd_ds.checkpoint.mapping import load_exact
from m2mkd_ds.checkpoint.store import read_weights, write_json_atomic
from m2mkd_ds.config import ConfigError
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze
from m2mkd_ds.distill.pairs import TeachingPair, stitch_specs
from m2mkd_ds.distributed.world import barrier
from m2mkd_ds.models.meta import run_stages
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VisionMoE, count_parameters
from m2mkd_ds.train.context import RunContext, load_meta, load_teacher_stages
from m2mkd_ds.train.ending.stopping import stop_requested
from m2mkd_ds.train.evaluation.evaluate import EvaluationAbandoned, Output, Score, paired_interval
from m2mkd_ds.train.loop import NonFiniteLossError
from m2mkd_ds.train.nodes import Node, withdraw_done, write_done
from m2mkd_ds.train.phases.end_to_end import student_stitches
from m2mkd_ds.train.phases.jobs import run_evaluation, scored
from m2mkd_ds.train.steps import unpack

_MADE_BY = {
    "meta": "pretrain_meta", "teacher": "the teacher", "teacher_hybrid": "the teacher", "student_hybrid": "m2mkd", "student_cold": "m2mkd",
    "student": "end_to_end", "baseline": "baseline",
}  # fmt: skip
"""Who trained a model, by its name without the number of a pair."""

Hidden = dict[int, Tensor]
"""h_i by pair; h_0 is the image."""

Model = Callable[[Hidden], Output]


def evaluate_run(ctx: RunContext, node: Node, print_: str) -> None:
    """Write RUN/evaluate: results.json, the predictions of every model, and done.json for the fingerprint `print_`."""
    folder = ctx.root / node.name
    started = time.time()
    scores, results = score_run(ctx)
    if ctx.world.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        withdraw_done(folder)
        write_json_atomic(folder / "results.json", results)
        write_json_atomic(folder / "predictions.json", {name: s.predictions_N.tolist() for name, s in scores.items()})
        files = [folder / "results.json", folder / "predictions.json"]
        facts = {"wall_s": time.time() - started, "images": ctx.val_index.num_samples, "world_size": ctx.world.size}
        write_done(folder, node, ctx.config, print_, files, **facts)
    barrier()


def score_run(ctx: RunContext) -> tuple[dict[str, Score], dict[str, Any]]:
    """Scores of all models by name, and the content of results.json; writes nothing. Raises, on every rank, StopRequested when it is
    to stop, NonFiniteLossError for a model whose scores are no numbers."""
    _check_equal_steps(ctx)
    models, sizes = build_models(ctx)
    meta = load_meta(ctx, set(range(len(ctx.pairs))), torch.float32)
    try:
        scores = run_evaluation(ctx, lambda images: meta.hidden_states(images, ctx.pairs), models(meta), torch.float32)
    except EvaluationAbandoned:
        raise stop_requested("evaluate", 0, ctx.stop) from None
    return scores, summarise_scores(scores, sizes, seed=ctx.config.seed, world_size=ctx.world.size)


def _check_equal_steps(ctx: RunContext) -> None:
    """The control must have had as many steps as the student; they differ when it was launched with another number of ranks."""
    if ctx.config.baseline:
        steps = {name: (read_done(ctx.root / name) or {}).get("steps", 0) for name in ("m2mkd", "end_to_end", "baseline")}
        if steps["baseline"] != steps["m2mkd"] + steps["end_to_end"]:
            raise ConfigError(
                f"the baseline was trained for {steps['baseline']} steps and the student for {steps['m2mkd']} + {steps['end_to_end']}: "
                f"launch all three with as many ranks; delete {ctx.root / 'baseline'} to train it again, or set baseline=false"
            )


def build_models(ctx: RunContext) -> tuple[Callable[[FrozenMeta], dict[str, Model]], dict[str, tuple[int, int]]]:
    """(function from the meta model to all models by name, {name: (parameters, parameters a token uses)})."""
    teacher = load_teacher_stages(ctx, torch.float32)
    pair_students = [_student_module(ctx, i) for i in range(len(ctx.pairs))]
    last = len(ctx.pairs) - 1
    whole_students = {
        "student_cold": _whole_student(ctx, "assemble", student_stitches(ctx)),
        "student": _whole_student(ctx, "end_to_end", student_stitches(ctx)),
    }
    if ctx.config.baseline:
        whole_students["baseline"] = _whole_student(ctx, "baseline", ())
    for stage in teacher:
        freeze(stage)

    def models(meta: FrozenMeta) -> dict[str, Model]:
        named: dict[str, Model] = {
            "meta": lambda h: (meta.stages[last](h[last]), {}),
            "teacher": lambda h: (run_stages(teacher, h[0])[-1], {}),
        }
        for pair in ctx.pairs:
            named[f"teacher_hybrid_{pair.index}"] = hybrid(meta, pair, teacher[pair.index])
            named[f"student_hybrid_{pair.index}"] = hybrid(meta, pair, pair_students[pair.index])
        named |= {name: _on_images(module) for name, module in whole_students.items()}
        return named

    return models, _sizes(ctx, teacher, whole_students)


def hybrid(meta: FrozenMeta, pair: TeachingPair, module: nn.Module) -> Model:
    """The module of a pair between meta stages."""

    def forward(hidden: Hidden) -> Output:
        output, _, stats = unpack(module(hidden[pair.index]))
        return meta.suffix(pair, output), stats

    return forward


def _on_images(module: nn.Module) -> Model:
    """A whole model."""
    forward = scored(module)
    return lambda hidden: forward(hidden[0])


def _student_module(ctx: RunContext, index: int) -> nn.Module:
    pair = ctx.pairs[index]
    stitches = stitch_specs(pair, teacher_width=ctx.teacher_width, student_width=ctx.student_arch.embed_dim)
    module = VisionMoE(ctx.student_arch, pair.student, stitches=stitches, seed=None)
    load_exact(module, read_weights(ctx.root / "m2mkd" / f"pair_{index}" / "weights.safetensors"))
    return ctx.place(freeze(module), torch.float32)


def _whole_student(ctx: RunContext, node: str, stitches: tuple[StitchSpec, ...]) -> nn.Module:
    module = VisionMoE(ctx.student_arch, StageSpan.whole(ctx.student_arch.num_blocks), stitches=stitches, seed=None)
    load_exact(module, read_weights(ctx.root / node / "weights.safetensors"))
    return ctx.place(freeze(module), torch.float32)


def _sizes(ctx: RunContext, teacher: list[nn.Module], students: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    """Parameter counts of the whole models; hybrids are scaffolds and have none of their own worth quoting."""
    of_teacher = sum(p.numel() for stage in teacher for p in stage.parameters())
    sizes = {"teacher": (of_teacher, of_teacher)}
    for name in students:
        stitches = () if name == "baseline" else student_stitches(ctx)
        sizes[name] = count_parameters(ctx.student_arch, stitches=stitches)
    return sizes


def summarise_scores(scores: dict[str, Score], sizes: dict[str, tuple[int, int]], *, seed: int, world_size: int) -> dict[str, Any]:
    """The content of results.json. Raises NonFiniteLossError for a score that is no number."""
    _check_finite(scores)
    taught = scores["teacher"].predictions_N
    models = {}
    for name, score in scores.items():
        models[name] = {**score.summary(), "agreement_with_teacher": float((score.predictions_N == taught).double().mean())}
        if name in sizes:
            models[name].update(parameters=sizes[name][0], active_parameters=sizes[name][1])
    sparse = {name: s for name, s in scores.items() if s.expert_load and name in ("student_cold", "student", "baseline")}
    results = {
        "num_images": scores["teacher"].images,
        "models": models,
        "expert_load": {n: {str(b): load.tolist() for b, load in s.expert_load.items()} for n, s in sparse.items()},
        "entropy": {n: {str(b): e / s.images for b, e in s.entropy_sum.items()} for n, s in sparse.items()},
        "drop_rate": {n: {str(b): d / s.images for b, d in s.drop_sum.items()} for n, s in sparse.items()},
        "seed": seed,
        "world_size": world_size,
    }
    if "baseline" in scores:
        results["student_minus_baseline"] = compare(scores["student"], scores["baseline"])
    return results


def _check_finite(scores: dict[str, Score]) -> None:
    """Here, where all ranks have the same sums and raise together: the file would refuse such numbers on rank 0, and the others wait."""
    wrong: dict[str, str] = {}
    for name, score in scores.items():
        sums = {"loss": [score.loss_sum], "routing entropy": score.entropy_sum.values(), "drop rate": score.drop_sum.values()}
        found = [f"a {what} of {value}" for what, values in sums.items() for value in values if not math.isfinite(value)]
        if found:
            wrong[name] = found[0]
    if wrong:
        nodes = dict.fromkeys(_MADE_BY[name.rstrip("_0123456789")] for name in wrong)
        raise NonFiniteLossError(
            f"evaluate: {', '.join(f'{name} has {what}' for name, what in wrong.items())} on the validation images; results.json takes "
            f"finite numbers only, and nothing was written: train {' and '.join(nodes)} again with a lower lr or with clip_grad"
        )


def compare(first: Score, second: Score) -> dict[str, Any]:
    """Difference in top-1 on the same images with its paired 95 % interval, from per-image hits."""
    only_first = int((first.hits_N > second.hits_N).sum())
    only_second = int((second.hits_N > first.hits_N).sum())
    low, high = paired_interval(only_first, only_second, first.images)
    return {"top1": first.top1 - second.top1, "ci": [low, high], "only_student_right": only_first, "only_baseline_right": only_second}
