"""A RunPlan as text of at most 120 columns, and as plain data for JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from io import StringIO
from textwrap import fill
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from m2mkd_ds.planner.ledger import PARTS
from m2mkd_ds.planner.run_plan import PhasePlan, RunPlan, Setting, Speed

WIDTH = 120
SCHEMA = "m2mkd plan 1"
"""Stands in every JSON; a change of the fields' meaning is a new number."""


def format_run_plan(plan: RunPlan) -> str:
    """What `m2mkd plan` prints."""
    size, flops = _size_unit(plan), _flops_unit(plan)
    memory = ("phase", *PARTS, "sum", "")
    blocks = [
        _head(plan),
        _table("Parameters, millions", _PARAMETER_COLUMNS, map(_parameters, plan.phases)),
        _table(f"Memory of a rank at its fullest moment as configured, {size.name}", memory, [_memory(plan, p, size) for p in plan.phases]),
        "".join(_paragraph(_below_memory(phase), "  ") for phase in plan.phases),
        _table(
            f"Work of an image, {flops.name}; of a step, PFLOP; what a rank sends in a step, {size.name}, and how long links need for it",
            _WORK_COLUMNS, [_work(phase, size, flops) for phase in plan.phases],
        ),
        _table("Speed as configured: images a second by what limits them", _SPEED_COLUMNS, map(_speed, plan.phases)),
        _hours(plan),
        *(_settings_table(plan, phase, size) for phase in plan.phases),
        "Recommended\n\n" + "".join(_recommendation(phase) for phase in plan.phases),
    ]  # fmt: skip
    return "\n".join(block for block in blocks if block)


class _Unit(NamedTuple):
    name: str
    size: float

    def __call__(self, number: float) -> str:
        value = number / self.size
        return "0" if value == 0 else f"{value:.2f}" if value < 10 else f"{value:,.1f}"


def _size_unit(plan: RunPlan) -> _Unit:
    """GB where there are any."""
    largest = max((phase.memory.total for phase in plan.phases if phase.memory), default=0)
    return _Unit("GB", 1e9) if largest >= 2e9 else _Unit("MB", 1e6)


def _flops_unit(plan: RunPlan) -> _Unit:
    return _Unit("GFLOP", 1e9) if max(phase.work.total for phase in plan.phases) >= 1e9 else _Unit("MFLOP", 1e6)


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """Plain data; every field is there, also where it is null."""
    tree = {"schema": SCHEMA, **asdict(plan), "hours": plan.hours, "usable_bytes": plan.cluster.usable_bytes}
    for phase, data in zip(plan.phases, tree["phases"], strict=True):
        if phase.memory is not None:
            data["memory"]["total"] = phase.memory.total
        data["parameters"]["total"] = phase.parameters.total
        data["work"]["total"] = phase.work.total
        _add_rates(phase.speed, data["speed"])
        for setting, into in zip(phase.settings, data["settings"], strict=True):
            into["fits"] = setting.fits
            _add_rates(setting.speed, into["speed"])
        if phase.recommended is not None:
            data["recommended"]["fits"] = True
            _add_rates(phase.recommended.speed, data["recommended"]["speed"])
    return tree


def _add_rates(speed: Speed | None, into: dict[str, Any]) -> None:
    if speed is not None:
        into |= {"images_per_s": speed.images_per_s, "limit": speed.limit}


def _head(plan: RunPlan) -> str:
    c = plan.cluster
    return _paragraph(
        f"{plan.name} on {c.nodes} x {c.gpus_per_node} {'GPUs' if c.device == 'gpu' else 'CPU ranks'} of {c.gpu_memory_gb:g} GB "
        f"({c.memory_reserve_gb:g} of it reserved), {c.tflops:g} TFLOP/s at {100 * c.mfu:g} %; {c.gpu_bandwidth:g} GB/s inside a host, "
        f"{c.network_gbps:g} Gb/s between hosts. Memory, FLOPs and bytes are computed from the models; MFU and bandwidths are assumed."
    )


_PARAMETER_COLUMNS = ("phase", "trained", "a token uses", "dense", "experts", "stitches", "frozen teacher", "frozen meta", "total")
_WORK_COLUMNS = ("phase", "frozen", "forward", "backward", "PFLOP", "gradients", "weights", "rows", "teacher", "link s")
_SPEED_COLUMNS = ("phase", "images/s", "limit", "compute", "links", "loader", "no overlap", "batch", "steps", "hours", "GPU-hours")


def _parameters(phase: PhasePlan) -> list[str]:
    p = phase.parameters
    values = (p.trained, p.active, p.dense, p.experts, p.stitches, p.frozen_teacher, p.frozen_meta, p.total)
    return [phase.name, *(f"{value / 1e6:,.1f}" for value in values)]


