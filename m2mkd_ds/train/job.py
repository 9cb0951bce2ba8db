"""What the training loop works on: trainees (modules with their engines) and the job that they share. Built by `phases/jobs.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from m2mkd_ds.config import CheckpointConfig, PhaseConfig
from m2mkd_ds.data.plan import BatchLayout, StreamState
from m2mkd_ds.distributed.engine import Engine
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import MetricsWriter
from m2mkd_ds.moe.routers import LinearRouter
from m2mkd_ds.teacher.feed import TeacherBatch, TeacherFeed
from m2mkd_ds.trackers.trackers import Trackers
from m2mkd_ds.train.balance import biased_routers
from m2mkd_ds.train.ending.stopping import StopFlag
from m2mkd_ds.train.evaluation.evaluate import Score
from m2mkd_ds.train.schedule import lr_at, num_warmup_steps, scaled_lr
from m2mkd_ds.train.steps import StepOutput


@dataclass
class Trainee:
    """One module in training."""

    name: str
    """For logs: `end_to_end`, `m2mkd pair 2`."""
    pair: int
    """Teaching pair; 0 for whole models, whose input is the image as for pair 0."""
    folder: Path
    engine: Engine
    step_fn: Callable[[TeacherBatch, bool], StepOutput]
    """(batch, log) -> loss and metrics, through `engine`."""
    fingerprint: str
    """Of the node; a checkpoint made for another one is not resumed."""
    average: nn.Module | None = None
    """With ema_decay: a second module of the same shape, into which the averaged weights are put for evaluation."""
    step: int = 0
    """Optimizer steps done."""
    metrics: MetricsWriter | None = None
    trackers: Trackers | None = None
    """On rank 0, who else gets the metrics."""
    pending: dict[str, Any] = field(default_factory=dict)
    """Metrics of the current step, written at its end."""
    routers: dict[int, LinearRouter] = field(init=False)
    """Routers with a balance bias by block, which the loop moves after every step; none without balance_rate."""

    def __post_init__(self) -> None:
        self.routers = biased_routers(self.engine.module)


@dataclass(frozen=True)
class Job:
    """Everything the loop needs."""

    phase_name: str
    phase: PhaseConfig
    world: World
    seed: int
    total_steps: int
    num_images: int
    trainees: list[Trainee]
    make_feed: Callable[[int], TeacherFeed]
    """start step -> feed that answers from there on."""
    evaluate: Callable[[list[Trainee]], dict[str, Score]]
    """Scores on the validation set by trainee name."""
    with_teacher: bool
    folder: Path
    """Where the list of damaged samples goes: they are the stream's, and all trainees share it."""
    stream: StreamState
    """The data stream at its start (position 0)."""
    max_bad_samples: int
    """Different damaged samples that are replaced before the job stops (`bad_samples.resolve_cap`)."""
    open_trackers: Callable[[Trainee], Trackers | None] = lambda trainee: None
    """Called on rank 0, once the trainee has its checkpoint's step."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written, and which stay."""
    lineage: Mapping[str, str] = field(default_factory=dict)
    """Recipe, data and inputs, for the record of checkpoints."""
    stop: StopFlag = field(default_factory=StopFlag)
    """Set when this process is asked to stop; one rank's is enough."""

    @property
    def layout(self) -> BatchLayout:
        """How a step's images are dealt to ranks and micro-steps."""
        return BatchLayout(
            micro_batch_size=self.phase.micro_batch_size, accumulation=self.phase.gradient_accumulation_steps, world=self.world.size
        )

    @property
    def global_batch_size(self) -> int:
        """Images an optimizer step."""
        return self.layout.global_batch

    @property
    def warmup_steps(self) -> int:
        """Steps of the linear warm-up."""
        return num_warmup_steps(self.phase, self.num_images, self.global_batch_size)

    def learning_rate(self, step: int) -> float:
        """Of optimizer step `step`, 0..total_steps-1."""
        phase, peak = self.phase, scaled_lr(self.phase, self.global_batch_size)
        return lr_at(
            step, total_steps=self.total_steps, warmup_steps=self.warmup_steps, peak=peak, min_lr=phase.min_lr, warmup_lr=phase.warmup_lr
        )  # fmt: skip
