"""A TeacherPlan as text: two tables, and sentences that end in a recommendation."""

from __future__ import annotations

from io import StringIO

from rich import box
from rich.console import Console
from rich.table import Table

from m2mkd_ds.planner.teacher_plan import Job, TeacherPlan

WIDTH = 140


def format_plan(plan: TeacherPlan) -> str:
    """What `m2mkd teacher-server --plan` prints."""
    cluster, gpu = plan.cluster, plan.cluster.gpu
    server = f"{gpu.server_tflops or gpu.tflops:g} TFLOP/s at {100 * gpu.mfu_server:g} %"
    head = (
        f"{plan.name}: {len(plan.pair_jobs)} pairs, hidden states of {plan.tokens} x {plan.width}, {plan.precision}, decode={plan.decode}\n"
        f"Assumed: jobs of {cluster.trainer_gpus} trainer GPUs of {gpu.tflops:g} TFLOP/s at {100 * gpu.mfu_trainer:g} %, server GPUs of "
        f"{server}, {cluster.network_gbps:g} Gb/s of which {100 * cluster.network_share:g} % are usable.\n"
        + ("The phase runs in fp32: give --tflops, the peak of your GPUs in fp32.\n" if plan.precision == "fp32" else "")
        + (f"Given: {cluster.images_per_s:g} images a second a job.\n" if cluster.images_per_s else "")
    )
    return "\n".join([head, _text(_work_table(plan)), _text(_traffic_table(plan)), *_sentences(plan)]) + "\n"


def _work_table(plan: TeacherPlan) -> Table:
    unit, letter = (1e9, "G") if plan.all_job.work.colocated >= 1e9 else (1e6, "M")
    table = _table(f"Work of one image, {letter}FLOP (2 a multiply-add; experts without padding), and what a job of it needs")
    for name in ("pair", "server: prefix", "module", "suffix", "sum", "trainer: student", "suffix", "sum", "colocated",
                 "server GPUs a trainer GPU", "images/s", "server GPUs"):  # fmt: skip
        table.add_column(name, justify="right")
    for job in (*plan.pair_jobs, plan.all_job):
        table.add_row(_job_name(plan, job), *_job_cells(job, unit))
    return table


def _job_name(plan: TeacherPlan, job: Job) -> str:
    return "all, one job" if job is plan.all_job else str(job.work.pairs[0])


def _job_cells(job: Job, unit: float) -> list[str]:
    work = job.work
    flops = (work.prefix, work.module, work.suffix, work.server, work.student, work.student_suffix, work.trainer, work.colocated)
    return [*(f"{value / unit:.1f}" for value in flops), f"{job.server_share:.2f}", _count(job.images_per_s), f"{job.server_gpus:.2f}"]


def _traffic_table(plan: TeacherPlan) -> Table:
    table = _table("Payloads: bytes of one image, what a server sends for those jobs, and what the network carries")
    for name in ("payload", "wire dtype", "KB: pair 0", "another pair", "all", "Gb/s: all, one job", "one job a pair",
                 "images/s carried: pair", "all, one job", "trainer computes", "fits"):  # fmt: skip
        table.add_column(name, justify="left" if name in ("payload", "wire dtype") else "right")
    for one in plan.traffic:
        extra = f"+{100 * one.extra / plan.all_job.work.trainer:.0f} %" if one.extra else "-"
        table.add_row(
            one.payload, "bf16, fp16" if one.wire_dtype == "bf16" else one.wire_dtype, _kilo(one.pair_bytes[0]), _kilo(one.pair_bytes[-1]),
            _kilo(one.all_bytes), _gbps(one.all_gbps), _gbps(sum(one.pair_gbps)), _count(one.pair_fits_per_s[-1]),
            _count(one.all_fits_per_s), extra, "yes" if one.fits else "no",
        )  # fmt: skip
    return table


def _sentences(plan: TeacherPlan) -> list[str]:
    memory = (
        f"Memory of the teacher's side: {plan.teacher_parameters / 1e6:.1f} M parameters of all modules and of the meta model, "
        f"{_bytes(plan.weight_bytes)} in {plan.precision}, and about {_bytes(plan.activation_bytes)} for one micro-batch."
    )
    share = (
        f"Colocated, a trainer GPU reaches {100 * plan.all_job.colocated_share:.0f} % of the images a second of one that is fed (the "
        "teacher's part at the servers' share of the peak): on GPUs of one kind a server saves no GPU-hours; on cheaper or idle ones it "
        "does."
    )
    stored = (
        [f"Stored logits (teacher-export, 16 bits): {_bytes(plan.stored_bytes)} a pair and epoch; later runs then need no teacher at all."]
        if plan.stored_bytes
        else []
    )
    return [memory, share, *stored, f"Recommended: {_recommendation(plan)}"]


def _recommendation(plan: TeacherPlan) -> str:
    best, usable = plan.recommended, plan.cluster.network_gbps * plan.cluster.network_share
    if best is None:
        least = min(plan.traffic, key=lambda one: one.all_gbps)
        return (
            f"feed=colocated or feed=replay, because the network carries {usable:.3g} Gb/s and even payload={least.payload} needs "
            f"{least.all_gbps:.3g}."
        )
    servers = f"{plan.server_gpus} server GPU{'s' if plan.server_gpus > 1 else ''} for {plan.cluster.trainer_gpus} trainer GPUs"
    takes = f"{best.all_gbps:.3g} of {usable:.3g} Gb/s and {servers} with all pairs in one job"
    if best.payload == "hidden":
        return f"payload=hidden wire_dtype=auto: {takes}."
    hidden = next(one for one in plan.traffic if one.payload == "hidden" and one.wire_dtype == plan.precision)
    price = "run the prefix" + (" and read the shards themselves" if best.payload == "logits" else "")
    needs = f"payload=hidden would need {hidden.all_gbps:.3g} Gb/s"
    return f"payload={best.payload}: {takes}; {needs}. Trainers {price}.{_with_fast(plan, usable)}"


def _with_fast(plan: TeacherPlan, usable: float) -> str:
    """What data.decode=fast would change: a quarter of the pixels' bytes."""
    if plan.decode == "fast" or plan.fast_image_gbps > usable:
        return ""
    return f" With data.decode=fast, payload=image would need {plan.fast_image_gbps:.3g} Gb/s."


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)


def _text(table: Table) -> str:
    out = StringIO()
    Console(file=out, width=WIDTH, color_system=None, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines() if line.strip()) + "\n"


def _kilo(num_bytes: float) -> str:
    return f"{num_bytes / 1e3:.1f}" if num_bytes >= 1e3 else f"{num_bytes / 1e3:.2g}"


def _gbps(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _bytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2g} MB"
