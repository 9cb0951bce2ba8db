"""The training step of `m2mkd bench teacher`: what a trainer waits for its teacher, whichever way its outputs come.

The step is the trainer's own for the middle pair of three on a small ViT (bench/step.py): the feed's batch, student module, frozen
suffix, loss, backward, AdamW.

    colocated     prefix, teacher module and its suffix run in the trainer, on images in memory
    shm, remote   the trainer's RemoteFeed asks a service in the other process; its producer answers from memory at a set pace, `headroom`
                  times as fast as the trainer steps: a stand-in for a teacher on hardware of its own
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import inf
from statistics import median

import torch

from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.bench.step import NUM_CLASSES, Scene
from m2mkd_ds.bench.teacher_batches import PRINTS, Batches, Shape
from m2mkd_ds.bench.teacher_host import Host
from m2mkd_ds.bench.teacher_options import Feed, TeacherBench
from m2mkd_ds.config import DataConfig, DistillConfig, PhaseConfig, TeacherConfig
from m2mkd_ds.data.batch import ImageBatch
from m2mkd_ds.data.loader import TrainLoader
from m2mkd_ds.teacher.client.connect import connect
from m2mkd_ds.teacher.client.receive import Assembler
from m2mkd_ds.teacher.client.remote import RemoteFeed, Stream
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch, TeacherFeed
from m2mkd_ds.teacher.protocol.answer_check import AnswerShapes
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.steps import pair_step

TOKENS = 197
BACKEND = "loop"
CALIBRATION = 3
"""Steps of the trainer before each pass."""
CPU = torch.device("cpu")
_END = 10**9
"""Steps that a feed is made for: more than are taken."""


def step_shape(options: TeacherBench) -> Shape:
    """The batches of the training step: fp32, as the step computes."""
    return Shape(options.step_images, TOKENS, options.step_width, NUM_CLASSES, "fp32", options.in_flight + 1, options.seed + 1)


@dataclass(frozen=True)
class Trained:
    """What one pass of steps took."""

    steps: int
    images: int
    """A step."""
    wall_s: float
    feed_s: float
    """Within the feed's `batch`: for colocated, the teacher's work."""
    wait_s: float
    """What the feed itself reports as waiting for a server."""
    step_s: float
    """Median of a step without its feed."""
    pace_s: float | None
    """Seconds that the producer takes for a batch."""


class StepBench:
    """One student, and a feed of each kind."""

    def __init__(self, options: TeacherBench, host: Host) -> None:
        o = options
        expert = ExpertBench(tokens=o.step_images * TOKENS, dim=o.step_width, hidden=4 * o.step_width, seed=o.seed)
        self._options, self._host = options, host
        self._shape = step_shape(options)
        self._scene = Scene(expert, 0, CPU, torch.float32)
        self._student = self._scene.student(experts=True, backend=BACKEND)
        self._optimizer = build_adamw(self._student, PhaseConfig())
        self._fastest_s = inf
        """Of all steps without their feed: a slow moment of the machine must not make the producer slower than asked for."""
        self._feeds: dict[Feed, TeacherFeed] = {}
        self._steps: dict[Feed, int] = {}
        for feed in o.feeds:
            if feed == "colocated" or feed in host.started.feeds:
                self._feeds[feed] = self._colocated() if feed == "colocated" else self._remote(feed, host.started.feeds[feed])
                self._steps[feed] = 0

    @property
    def feeds(self) -> tuple[Feed, ...]:
        """Those that can be had here."""
        return tuple(self._feeds)

    def measure(self, feed: Feed) -> Trained:
        """One pass: the producer's pace is set by the fastest step so far, then as many steps as asked for are taken."""
        o = self._options
        pace_s = None
        if feed != "colocated":
            self._calibrate()
            pace_s = self._fastest_s / o.headroom
            self._host.set_pace(pace_s)
        for _ in range(o.in_flight + 1):  # what was asked for ahead at another pace is used up
            self._train(self._batch(feed))
        feeding, waited, computing = [], [], []
        began = time.perf_counter()
        for _ in range(o.steps):
            asked = time.perf_counter()
            batch = self._batch(feed)
            feeding.append(time.perf_counter() - asked)
            waited.append(batch.wait_s)
            computing.append(self._train(batch))
        wall_s = time.perf_counter() - began
        return Trained(o.steps, o.step_images, wall_s, sum(feeding), sum(waited), median(computing), pace_s)

    def check(self, feed: Feed) -> None:
        """A batch of a server is the one that was sent. Raises RuntimeError."""
        batches = Batches(self._shape)
        for number in range(self._steps[feed], self._steps[feed] + 2 * self._shape.num_contents):
            got, sent = self._batch(feed), batches.tensors(number)
            pairs = [(got.hidden[1], sent["hidden.1"]), (got.teacher_logits[1], sent["logits.1"]), (got.targets_BV, sent["targets"])]
            if not all(torch.equal(one, other) for one, other in pairs):
                raise RuntimeError(f"feed {feed}: batch {number} is not what was sent")

    def close(self) -> None:
        """End threads and connections."""
        for feed in self._feeds.values():
            feed.close()

    def _train(self, batch: TeacherBatch) -> float:
        """One step on a batch; its seconds."""
        began = time.perf_counter()
        scene = self._scene
        self._optimizer.zero_grad(set_to_none=True)
        pair_step(self._student, scene.pair, scene.meta, batch, DistillConfig(), log=False).loss.backward()
        self._optimizer.step()
        step_s = time.perf_counter() - began
        self._fastest_s = min(self._fastest_s, step_s)
        return step_s

    def _calibrate(self) -> None:
        """A few steps fed from memory, for the fastest that is known."""
        shape, scene = self._shape, self._scene
        hidden = torch.randn(shape.images, shape.tokens, shape.width, generator=torch.Generator().manual_seed(shape.seed))
        logits = {scene.pair.index: torch.zeros(shape.images, shape.classes)}
        batch = TeacherBatch({scene.pair.index: hidden}, logits, scene.targets_BV, torch.arange(shape.images))
        for _ in range(CALIBRATION):
            self._train(batch)

    def _batch(self, feed: Feed) -> TeacherBatch:
        step = self._steps[feed]
        self._steps[feed] += 1
        slots = self._shape.layout.positions(step, 0, 0)
        return self._feeds[feed].batch(BatchRequest(step, 0, slots, (self._scene.pair.index,), True))

    def _colocated(self) -> ColocatedFeed:
        scene, pair = self._scene, self._scene.pair
        loader = _Images(self._shape, scene)
        return ColocatedFeed(loader, (pair,), scene.meta, {pair.index: scene.teacher}, device=CPU, dtype=torch.float32)

    def _remote(self, feed: Feed, endpoint: str) -> RemoteFeed:
        scene, shape = self._scene, self._shape
        config = TeacherConfig(feed=feed, endpoints=(endpoint,), wire_dtype=shape.wire_dtype, prefetch=self._options.in_flight)
        stream = Stream(
            layout=shape.layout, rank=0, start_step=0, total_steps=_END, pairs=(scene.pair.index,), with_teacher=True,
            fingerprints=dict(PRINTS),
        )  # fmt: skip
        data = DataConfig(num_classes=shape.classes, image_size=scene.images.size)
        shapes = AnswerShapes(
            num_classes=shape.classes, tokens=shape.tokens, width=shape.width, image_size=data.image_size, fast=False,
            logits_dtype=shape.wire_dtype,
        )  # fmt: skip
        assembler = Assembler(data, (scene.pair,), scene.meta, shapes, device=CPU, dtype=torch.float32)
        return RemoteFeed(stream, config, assembler, partial(connect, config=config), None, None)


class _Images(TrainLoader):
    """The same images in memory for every batch: neither decoding nor augmentation is part of this measurement."""

    def __init__(self, shape: Shape, scene: Scene) -> None:
        self._shape, self._scene = shape, scene

    def __iter__(self) -> Iterator[ImageBatch]:
        labels_B = torch.zeros(self._shape.images, dtype=torch.int64)
        for step in range(_END):
            slots = torch.tensor(self._shape.layout.positions(step, 0, 0))
            yield ImageBatch(self._scene.pixels_BCHW, self._scene.targets_BV, labels_B, slots, step, 0)

    def close(self) -> None:
        """Nothing to end."""
