"""`m2mkd teacher-server --plan`: what feeding students from a teacher server costs, for a model and a cluster.

    RunConfig -> shapes -> FLOPs an image (flops.py), bytes an image -> with a Cluster: rates, GPUs, Gb/s -> what fits -> TeacherPlan

Computed, not measured: MFU (the share of a GPU's peak that real work reaches) is an assumption that the caller states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import ceil, inf

from torch import nn

from m2mkd_ds.config import RunConfig
from m2mkd_ds.distill.pairs import stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import VitArch, meta_device_model
from m2mkd_ds.models.vit import VitStage
from m2mkd_ds.models.vmoe import arch_from_config
from m2mkd_ds.planner.answer_bytes import KINDS, WIRE_BYTES, AnswerBytes, Payload
from m2mkd_ds.planner.flops import Flops, student_flops, vit_stage_flops, vit_stage_tokens


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU and what it reaches; the defaults are an A100's dense bf16 peak and guesses for both kinds of work."""

    tflops: float = 312.0
    """Peak of the trainers' GPUs in the precision of the phase, 10^12 operations a second."""
    mfu_trainer: float = 0.30
    """Share of it that training of the MoE reaches."""
    mfu_server: float = 0.45
    """Share that inference of the frozen, dense teacher reaches."""
    server_tflops: float = 0.0
    """Peak of the servers' GPUs; 0: the same as the trainers'."""

    @property
    def trainer_flops_per_s(self) -> float:
        """Of one trainer GPU."""
        return self.tflops * 1e12 * self.mfu_trainer

    @property
    def server_flops_per_s(self) -> float:
        """Of one server GPU."""
        return (self.server_tflops or self.tflops) * 1e12 * self.mfu_server


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a training job has."""

    trainer_gpus: int = 8
    """Of one job."""
    network_gbps: float = 100.0
    """What all its batches come through: the port of a server or of the trainers' host, whichever is narrower, in 10^9 bits a second."""
    network_share: float = 0.9
    """Share of it that payload can use."""
    gpu: Gpu = field(default_factory=Gpu)
    images_per_s: float = 0.0
    """Images a job trains on a second; 0: what its GPUs compute."""
    epoch_images: int = 0
    """Images of an epoch, for the size of stored logits; 0: not known."""

    def __post_init__(self) -> None:
        gpu = self.gpu
        for name, value, high in (
            ("trainer_gpus", self.trainer_gpus, inf), ("network_gbps", self.network_gbps, inf), ("network_share", self.network_share, 1.0),
            ("tflops", gpu.tflops, inf), ("mfu_trainer", gpu.mfu_trainer, 1.0), ("mfu_server", gpu.mfu_server, 1.0),
        ):  # fmt: skip
            if not 0 < value <= high:
                raise ValueError(f"{name} is {value:g}; it must be above 0" + ("" if high == inf else f" and at most {high:g}"))
        for name, value in (("images_per_s", self.images_per_s), ("epoch_images", self.epoch_images), ("server_tflops", gpu.server_tflops)):
            if value < 0:
                raise ValueError(f"{name} is {value:g}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is computed for one image, in FLOPs: of one pair, or of all pairs in one job."""

    pairs: tuple[int, ...]
    prefix: float
    """Meta stages before the pair; for all pairs, the chain is walked once."""
    module: float
    """Teacher modules."""
    suffix: float
    """Meta stages after the teacher module."""
    student: float
    """Student modules with stitches, forward and backward."""
    student_suffix: float
    """Meta stages after the student, forward and the gradient of their input."""

    @property
    def server(self) -> float:
        """What a server computes."""
        return self.prefix + self.module + self.suffix

    @property
    def trainer(self) -> float:
        """What a trainer computes that is fed hidden states."""
        return self.student + self.student_suffix

    @property
    def colocated(self) -> float:
        """What a trainer computes that has the teacher in it."""
        return self.server + self.trainer


@dataclass(frozen=True, kw_only=True)
class Job:
    """`work` on a cluster."""

    work: Work
    images_per_s: float
    server_share: float
    """GPUs of servers for one GPU of trainers that are fed hidden states."""
    server_gpus: float
    """For `images_per_s`."""
    colocated_share: float
    """Images a second of a trainer with the teacher in it, over those of one that is fed."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One kind of payload, for all pairs in one job (`all`) or one job a pair (by pair)."""

    payload: Payload
    wire_dtype: str
    """Of hidden states; `-` where there are none."""
    pair_bytes: tuple[float, ...]
    """An image, by pair."""
    all_bytes: float
    """An image, all pairs in one answer."""
    pair_gbps: tuple[float, ...]
    """10^9 bits a second of each pair's job; a server for all of them sends the sum."""
    all_gbps: float
    pair_fits_per_s: tuple[float, ...]
    """Images a second that the network carries, by pair."""
    all_fits_per_s: float
    extra: float
    """FLOPs an image that the trainers of all pairs compute more than with payload=hidden: the prefix."""
    fits: bool
    """Whether the network carries what the job of all pairs computes."""


@dataclass(frozen=True, kw_only=True)
class TeacherPlan:
    """All numbers of a plan; `planner.teacher_text.format_plan` shows them."""

    name: str
    cluster: Cluster
    precision: str
    decode: str
    """data.decode, which images of a payload are uint8 with (fast) or fp32 (pil)."""
    tokens: int
    width: int
    pair_jobs: tuple[Job, ...]
    all_job: Job
    traffic: tuple[Traffic, ...]
    teacher_parameters: int
    """Teacher modules and meta stages of all pairs."""
    weight_bytes: float
    activation_bytes: float
    """Estimate for one micro-batch: residual, its normalised copy, qkv or hidden layer of one block, and the hidden states to be sent."""
    recommended: Traffic | None
    """The first of hidden (lossless), image, logits that the network carries; None: none of them."""
    fast_image_gbps: float
    """What payload=image would need with data.decode=fast, for all pairs in one job."""
    stored_bytes: float
    """Logits of one pair and epoch in 16 bits; 0: the images of an epoch are not known."""

    @property
    def server_gpus(self) -> int:
        """Whole GPUs of servers for the job of all pairs."""
        return ceil(self.all_job.server_gpus)


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
