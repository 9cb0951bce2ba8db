"""`m2mkd plan`: what a run needs on a cluster, before anything is started."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Annotated, Any

import tyro

from m2mkd_ds.cli.app import Overrides, app, out
from m2mkd_ds.cli.resolve import resolve
from m2mkd_ds.config import PHASES, ConfigError, RunConfig
from m2mkd_ds.logs import logger, setup_logging
from m2mkd_ds.planner.run_cluster import RunCluster, read_cluster

Number = Annotated[float | None, tyro.conf.arg(metavar="NUMBER")]


@app.command(name="plan", help="Memory, FLOPs, traffic and hours of every phase on a cluster.")
def plan(
    *,
    recipe: str = "",
    config: Path | None = None,
    phase: str = "",
    pair: str = "all",
    cluster: Path | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    gpu_memory_gb: Number = None,
    memory_reserve_gb: Number = None,
    tflops: Number = None,
    mfu: Number = None,
    gpu_bandwidth: Number = None,
    network_gbps: Number = None,
    loader_images_per_s: Number = None,
    device: Annotated[str | None, tyro.conf.arg(metavar="gpu|cpu")] = None,
    images: int = 0,
    imbalance: float = 1.0,
    largest_micro_batch: int = 512,
    json: bool = False,
    plot: Path | None = None,
    set: Overrides = (),
) -> None:
    """Say what every phase of a run needs and how long it takes: parameters, memory of a rank by part, FLOPs, bytes on the wire, images a
    second, hours; and which layouts (ZeRO stage, ep_size, micro-batch) fit, with the one to take: the simplest of those that are within
    5 % of the fastest. Nothing is trained, read or downloaded.

    The paper's run on two hosts: m2mkd plan --recipe vmoe_base_in1k --nodes 2 --network-gbps 200 --images 1281167

    One phase of a run that exists, on smaller GPUs: m2mkd plan --config RUN/config.yaml --phase m2mkd --gpu-memory-gb 24 --tflops 165

    From a file (lines such as `nodes: 2`, the names of the flags with _): m2mkd plan --recipe vmoe_base_in1k --cluster cluster.yaml

    How it is computed. The very modules of a phase run one step on torch's meta device, where tensors have shapes and no memory; what
    autograd keeps is counted byte by byte, and DeepSpeed's buffers are followed from one gradient to the next. On CPU ranks this is checked
    against the allocator (`m2mkd bench memory`, docs/benchmarks/plan_memory_cpu.md). Routing is as uneven as --imbalance says. The speed is
    that of the narrowest of compute, links and loader, as if the others hid behind it; `no overlap` is the other extreme. MFU is an
    assumption: measure a step, then set it.

    Args:
        recipe: Name of a recipe (see `m2mkd recipes`). This or --config.
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        phase: One phase, or several, comma-separated; by default all phases that the run has.
        pair: For modular_train and m2mkd: pairs that share one job, `all` or numbers such as 0,2.
        cluster: YAML file that describes the cluster; flags below change single numbers of it.
        nodes: Hosts (1).
        gpus_per_node: GPUs of a host (8).
        gpu_memory_gb: Memory of a GPU, 10^9 bytes (80).
        memory_reserve_gb: Of it, what tensors cannot have: contexts, NCCL, fragmentation (4).
        tflops: Peak of a GPU in the precision of the phase, 10^12 operations a second (312).
        mfu: Share of the peak that training reaches (0.4).
        gpu_bandwidth: Between GPUs of a host, 10^9 bytes a second for each (200).
        network_gbps: Of a host, 10^9 bits a second (100).
        loader_images_per_s: Images a second that a host's loader prepares; 0: no limit (0).
        device: gpu, or cpu for CPU ranks (gpu). Memory is that of training steps: on a CPU rank, building the engines holds up to eight
            copies of the weights for a moment, and gathering them for evaluation and checkpoints some more.
        images: Images of an epoch; 0: those of the shards, if they are there.
        imbalance: Rows of the busiest expert over the mean: 1 is even. With spread experts, the rank that has it holds more activations.
        largest_micro_batch: Of the table over layouts, which has the powers of two up to it.
        json: Print all numbers as JSON instead.
        plot: Write a picture (SVG) of the memory by part.
        set: Override config fields before planning.
    """
    from m2mkd_ds.checkpoint.atomic import replacing
    from m2mkd_ds.distill.pairs import check_pairs
    from m2mkd_ds.planner.run_plan import PlanOptions, plan_run
    from m2mkd_ds.planner.run_plot import draw_run_plan
    from m2mkd_ds.planner.run_text import format_run_plan, plan_to_json

    given: dict[str, Any] = dict(
        nodes=nodes, gpus_per_node=gpus_per_node, gpu_memory_gb=gpu_memory_gb, memory_reserve_gb=memory_reserve_gb, tflops=tflops, mfu=mfu,
        gpu_bandwidth=gpu_bandwidth, network_gbps=network_gbps, loader_images_per_s=loader_images_per_s, device=device,
    )  # fmt: skip
    base = read_cluster(cluster) if cluster is not None else RunCluster()
    hosts = replace(base, **{name: value for name, value in given.items() if value is not None})
    resolved = resolve(config, recipe, "", set)
    names = _phases(resolved, phase)
    check_pairs(pair, resolved.num_stages, names)
    if not 1 <= imbalance < inf:
        raise ValueError(f"--imbalance is {imbalance:g}; give a number from 1, because the busiest expert has at least the mean")
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"--plot {plot}: there is no folder {plot.parent}; make it, or name a file elsewhere")
    if images < 0 or largest_micro_batch < 1:
        raise ValueError(f"--images is {images} and --largest-micro-batch {largest_micro_batch}; give at least 0 and 1")
    options = PlanOptions(
        phases=names, images=images or _images_of_shards(resolved), zero_files=_zero_files(resolved, names), pairs=_pairs(resolved, pair),
        largest_micro_batch=largest_micro_batch, imbalance=imbalance,
    )  # fmt: skip
    setup_logging()
    logger.info("plan: %s on %d ranks; every phase runs on shapes, which takes some seconds each", ", ".join(names), hosts.ranks)
    found = plan_run(resolved, hosts, options)
    if plot is not None:
        with replacing(plot) as temp:
            temp.write_text(draw_run_plan(found), encoding="utf-8")
    out(_as_json(plan_to_json(found)) if json else format_run_plan(found).rstrip())


def _as_json(tree: dict[str, Any]) -> str:
    return json.dumps(tree, indent=2, allow_nan=False)


def _phases(config: RunConfig, asked: str) -> tuple[str, ...]:
    """The phases of the run, or those that were named. Raises ConfigError for one that it does not have."""
    pretrained = ("modular_train", "assemble_finetune") if config.teacher.source == "pretrained" else ()
    absent = {*pretrained, *(() if config.baseline else ("baseline",))}
    has = tuple(name for name in PHASES if name not in absent)
    names = tuple(asked.split(",")) if asked else has
    for name in names:
        if name not in has:
            raise ConfigError(f"--phase {name}: this run has the phases {', '.join(has)}")
    return names


def _pairs(config: RunConfig, text: str) -> tuple[int, ...]:
    from m2mkd_ds.distill.pairs import parse_pairs

    return () if text == "all" else parse_pairs(text, config.num_stages)


def _zero_files(config: RunConfig, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The block zero_optimization (and the dtype of reductions) of every engine file that the plan looks at, checked as a job would."""
    from m2mkd_ds.distributed.ds_config import resolve_ds_config
    from m2mkd_ds.planner.scenes import phase_config

    files = {name: phase_config(config, name).ds_config for name in names}
    found: dict[str, dict[str, Any]] = {}
    for name, file in [*files.items(), *((names[0], table) for table in ("zero1", "zero2", "zero3"))]:
        branch = phase_config(config, name)
        precision = "fp32" if branch.precision == "fp32" else "bf16"
        tree = resolve_ds_config(file, branch, world_size=1, precision=precision, where=name)
        found[file] = {**tree["zero_optimization"], "communication_data_type": tree["communication_data_type"]}
    return found


def _images_of_shards(config: RunConfig) -> int:
    """Images of the training shards, if their index is here; else 0."""
    from m2mkd_ds.data.index import ShardIndex

    folder = Path(config.data.train)
    return ShardIndex.load(folder).num_samples if config.data.train and (folder / "index.json").is_file() else 0
