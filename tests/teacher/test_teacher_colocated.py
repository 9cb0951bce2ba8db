"""The colocated feed: addressed by slots, one decode and one prefix walk a batch whatever the number of pairs."""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.errors import SampleError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import ImageBatch, TrainLoader
from m2mkd_ds.data.sources.registry import make_source
from m2mkd_ds.distill.hybrid import FrozenMeta
from m2mkd_ds.distill.pairs import teaching_pairs
from m2mkd_ds.teacher.colocated import ColocatedFeed
from m2mkd_ds.teacher.feed import BatchRequest

PAIRS = teaching_pairs((1, 1, 1), (1, 1, 1), (1, 1, 1))


class Counting(nn.Module):
    """Adds a constant and counts its calls."""

    def __init__(self, name: str, add: float, calls: Counter[str]) -> None:
        super().__init__()
        self.name, self.add, self.calls = name, add, calls
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls[self.name] += 1
        return x * self.weight + self.add


@dataclass
class TwoBatches:
    """A loader's stream of two micro-batches of four images each, counting what is decoded."""

    calls: Counter[str]

    def __iter__(self) -> Iterator[ImageBatch]:
        for step in range(2):
            self.calls["decode"] += 1
            slots = torch.arange(4 * step, 4 * step + 4)
            images = slots.float()[:, None, None, None].expand(4, 3, 2, 2)
            lost = SampleError("the disk is gone") if step else None
            yield ImageBatch(images, torch.eye(4), torch.arange(4), slots, step, 0, fallbacks=step + 2, wait_s=0.5 - step / 4, lost=lost)


def make_feed(dtype: torch.dtype = torch.float32) -> tuple[ColocatedFeed, Counter[str]]:
    calls: Counter[str] = Counter()
    meta = FrozenMeta({i: Counting(f"meta {i}", 10.0**i, calls) for i in range(3)})
    teachers = {i: Counting(f"teacher {i}", 0.5, calls) for i in range(3)}
    feed = ColocatedFeed(TwoBatches(calls), PAIRS, meta, teachers, device=torch.device("cpu"), dtype=dtype)  # type: ignore[arg-type]
    return feed, calls


def request(step: int, pairs: tuple[int, ...] = (0, 1, 2), *, teacher: bool = True, first: int | None = None) -> BatchRequest:
    start = 4 * step if first is None else first
    return BatchRequest(step, 0, range(start, start + 4), pairs, teacher)


def test_all_pairs_cost_one_decode_one_prefix_walk_and_one_run_of_each_teacher() -> None:
    feed, calls = make_feed()
    batch = feed.batch(request(0))
    # images 0..3; meta stages add 1, 10, 100; teachers add 0.5
    assert batch.hidden[0][1, 0, 0, 0] == 1.0  # the image itself
    assert batch.hidden[1][1, 0, 0, 0] == 2.0  # + 1
    assert batch.hidden[2][1, 0, 0, 0] == 12.0  # + 1 + 10
    assert batch.teacher_logits[0][1, 0, 0, 0] == 1.0 + 0.5 + 10 + 100  # T_0, then meta 1 and 2
    assert batch.teacher_logits[1][1, 0, 0, 0] == 2.0 + 0.5 + 100
    assert batch.teacher_logits[2][1, 0, 0, 0] == 12.0 + 0.5
    prefix, suffixes = {"meta 0": 1, "meta 1": 1}, {"meta 1": 1, "meta 2": 2}
    expected = Counter({"decode": 1, "teacher 0": 1, "teacher 1": 1, "teacher 2": 1}) + Counter(prefix) + Counter(suffixes)
    assert calls == expected


def test_a_subset_of_pairs_runs_only_what_it_needs() -> None:
    feed, calls = make_feed()
    batch = feed.batch(request(0, pairs=(1,), teacher=False))
    assert batch.hidden.keys() == {1} and batch.teacher_logits == {}
    assert calls == Counter({"decode": 1, "meta 0": 1})


def test_slots_that_the_plan_does_not_name_next_are_refused() -> None:
    feed, _ = make_feed()
    with pytest.raises(RuntimeError, match=r"expects slots range\(8, 12\).*gave \[0, 1, 2, 3\]"):
        feed.batch(request(2))


def test_teacher_and_hidden_states_carry_no_gradient_and_take_the_runs_dtype() -> None:
    feed, _ = make_feed(torch.bfloat16)
    batch = feed.batch(request(0))
    assert not any(t.requires_grad for t in (*batch.hidden.values(), *batch.teacher_logits.values()))
    assert batch.hidden[0].dtype == torch.bfloat16 and batch.targets_BV.dtype == torch.float32


def test_no_worker_outlives_close(tmp_path: Path) -> None:
    make_source("digits", tmp_path)
    data = DataConfig(num_classes=10, image_size=16, num_workers=2)
    loader = TrainLoader(
        ShardIndex.load(tmp_path / "train"), data, seed=0, micro_batch_size=4, accumulation=1, rank=0, world=1, start_step=0,
        total_steps=50,
    )  # fmt: skip
    feed = ColocatedFeed(loader, PAIRS[:1], FrozenMeta({}), {}, device=torch.device("cpu"), dtype=torch.float32)
    feed.batch(request(0, pairs=(0,), teacher=False))
    assert len(multiprocessing.active_children()) == 2
    feed.close()
    assert multiprocessing.active_children() == []


def test_what_the_loader_tells_of_a_batch_is_passed_on() -> None:
    feed, _ = make_feed()
    told = [(batch.lost, batch.wait_s, batch.fallbacks) for batch in (feed.batch(request(0)), feed.batch(request(1)))]
    assert told == [("", 0.5, 2), ("the disk is gone", 0.25, 3)]
