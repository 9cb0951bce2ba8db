"""A made-up run folder with every file that a finished run has, so the report can be tested without training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds import config as config_tree

PAIRS, EXPERTS, BLOCKS = 3, 8, 6
NODES = {
    "pretrain_meta": (640, 118.0), "modular_train": (480, 171.0), "assemble_finetune": (320, 133.0), "split": (None, 0.8),
    "m2mkd": (480, 204.0), "assemble": (None, 0.5), "end_to_end": (320, 96.0), "baseline": (800, 189.0), "evaluate": (None, 21.0),
    "export": (None, 3.1),
}  # fmt: skip
TOP1 = {
    "student_cold": 0.4112, "baseline": 0.8534, "teacher": 0.9011, "meta": 0.8021, "student": 0.8841,
    **{f"teacher_hybrid_{i}": 0.84 + 0.01 * i for i in range(PAIRS)}, **{f"student_hybrid_{i}": 0.81 + 0.015 * i for i in range(PAIRS)},
}  # fmt: skip


def config() -> config_tree.RunConfig:
    return config_tree.from_dict(
        {
            "name": "fashion",
            "data": {"source": "fashion_mnist", "num_classes": 10, "image_size": 28},
            "teacher": {"arch": "vit_tiny_patch16_224", "arch_args": {"patch_size": 4}, "depths": [3, 3, 3]},
            "meta": {"depths": [1, 1, 1]},
            "student": {"embed_dim": 96, "num_heads": 4, "patch_size": 4, "depths": [2, 2, 2], "moe": {"num_experts": EXPERTS}},
        }
    )


def results() -> dict[str, Any]:
    models = {
        name: {
            "top1": top1, "top1_ci": [top1 - 0.006, top1 + 0.006], "top5": min(1.0, top1 + 0.09), "top5_ci": [0.9, 1.0],
            "loss": -math.log(top1), "images": 10000, "agreement_with_teacher": None if name == "teacher" else top1 - 0.01,
            "parameters": 1_234_567, "active_parameters": 456_789,
        }
        for name, top1 in TOP1.items()
    }  # fmt: skip
    generator = random.Random(1)
    loads = {
        name: {str(block): [generator.randint(200, 2200) for _ in range(EXPERTS)] for block in range(BLOCKS)}
        for name in ("baseline", "student", "student_cold")
    }
    loads["student"]["4"][3] = 0
    return {
        "num_images": 10000, "models": models, "expert_load": loads, "entropy": {}, "seed": 0, "world_size": 2,
        "student_minus_baseline": {"top1": 0.0307, "ci": [0.0251, 0.0363]},
    }  # fmt: skip


def metrics(phase: str, pair: int, steps: int) -> list[dict[str, Any]]:
    generator = random.Random(f"{phase}{pair}")
    lines: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        level = 2.3 * math.exp(-4 * step / steps) + 0.45 + 0.05 * pair
        record: dict[str, Any] = {"step": step, "epoch": step / 160, "lr": 1e-3, "loss": level + generator.gauss(0, 0.04), "grad_norm": 1.1,
                                  "images_per_second": 900 + generator.gauss(0, 20), "time_s": step / 4}  # fmt: skip
        record["task"] = record["loss"] * 0.8
        if phase == "m2mkd":
            record.update(kd=record["loss"] * 0.3, task_grad_norm=0.05, kd_grad_norm=0.04 + 0.01 * math.exp(-step / 90))
        if phase in ("m2mkd", "end_to_end", "baseline"):
            for block in range(2 * pair, 2 * pair + 2) if phase == "m2mkd" else range(BLOCKS):
                load = [generator.random() for _ in range(EXPERTS)]
                record[f"moe/{block}/load"] = [value / sum(load) for value in load]
                record[f"moe/{block}/entropy"] = 2.0 - 0.1 * block - 0.5 * step / steps
                record[f"moe/{block}/dead"] = 0.0
                record[f"moe/{block}/drop_rate"] = 0.05 + 0.01 * block
                record[f"moe/{block}/uncovered"] = 0.01
                record[f"moe/{block}/max_over_mean"] = 1.3 + 0.1 * block
        if step % 80 == 0:
            record["eval/top1"] = 0.9 * (1 - math.exp(-4 * step / steps)) - 0.02 * pair
            record["eval/loss"] = level
        lines.append(record)
    return lines


def write_run(folder: Path) -> Path:
    """Everything of contract: config, metrics, done records, results, an exported folder's config."""
    (folder / "config.yaml").parent.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(config_tree.dump(config()))
    for name, (steps, wall_s) in NODES.items():
        (folder / name).mkdir()
        done: dict[str, Any] = {
            "node": name, "fingerprint": "f" * 64, "inputs": [], "files": {}, "wall_s": wall_s, "finished": "2026-01-02T03:04:05+00:00",
            "versions": {"torch": "2.15.0", "deepspeed": "0.19.8"},
        }  # fmt: skip
        if steps:
            done |= {"steps": steps, "images": steps * 256}
            pairs = range(PAIRS) if name in ("modular_train", "m2mkd") else [0]
            for pair in pairs:
                target = folder / name / f"pair_{pair}" if len(pairs) > 1 else folder / name
                target.mkdir(exist_ok=True)
                (target / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics(name, pair, steps)))
        (folder / name / "done.json").write_text(json.dumps(done))
    (folder / "evaluate" / "results.json").write_text(json.dumps(results()))
    (folder / "export" / "model").mkdir(parents=True)
    (folder / "export" / "model" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run."""
    return write_run(tmp_path / "run")


@pytest.fixture
def run_results() -> dict[str, Any]:
    """The content of its evaluate/results.json."""
    return results()
