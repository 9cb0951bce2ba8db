"""The GPUs and the network that a plan is made for. Imports nothing heavy: the command line reads it for `--help`."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf


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
