"""Level `step`: what a rank does in one step of m2mkd for the middle pair of three, on synthetic images.

    frozen prefix, teacher module and its suffix -> student module, frozen suffix, loss (forward) -> backward, AdamW (backward)

The forward and the loss are the trainer's own (`train.steps.pair_step`), the optimizer is built by `train.optim`; there is no engine
around them: no loader, no gradient reduction, fp32 or bf16 weights as `--dtype` says. Routing is that of a fresh student.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from m2mkd_ds.bench.cases import Absent, Case, Ran
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.config import DistillConfig, PhaseConfig
from m2mkd_ds.distill.hybrid import FrozenMeta, freeze, teacher_logits
from m2mkd_ds.distill.pairs import TeachingPair, stitch_specs, teaching_pairs
from m2mkd_ds.distributed.external.canonical import matching_router
from m2mkd_ds.models.variants import VitArch
from m2mkd_ds.models.vit import build_stage
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.moe.backends import BACKENDS
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.steps import pair_step

NUM_CLASSES = 1000
PATCH = 16


@dataclass(frozen=True)
class Images:
    """How the tokens asked for are made: images of a size, tokens each."""

    count: int
    size: int
    tokens_each: int

    @property
    def tokens(self) -> int:
        return self.count * self.tokens_each


def images_for(tokens: int) -> Images:
    """224-pixel images (197 tokens each) where they fit, else 32-pixel ones (5 tokens); at least one image, rounded down."""
    size = 224 if tokens >= 197 else 32
    each = (size // PATCH) ** 2 + 1
    return Images(max(tokens // each, 1), size, each)


def step_cases(options: ExpertBench, names: Sequence[str], *, rank: int, device: torch.device, dtype: torch.dtype) -> list[Case | Absent]:
    """`dense` (a student whose blocks have one network of the same FLOPs) and our backends, which share one student."""
    if options.activation != "gelu":
        return [
            Absent(name, "the student of this level has gelu experts; measure the other activations by --level layer") for name in names
        ]
    scene = Scene(options, rank, device, dtype)
    cases: list[Case | Absent] = []
    student = scene.student(experts=True)
    optimizer = build_adamw(student, PhaseConfig())
    for name in names:
        if name == "dense":
            dense = scene.student(experts=False)
            cases.append(_case(scene, name, dense, build_adamw(dense, PhaseConfig()), "a dense student of equal FLOPs"))
        elif name in BACKENDS:
            reason = BACKENDS[name].why_not(device=device, dtype=dtype, dim=options.dim, hidden=options.hidden, activation="gelu")
            cases.append(Absent(name, reason) if reason else _case(scene, name, student, optimizer, ""))
    return cases


class Scene:
    """Images, targets, frozen modules: the same for all cases, and for the steps of `bench teacher`."""

    def __init__(self, options: ExpertBench, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        o = options
        self.options, self.device, self.dtype = o, device, dtype
        self.images = images_for(o.tokens)
        depth = o.step_blocks
        self.pair: TeachingPair = teaching_pairs((depth,) * 3, (1, 1, 1), (depth,) * 3)[1]
        self.num_heads = next(heads for heads in range(max(o.dim // 64, 1), 0, -1) if o.dim % heads == 0)
        spans = [pair.teacher for pair in teaching_pairs((1,) * 3, (1,) * 3, (1,) * 3)]
        stages = {i: build_stage(self._vit(3), spans[i], seed=o.seed).to(device, dtype) for i in FrozenMeta.needed_stages([self.pair])}
        self.meta = FrozenMeta(stages)
        self.teacher = freeze(build_stage(self._vit(3 * depth), self.pair.teacher, seed=o.seed).to(device, dtype))
        generator = torch.Generator().manual_seed(o.seed + rank)
        size = self.images.size
        self.pixels_BCHW = torch.randn(self.images.count, 3, size, size, generator=generator).to(device, dtype)
        labels_B = torch.randint(NUM_CLASSES, (self.images.count,), generator=generator)
        self.targets_BV = nn.functional.one_hot(labels_B, NUM_CLASSES).float().to(device)

    def _vit(self, depth: int) -> VitArch:
        o = self.options
        args = {"embed_dim": o.dim, "depth": depth, "num_heads": self.num_heads, "mlp_ratio": o.hidden / o.dim}
        return VitArch("vit_base_patch16_224", args, NUM_CLASSES, self.images.size)

    def student(self, *, experts: bool, backend: str = "reference") -> VisionMoE:
        """The pair's student module; without experts its blocks have one network of K times the hidden width."""
        o = self.options
        blocks = 3 * o.step_blocks
        arch = VMoEArch(
            image_size=self.images.size,
            patch_size=PATCH,
            num_classes=NUM_CLASSES,
            embed_dim=o.dim,
            num_heads=self.num_heads,
            mlp_ratio=(1 if experts else o.top_k) * o.hidden / o.dim,
            num_blocks=blocks,
            moe_blocks=tuple(range(blocks)) if experts else (),
            num_experts=o.experts,
            router=matching_router(o.top_k),
            backend=backend,
        )
        stitches = stitch_specs(self.pair, teacher_width=o.dim, student_width=o.dim)
        return VisionMoE(arch, self.pair.student, stitches=stitches, seed=o.seed).to(self.device, self.dtype)


def _case(scene: Scene, name: str, student: VisionMoE, optimizer: torch.optim.Optimizer, note: str) -> Case:
    pair, images = scene.pair, scene.images

    def forward() -> Ran:
        for module in student.modules():
            if isinstance(module, Experts):
                module.backend = name  # one student for all backends
        hidden = scene.meta.hidden_states(scene.pixels_BCHW, [pair])
        logits = {pair.index: teacher_logits(scene.meta, pair, scene.teacher, hidden[pair.index])}
        batch = TeacherBatch(hidden=hidden, teacher_logits=logits, targets_BV=scene.targets_BV, slot_ids_B=torch.arange(images.count))
        return Ran(pair_step(student, pair, scene.meta, batch, DistillConfig(), log=False).loss)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()

    rows = images.tokens * scene.options.top_k * len(student.blocks)
    what = f"{images.count} images of {images.size} pixels, {len(student.blocks)} block(s) a module, optimizer in backward"
    return Case(name, forward, backward, list(student.parameters()), rows, rows, note=f"{note}; {what}" if note else what)
