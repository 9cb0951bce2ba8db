"""train/steps.py and the metrics of the loop against formulas written out here."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE, VMoEArch
from m2mkd_ds.teacher.feed import TeacherBatch
from m2mkd_ds.train.loop import mean_over_ranks
from m2mkd_ds.train.micro_seed import seed_micro_batch
from m2mkd_ds.train.steps import aligned_step, supervised_step


def batch_of(images: Tensor, targets: Tensor) -> TeacherBatch:
    return TeacherBatch(hidden={0: images}, teacher_logits={}, targets_BV=targets, slot_ids_B=torch.arange(len(images)))


def test_supervised_loss_is_task_plus_weighted_router_losses() -> None:
    router = RouterConfig(top_k=1, softmax="before", switch_weight=0.5, z_weight=0.25)
    arch = VMoEArch(
        image_size=8, patch_size=4, num_classes=3, embed_dim=16, num_heads=2, mlp_ratio=1.0, num_blocks=2, moe_blocks=(0, 1),
        num_experts=4, router=router, backend="reference",
    )  # fmt: skip
    model = VisionMoE(arch, StageSpan.whole(2), seed=0)
    images, targets = torch.randn(5, 3, 8, 8), torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]
    output = model(images)
    expected = F.cross_entropy(output.output, targets) + output.router_losses["switch"] + output.router_losses["z"]
    step = supervised_step(model, batch_of(images, targets), log=True)
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert step.metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert {"router/switch", "router/z", "moe/0/load", "moe/1/entropy", "moe/1/dead"} <= step.metrics.keys()
    assert supervised_step(model, batch_of(images, targets), log=False).metrics == {}


def test_aligned_loss_by_hand() -> None:
    # Two stages. Teacher stage 0 doubles its input [0, 1, 2, 3] -> [0, 2, 4, 6]: variance (n - 1) = 20/3.
    # Meta stage 0 gives [0, 1, 2, 3]: squared errors 0, 1, 4, 9, mean 3.5; distance 3.5 / (20/3) = 0.525.
    class Double(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    x = torch.tensor([[[0.0, 1.0, 2.0, 3.0]]])
    logits = torch.zeros(1, 2)
    step = aligned_step(lambda h: [h, logits], [Double(), Double()], batch_of(x, torch.tensor([[1.0, 0.0]])), 2.0, log=True)
    assert step.metrics["align"] == pytest.approx(0.525, rel=1e-6)
    assert step.metrics["task"] == pytest.approx(0.693147, rel=1e-5)
    assert step.loss.item() == pytest.approx(0.693147 + 2.0 * 0.525, rel=1e-5)


def test_a_meta_model_that_follows_its_teacher_has_no_alignment_loss() -> None:
    x = torch.randn(2, 3, 4)
    stage = torch.nn.Linear(4, 4)
    step = aligned_step(lambda h: [stage(h), torch.zeros(2, 2)], [stage, stage], batch_of(x, torch.eye(2)), 1.0, log=True)
    assert step.metrics["align"] == 0.0


def test_metrics_of_one_rank_stay_and_dead_experts_follow_from_the_load() -> None:
    world = jobs.init_world(timeout_s=60)
    try:
        metrics = {"loss": 1.5, "moe/3/load": [0.75, 0.25, 0.0, 0.0], "moe/3/dead": 2.0, "moe/3/max_over_mean": 3.0, "lr": 0.5}
        assert mean_over_ranks(metrics, world) == metrics  # all of these numbers are exact in fp32
    finally:
        jobs.shutdown()


def test_random_numbers_of_a_micro_batch_depend_on_each_of_seed_phase_pair_and_slot() -> None:
    def draw(*key: object) -> Tensor:
        seed_micro_batch(*key)  # type: ignore[arg-type]
        return torch.rand(4)

    first = draw(0, "m2mkd", 1, 64)
    assert torch.equal(first, draw(0, "m2mkd", 1, 64))
    for other in ((1, "m2mkd", 1, 64), (0, "end_to_end", 1, 64), (0, "m2mkd", 2, 64), (0, "m2mkd", 1, 96)):
        assert not torch.equal(first, draw(*other))
