"""What test_train_evaluate.py runs in three processes: the exact evaluation in jobs of one, two and three ranks (gloo, no launcher).

    python evaluate_job.py OUT      OUT/small, OUT/large and OUT/copy (of large, one image differs) hold shards; writes OUT/results.json
Image i is one grey value g(i), and the models look logits up in a table by that value: so what they answer is known without
running any of the code that decodes, batches and counts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.loader import EvalLoader, ImageBatch
from m2mkd_ds.distributed.world import World
from m2mkd_ds.moe.routing import RoutingStats
from m2mkd_ds.train.evaluation.evaluate import Output, Score, evaluate
from m2mkd_ds.train.evaluation.of_run import summarise_scores
from m2mkd_ds.train.loop import NonFiniteLossError

WORLDS = (1, 2, 3)
NUM_EXPERTS = 3
BATCH = 4
POISON = 5 + 9 * 11
"""Grey value of image 11."""


def logits_table(num_classes: int) -> Tensor:
    """Logits [256, V] by grey value."""
    return torch.randn(256, num_classes, generator=torch.Generator().manual_seed(num_classes)) * 2


def grey_values(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW.mean(dim=(1, 2, 3)) * 255).round().long()


def dense(grey_B: Tensor, num_classes: int) -> Output:
    return logits_table(num_classes)[grey_B], {}


def sparse(grey_B: Tensor, num_classes: int) -> Output:
    """Sends one row an image to expert g mod 3; reports the entropy g / 100 and the drop rate g / 1000."""
    load_E = torch.bincount(grey_B % NUM_EXPERTS, minlength=NUM_EXPERTS)
    stats = RoutingStats(load_E, load_E.float(), (grey_B.float() / 100).mean(), torch.tensor(0.0), (grey_B.float() / 1000).mean())
    return -logits_table(num_classes)[grey_B], {2: stats}


def together(grey_B: Tensor, num_classes: int) -> Output:
    """As dense, but every forward pass is a collective of all ranks, as with spread experts."""
    images = torch.tensor([grey_B.numel()])
    torch.distributed.all_reduce(images)
    assert images > 0, "a pass in which no rank had an image"
    return dense(grey_B, num_classes)


class Tampered:
    """A loader that repeats one batch, leaves its last one out, gives one image another label, or has another copy of the shards."""

    def __init__(self, loader: EvalLoader, what: str, copy: Path) -> None:
        batches = list(loader)
        self.index = ShardIndex.load(copy) if what == "copy" else loader.index
        if what == "label":
            labels_B = batches[-1].labels_B
            labels_B[0] = (labels_B[0] + 1) % loader.index.num_classes
        self.batches = [*batches, batches[0]] if what == "repeat" else batches[:-1] if what == "drop" else batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[ImageBatch]:
        return iter(self.batches)


def plain(score: Score) -> dict[str, Any]:
    values = asdict(score)
    load = {str(block): load_E.tolist() for block, load_E in score.expert_load.items()}
    return {**values, "predictions_N": score.predictions_N.tolist(), "hits_N": score.hits_N.tolist(), "expert_load": load}


def loader_of(folder: Path, world: World) -> tuple[ShardIndex, Any]:
    index = ShardIndex.load(folder)
    data = DataConfig(num_classes=index.num_classes, image_size=8, mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, num_workers=0)
    return index, EvalLoader(index, data, batch_size=BATCH, rank=world.rank, world=world.size)


def scores(folder: Path, world: World, tamper: str = "", *, in_step: bool = False) -> dict[str, Any]:
    index, loader = loader_of(folder, world)
    if tamper and world.rank == world.size - 1:
        loader = Tampered(loader, tamper, folder.with_name("copy"))
    chosen = {"together": together} if in_step else {"dense": dense, "sparse": sparse}
    models = {name: (lambda g, f=f: f(g, index.num_classes)) for name, f in chosen.items()}
    found = evaluate(grey_values, models, loader, world, num_images=index.num_samples, dtype=torch.float32, in_step=in_step)
    return {name: plain(score) for name, score in found.items()}


def poisoned(grey_B: Tensor, num_classes: int) -> Output:
    """As dense, but the logits of one image are no numbers."""
    logits_BV, stats = dense(grey_B, num_classes)
    return torch.where(grey_B[:, None] == POISON, torch.nan, logits_BV), stats


def refusal(folder: Path, world: World) -> str:
    """What the node says of a student with such a loss, which one rank alone has met."""
    index, loader = loader_of(folder, world)
    models = {name: (lambda g, f=f: f(g, index.num_classes)) for name, f in {"teacher": dense, "student": poisoned}.items()}
    found = evaluate(grey_values, models, loader, world, num_images=index.num_samples, dtype=torch.float32)
    try:
        summarise_scores(found, {}, seed=0, world_size=world.size)
    except NonFiniteLossError as err:
        return str(err)
    return "no error"


def rank_main(rank: int, out: Path) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for size in WORLDS:
        if rank >= size:
            continue
        torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous_{size}", rank=rank, world_size=size)
        world = World(rank, size, rank, size, torch.device("cpu"))
        for name in ("large", "small"):
            results[f"{name}_{size}"] = scores(out / name, world)
            results[f"in_step_{name}_{size}"] = scores(out / name, world, in_step=True)
        results[f"poisoned_{size}"] = refusal(out / "large", world)
        for tamper in ("repeat", "drop", "label", "copy"):
            try:
                scores(out / "large", world, tamper)
                results[f"{tamper}_{size}"] = "no error"
            except RuntimeError as err:
                results[f"{tamper}_{size}"] = str(err)
        torch.distributed.destroy_process_group()
    (out / f"results_{rank}.json").write_text(json.dumps(results))


def main() -> None:
    out = Path(sys.argv[1])
    # forked before any thread was started: three fresh interpreters would spend ten times as long on their imports
    torch.multiprocessing.start_processes(rank_main, args=(out,), nprocs=max(WORLDS), start_method="fork")


if __name__ == "__main__":
    main()
