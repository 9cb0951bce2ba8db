"""`m2mkd teacher-server --plan`: what feeding students from a teacher server costs, for a model and a cluster.

    RunConfig -> shapes -> FLOPs an image (flops.py), bytes an image -> with a Cluster: rates, GPUs, Gb/s -> what fits -> TeacherPlan

Computed, not measured: MFU (the share of a GPU's peak that real work reaches) is an assumption that the caller states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.distill.pairs import stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch, meta_device_model
from m2mkd_ds.models.vit import VitStage
from m2mkd_ds.models.vmoe import arch_from_config
from m2mkd_ds.planner.answer_bytes import KINDS, WIRE_BYTES, AnswerBytes, Payload
from m2mkd_ds.planner.flops import Flops, student_flops, vit_stage_flops, vit_stage_tokens
from m2mkd_ds.planner.teacher_plan import Cluster, Gpu, Job, TeacherPlan, Traffic, Work
from m2mkd_ds.planner.teacher_text import format_plan

__all__ = ["Cluster", "Gpu", "Job", "TeacherPlan", "Traffic", "Work", "format_plan", "plan_teacher"]


def plan_teacher(config: RunConfig, cluster: Cluster) -> TeacherPlan:
    """The plan of phase m2mkd of `config`. Raises ValueError for architectures whose FLOPs are not known."""
    teacher_arch, meta_arch = VitArch.from_teacher(config), VitArch.from_meta(config)
    pairs = teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths)
    modules = _stages(teacher_arch, [pair.teacher for pair in pairs])
    stages = _stages(meta_arch, stage_spans(config.meta.depths))
    tokens, width = vit_stage_tokens(modules[0]), int(modules[0].embed_dim)
    works = _pair_works(config, modules, stages, tokens, width)
    whole = _all_pairs(works)
    # Phases that leave it open run in bf16 wherever there are GPUs that are worth a plan.
    precision = "fp32" if config.m2mkd.precision == "fp32" else "bf16"
    pair_jobs, all_job = tuple(_job(work, cluster) for work in works), _job(whole, cluster)
    sizes = AnswerBytes(data=config.data, precision=precision, tokens=tokens, width=width)
    traffic = tuple(_traffic(sizes, payload, wire, cluster, pair_jobs, all_job) for payload, wire in KINDS)
    fast = replace(sizes, data=replace(config.data, decode="fast"))
    lossless = [one for one in traffic if one.wire_dtype in (precision, "-")]
    parameters = sum(p.numel() for stage in (*modules, *stages) for p in stage.parameters())
    element = WIRE_BYTES[precision]
    return TeacherPlan(
        name=config.name, cluster=cluster, precision=precision, decode=config.data.decode, tokens=tokens, width=width,
        pair_jobs=pair_jobs, all_job=all_job, traffic=traffic, teacher_parameters=parameters, weight_bytes=parameters * element,
        activation_bytes=config.m2mkd.micro_batch_size * tokens * (2 * width + _widest(modules[0]) + (len(pairs) - 1) * width) * element,
        recommended=next((one for one in lossless if one.fits), None),
        fast_image_gbps=_traffic(fast, "image", "-", cluster, pair_jobs, all_job).all_gbps,
        stored_bytes=2.0 * cluster.epoch_images * config.data.num_classes,
    )  # fmt: skip


def _stages(arch: VitArch, spans: Sequence[StageSpan]) -> list[VitStage]:
    """All stages of a model, without memory for weights; it is built once."""
    whole = meta_device_model(arch)
    return [VitStage(whole, span) for span in spans]


def _pair_works(config: RunConfig, modules: list[VitStage], stages: list[VitStage], tokens: int, width: int) -> tuple[Work, ...]:
    student_arch = arch_from_config(config)
    works = []
    for pair in teaching_pairs(config.teacher.depths, config.meta.depths, config.student.depths):
        # The first student module makes its tokens itself, and the suffix behind it runs on as many.
        student_tokens = student_arch.num_tokens if pair.is_first else tokens
        stitches = stitch_specs(pair, teacher_width=width, student_width=student_arch.embed_dim)
        student = student_flops(student_arch, pair.student, stitches, student_tokens)
        behind = sum((vit_stage_flops(stages[i], student_tokens) for i in pair.suffix_stages), Flops())
        work = Work(
            pairs=(pair.index,),
            prefix=sum(vit_stage_flops(stages[i], tokens).forward for i in pair.prefix_stages),
            module=vit_stage_flops(modules[pair.index], tokens).forward,
            suffix=sum(vit_stage_flops(stages[i], tokens).forward for i in pair.suffix_stages),
            student=student.forward + student.full_backward,
            student_suffix=behind.forward + behind.input_backward,
        )
        works.append(work)
    return tuple(works)


def _all_pairs(works: tuple[Work, ...]) -> Work:
    """One job for all pairs: the prefix of the last one passes by all others."""
    return Work(
        pairs=tuple(work.pairs[0] for work in works), prefix=max(work.prefix for work in works), module=sum(w.module for w in works),
        suffix=sum(w.suffix for w in works), student=sum(w.student for w in works), student_suffix=sum(w.student_suffix for w in works),
    )  # fmt: skip


def _job(work: Work, cluster: Cluster) -> Job:
    gpu = cluster.gpu
    trainer_s, server_s = work.trainer / gpu.trainer_flops_per_s, work.server / gpu.server_flops_per_s
    rate = cluster.images_per_s or cluster.trainer_gpus / trainer_s
    # With the teacher in the trainer, its part runs on the trainer's GPU, with the servers' MFU.
    teacher_s = work.server / (gpu.tflops * 1e12 * gpu.mfu_server)
    return Job(
        work=work, images_per_s=rate, server_share=server_s / trainer_s, server_gpus=rate * server_s,
        colocated_share=trainer_s / (trainer_s + teacher_s),
    )  # fmt: skip


def _traffic(sizes: AnswerBytes, payload: Payload, wire_dtype: str, cluster: Cluster, pair_jobs: tuple[Job, ...], all_job: Job) -> Traffic:
    def size(job: Job) -> float:
        return sizes.an_image(payload, wire_dtype, job.work.pairs)

    def gbps(job: Job) -> float:
        return 8e-9 * size(job) * job.images_per_s

    usable = cluster.network_gbps * cluster.network_share
    return Traffic(
        payload=payload, wire_dtype=wire_dtype, pair_bytes=tuple(map(size, pair_jobs)), all_bytes=size(all_job),
        pair_gbps=tuple(map(gbps, pair_jobs)), all_gbps=gbps(all_job),
        pair_fits_per_s=tuple(usable * 1e9 / 8 / size(job) for job in pair_jobs), all_fits_per_s=usable * 1e9 / 8 / size(all_job),
        extra=0.0 if payload == "hidden" else all_job.work.prefix, fits=gbps(all_job) <= usable,
    )  # fmt: skip


def _widest(stage: VitStage) -> int:
    """The widest inner layer of a block: qkv or the hidden layer of its MLP."""
    return max(m.out_features for m in stage.blocks[str(stage.span.first_block)].modules() if isinstance(m, nn.Linear))