def _memory(plan: RunPlan, phase: PhasePlan, size: _Unit) -> list[str]:
    if phase.memory is None:
        return [phase.name, *[""] * len(PARTS), "", "refused"]
    over = phase.memory.total - plan.cluster.usable_bytes
    verdict = "fits" if over <= 0 else f"{size(over)} too much"
    return [phase.name, *(size(phase.memory.parts[part]) for part in PARTS), size(phase.memory.total), verdict]


def _below_memory(phase: PhasePlan) -> str:
    """A column could not hold it, or would push the others together."""
    return f"fullest: {phase.memory.when}" if phase.memory else f"refused: {phase.name}: {phase.refused}"


def _work(phase: PhasePlan, size: _Unit, flops: _Unit) -> list[str]:
    work, sent = phase.work, phase.wire
    cells = [phase.name, flops(work.frozen), flops(work.forward), flops(work.backward), f"{work.total * phase.global_batch / 1e15:.3g}"]
    if sent is None:
        return [*cells, *[""] * 5]
    return [*cells, size(sent.gradients), size(sent.weights), size(sent.exchange), size(sent.teacher), f"{sent.network_s:.3g}"]


def _speed(phase: PhasePlan) -> list[str]:
    s = phase.speed
    if s is None:
        return [phase.name, *[""] * 10]
    rates = [_rate(s.compute), _rate(s.network), _rate(s.loader), _rate(s.serial)]
    time = ["-", "-", "-"] if phase.steps is None or phase.hours is None else [
        f"{phase.steps:,}", f"{phase.hours:,.2f}", f"{phase.hours * phase.layout.ranks:,.1f}"
    ]  # fmt: skip
    return [phase.name, _rate(s.images_per_s), s.limit, *rates, f"{phase.global_batch:,}", *time]


def _hours(plan: RunPlan) -> str:
    if not plan.images:
        return "Hours need the images of an epoch: give --images N, or shards that are there (data.train).\n"
    if plan.hours is None:
        return "Some phase is refused as configured, so the run has no hours.\n"
    cost = f"{plan.hours:,.2f} hours, {plan.hours * plan.cluster.ranks:,.1f} GPU-hours"
    return f"All of these phases: {cost}, at {plan.images:,} images an epoch.\n"


def _settings_table(plan: RunPlan, phase: PhasePlan, size: _Unit) -> str:
    """Lines: engine file and ep_size; columns: micro-batches; cells: bytes of the fullest moment, `!` where that does not fit."""
    sizes = sorted({one.micro_batch_size for one in phase.settings})
    lines: dict[tuple[str, int], list[Setting]] = {}
    for one in phase.settings:
        lines.setdefault((one.ds_config, one.ep_size), []).append(one)
    rows, refused = [], []
    for (file, ep), group in lines.items():
        if group[0].refused:
            refused.append(f"  {file} ep {ep} is refused: {group[0].refused}\n")
            continue
        fitting = [one for one in group if one.fits]
        largest = str(max(one.micro_batch_size for one in fitting)) if fitting else "none"
        cells = [f"{size(one.peak_bytes or 0)}{'' if one.fits else '!'}" for one in group]
        rows.append([file, str(ep), *cells, largest])
    limit = f"! is more than the {size(plan.cluster.usable_bytes)} that a rank has"
    title = f"{phase.name}: {size.name} of a rank by micro-batch ({phase.layout.precision}); {limit}"
    return _table(title, ("", "ep", *map(str, sizes), "largest"), rows) + "".join(refused)


def _recommendation(phase: PhasePlan) -> str:
    best = phase.recommended
    if best is None or best.speed is None:
        return _paragraph(f"{phase.name}: {phase.why}.", "  ")
    fields = {"micro_batch_size": best.micro_batch_size, "gradient_accumulation_steps": best.accumulation, "ds_config": best.ds_config}
    fields |= {"ep_size": best.ep_size} if phase.parameters.experts else {}
    owner = "end_to_end" if phase.name == "baseline" else phase.name
    words = " ".join(f"{owner}.{field}={value}" for field, value in fields.items())
    return _paragraph(f"{phase.name}: --set {words}: {_rate(best.speed.images_per_s)} images/s; {phase.why}.", "  ")


def _paragraph(text: str, indent: str = "") -> str:
    lines = fill(text, WIDTH, initial_indent=indent, subsequent_indent=2 * indent, break_long_words=False, break_on_hyphens=False)
    return lines + "\n"


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number == 0 or name == "" else "right", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(table)
    return _paragraph(title) + "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip()) + "\n"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
