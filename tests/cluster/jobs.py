"""One small training run, and every way to start it: on this host, over ssh, by hand on each node, as srun would, by other launchers.

46 noise images, a global batch of 8, phase `pretrain_meta` or `baseline` of the recipe `tiny`, fp32: what a run leaves must be the same
bit for bit however its two or four ranks were started.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from m2mkd_ds.config import CheckpointConfig, LaunchConfig, PhaseConfig, RunConfig, WatchConfig, apply_overrides
from m2mkd_ds.data.shards.write import write_shards
from m2mkd_ds.data.sources.registry import encode_png
from m2mkd_ds.logs import read_metrics
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.pipeline import write_config
from tests.launching import ROOT, free_port

IMAGES = 46
GLOBAL_BATCH = 8


def write_images(folder: Path) -> None:
    """Shards of noise, in which every image is a class of its own."""
    draw = np.random.default_rng(0)
    for part in ("train", "validation"):
        samples = [(encode_png(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)), "png", i, f"image-{i}") for i in range(IMAGES)]
        write_shards(
            samples, folder / part, total=IMAGES, class_names=[f"class {i}" for i in range(IMAGES)], source="test", license="none",
            samples_per_shard=12,
        )  # fmt: skip


def write_run(out: Path, name: str, words: Sequence[str] = (), *, ranks: int = 2, steps: int = 6, hostfile: str = "") -> Path:
    """OUT/<name>/config.yaml of a run over OUT/shards; gives the run folder."""
    base = get_recipe("tiny")
    phase = PhaseConfig(
        epochs=100.0, max_steps=steps, micro_batch_size=GLOBAL_BATCH // ranks, lr=2e-3, lr_batch=0, eps=1e-6, warmup_epochs=0.5,
        clip_grad=0.5, drop_path=0.2, precision="fp32", eval_epochs=0.0, checkpoint_steps=5, log_steps=1,
    )  # fmt: skip
    data = replace(
        base.data, num_classes=IMAGES, num_workers=0, source="",
        train=str(out / "shards/train"), validation=str(out / "shards/validation"),
    )  # fmt: skip
    config: RunConfig = replace(
        base, run_dir=str(out / name), data=data, pretrain_meta=phase, m2mkd=phase, end_to_end=phase,
        launch=LaunchConfig(num_gpus=0 if hostfile else ranks, hostfile=hostfile),
        checkpoint=CheckpointConfig(deadline_s=10.0),
        watch=WatchConfig(start_s=90.0, step_s=30.0, eval_s=30.0, save_s=30.0, heartbeat_s=1.0),
    )  # fmt: skip
    return write_config(apply_overrides(config, list(words))).parent


def train_words(run: Path, phase: str = "pretrain_meta") -> list[str]:
    """Behind `python -m`: the verb of a rank."""
    return ["m2mkd_ds", "train", "--config", str(run / "config.yaml"), "--phase", phase]


def pipeline_words(run: Path, phase: str = "pretrain_meta") -> list[str]:
    """The pipeline's command for one phase, as it is typed on the first host."""
    return [sys.executable, "-m", "m2mkd_ds", "pipeline", "--config", str(run / "config.yaml"), "--only", phase]


def login_environment() -> dict[str, str]:
    """What a user's shell sets on a host: the environment's python first, and this checkout."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    tutel = importlib.util.find_spec("tutel")  # may lie in a folder of its own, since it is not on PyPI
    packages = [ROOT, ROOT / "kernels", *([Path(tutel.origin).parents[1]] if tutel and tutel.origin else [])]
    return {"PATH": path, "PYTHONPATH": ":".join(map(str, packages)), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


def by_hand(run: Path, hostfile: Path, node: int, master: str, port: int) -> list[str]:
    """DeepSpeed's launcher without ssh, started on node `node` of the hostfile."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node),
        "--master_addr", master, "--master_port", str(port), "--quiet", "--module", *train_words(run),
    ]  # fmt: skip


def as_srun(nodes: str, tasks_per_node: str, *, rank: int, size: int, node: int, local: int, num_nodes: int) -> dict[str, str]:
    """The variables that srun sets for one task, and those of the batch job around it."""
    of_the_job = {
        "JOB_ID": "4711", "JOBID": "4711", "JOB_NODELIST": nodes, "NODELIST": nodes, "JOB_NUM_NODES": str(num_nodes),
        "NNODES": str(num_nodes), "NTASKS": str(size), "NPROCS": str(size), "TASKS_PER_NODE": tasks_per_node,
    }  # fmt: skip
    of_the_task = {
        "STEP_ID": "0", "STEPID": "0", "STEP_NODELIST": nodes, "STEP_NUM_NODES": str(num_nodes), "STEP_NUM_TASKS": str(size),
        "STEP_TASKS_PER_NODE": tasks_per_node, "PROCID": str(rank), "LOCALID": str(local), "NODEID": str(node),
        "LAUNCH_NODE_IPADDR": "10.77.0.1", "SRUN_COMM_HOST": "10.77.0.1",
    }  # fmt: skip
    return {f"SLURM_{name}": value for name, value in {**of_the_job, **of_the_task}.items()}


def torchrun(run: Path, ranks: int) -> list[str]:
    """torchrun on this host."""
    meet = ["--nproc_per_node", str(ranks), "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [sys.executable, "-m", "torch.distributed.run", *meet, "-m", *train_words(run)]


def accelerate(run: Path, ranks: int, device: str = "--multi_gpu") -> list[str]:
    """accelerate's launcher on this host."""
    count = ["--num_processes", str(ranks), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", device, *count, "--main_process_port", str(free_port())]
    return [*command, "--module", *train_words(run)]


def here(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a job on this host that no launcher of ours started."""
    return {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(extra or {})}


def curve(run: Path, phase: str = "pretrain_meta") -> list[dict[str, Any]]:
    """Every step's metrics, without those that tell the time."""
    keys = ("step", "loss", "task", "lr", "grad_norm", "eval/top1", "eval/loss")
    return [{key: line[key] for key in keys if key in line} for line in read_metrics(run / phase / "metrics.jsonl")]


def same_bits(left: Path, right: Path, phase: str = "pretrain_meta") -> bool:
    """Whether both runs ended in the same weights, to the last bit."""
    a, b = (load_file(run / phase / "weights.safetensors") for run in (left, right))
    return bool(a) and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
