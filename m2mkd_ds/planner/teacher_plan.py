"""What a plan of a teacher server is made from (Gpu, Cluster) and what it says (TeacherPlan); planner/teacher.py fills it."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, inf

from m2mkd_ds.planner.answer_bytes import Payload


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
    """All numbers of a plan; `planner/teacher_text.py` shows them."""

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
