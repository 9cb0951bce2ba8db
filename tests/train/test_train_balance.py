"""Loss-free balancing in the loop: one move a step from the counts of all micro-batches; the real engine, one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import PhaseConfig, RouterConfig
from m2mkd_ds.data.plan import StreamState
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.world import World
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.moe.routers import make_router
from m2mkd_ds.teacher.feed import BatchRequest, TeacherBatch
from m2mkd_ds.train import loop
from m2mkd_ds.train.bad_samples import BadSampleList
from m2mkd_ds.train.balance import add_loads, balance_routers, biased_routers
from m2mkd_ds.train.ledger import SlotLedger
from m2mkd_ds.train.optim import build_adamw
from m2mkd_ds.train.saving import Saver
from m2mkd_ds.train.steps import supervised_step

RATE = 0.125
ARCH = VMoEArch(
    image_size=8, patch_size=4, num_classes=3, embed_dim=16, num_heads=2, mlp_ratio=1.0, num_blocks=3, moe_blocks=(0, 2),
    num_experts=4, router=RouterConfig(top_k=1, softmax="before", balance_rate=RATE), backend="reference",
)  # fmt: skip
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.eye(3)[torch.arange(8) % 3]


@pytest.fixture
def world() -> Iterator[World]:
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


class Feed:
    """The same eight images in as many micro-batches as asked for."""

    def batch(self, request: BatchRequest) -> TeacherBatch:
        rows = torch.tensor(list(request.slots)) % 8
        return TeacherBatch(hidden={0: IMAGES[rows]}, teacher_logits={}, targets_BV=TARGETS[rows], slot_ids_B=rows)

    def close(self) -> None:
        """Nothing to release."""


def one_step(world: World, folder: Path, accumulation: int, precision: str = "fp32") -> tuple[VisionMoE, loop.Trainee]:
    phase = PhaseConfig(
        micro_batch_size=8 // accumulation, gradient_accumulation_steps=accumulation, lr=1e-3, lr_batch=0, precision=cast(Any, precision)
    )
    model = VisionMoE(ARCH, StageSpan.whole(3), seed=4).train()
    settings = resolve_ds_config("zero1", phase, world_size=1, precision=cast(Any, precision), where="end_to_end")
    engine = DeepSpeedEngine(model, build_adamw(model, phase), settings, world)
    trainee = loop.Trainee(
        name="end_to_end", pair=0, folder=folder, engine=engine, fingerprint="f",
        step_fn=lambda batch, log: supervised_step(engine, batch, log=log),
    )  # fmt: skip
    job = loop.Job(
        phase_name="end_to_end", phase=phase, world=world, seed=0, total_steps=2, num_images=8, trainees=[trainee],
        make_feed=lambda start: cast(Any, Feed()), evaluate=lambda trainees: {}, with_teacher=False,
        folder=folder, stream=StreamState(seed=0, fingerprint="", order="global", position=0), max_bad_samples=0,
    )  # fmt: skip
    bad = BadSampleList(folder / "bad_samples.jsonl", cap=0, world=world, what="end_to_end", start_step=0)
    ledger = SlotLedger(job.layout, 0, world)
    loop._train_step(job, cast(Any, Feed()), [trainee], 0, True, bad, loop.Fed(), ledger, Saver(job))
    return model, trainee


def demand() -> dict[int, Tensor]:
    """What the fresh model chooses on all eight images, by block."""
    stats = VisionMoE(ARCH, StageSpan.whole(3), seed=4)(IMAGES).stats
    return {block: layer.load_E for block, layer in stats.items()}


def test_biases_by_hand(world: World) -> None:
    routers = {block: make_router(2, 4, RouterConfig(balance_rate=RATE)) for block in (1, 5)}
    first = add_loads({}, {1: torch.tensor([3, 1, 0, 0]), 5: torch.tensor([0, 0, 4, 0])})
    total = add_loads(first, {1: torch.tensor([0, 1, 2, 1]), 5: torch.tensor([4, 0, 0, 0])})
    assert {block: load_E.tolist() for block, load_E in total.items()} == {1: [3, 2, 2, 1], 5: [4, 0, 4, 0]}
    balance_routers([(routers, total)])
    # Both means are 2: more goes down, less goes up, 2 stays.
    assert routers[1].balance_bias.tolist() == [-RATE, 0.0, 0.0, RATE]  # type: ignore[union-attr]
    assert routers[5].balance_bias.tolist() == [-RATE, RATE, -RATE, RATE]  # type: ignore[union-attr]


def test_a_step_moves_the_biases_once_by_the_counts_of_all_micro_batches(world: World, tmp_path: Path) -> None:
    biases = {}
    for accumulation in (1, 2):
        model, trainee = one_step(world, tmp_path, accumulation)
        assert sorted(trainee.routers) == [0, 2] and trainee.step == 1
        biases[accumulation] = {block: router.balance_bias for block, router in trainee.routers.items()}
        for block, load_E in demand().items():
            # 8 images of 5 tokens, one expert each: 40 choices, the even share is 10.
            assert int(load_E.sum()) == 40
            assert biases[accumulation][block].tolist() == [RATE * ((n < 10) - (n > 10)) for n in load_E.tolist()]
        state = trainee.engine.full_state_dict()
        assert torch.equal(state["blocks.2.moe.router.balance_bias"], biases[accumulation][2])
        before = biases[accumulation][0].clone()
        model.eval()(IMAGES)
        assert torch.equal(biases[accumulation][0], before) and bool(before.any())  # an evaluation moves nothing
        trainee.engine.close()
    assert all(torch.equal(biases[1][block], biases[2][block]) for block in (0, 2))


def test_biases_stay_exact_in_bf16_and_come_back_from_a_checkpoint(world: World, tmp_path: Path) -> None:
    model, trainee = one_step(world, tmp_path, 1, "bf16")
    assert model.blocks["0"].moe.router.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    router = trainee.routers[0]
    assert router.balance_bias is not None and router.balance_bias.dtype == torch.float32
    router.balance_bias += 1 / 3
    exact_E = router.balance_bias.clone()
    trainee.engine.save(tmp_path)
    router.balance_bias.zero_()
    trainee.engine.load(tmp_path)
    assert torch.equal(router.balance_bias, exact_E)  # the tensor that the loop moves is the one that is restored
    trainee.engine.close()


def test_modules_without_a_rate_have_nothing_to_move() -> None:
    plain = dataclasses.replace(ARCH, router=RouterConfig(top_k=1, softmax="before"))
    assert biased_routers(VisionMoE(plain, StageSpan.whole(3), seed=0)) == {}
    assert sorted(biased_routers(VisionMoE(ARCH, StageSpan(1, 2, 3), seed=0))) == [2]  # the block's number in the whole model


def test_the_steps_hand_up_the_counts_on_steps_that_are_not_logged() -> None:
    model = VisionMoE(ARCH, StageSpan.whole(3), seed=4)
    batch = TeacherBatch(hidden={0: IMAGES}, teacher_logits={}, targets_BV=TARGETS, slot_ids_B=torch.arange(8))
    output = supervised_step(model, batch, log=False)
    assert output.metrics == {}
    assert {block: load_E.tolist() for block, load_E in output.load.items()} == {b: n.tolist() for b, n in demand().items()}
