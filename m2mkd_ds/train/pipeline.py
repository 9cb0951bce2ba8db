"""The whole DAG by one command: each node is run, resumed, or skipped because its output is complete and still valid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from m2mkd_ds.config import ConfigError, RunConfig, dump
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import format_seconds, logger
from m2mkd_ds.train import local_nodes
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.launch import launch_command, run_launched, spell
from m2mkd_ds.train.nodes import Node, NodeState, build_dag, missing_files, node_state, read_done

LocalRunner = Callable[[RunContext], None]


@dataclass(frozen=True)
class Planned:
    """A node, what will happen to it and why."""

    node: Node
    state: NodeState
    wanted: bool
    """Whether --until / --only leave it in."""


def write_config(config: RunConfig) -> Path:
    """RUN/config.yaml, the one file that every rank reads. Returns its absolute path."""
    file = Path(config.run_dir) / "config.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(dump(config))
    temporary.replace(file)
    return file.resolve()


def plan_run(ctx: RunContext, *, until: str = "", only: str = "") -> list[Planned]:
    """Judge every node in running order. Raises ConfigError for a node name that the run does not have."""
    dag = build_dag(ctx.config)
    names = [node.name for node in dag]
    for flag, name in (("--until", until), ("--only", only)):
        if name and name not in names:
            raise ConfigError(f"{flag} {name}: no such node in this run; allowed are {', '.join(names)}")
    rerun: set[str] = set()
    planned = []
    for position, node in enumerate(dag):
        wanted = node.name == only if only else (not until or position <= names.index(until))
        state = node_state(ctx.config, node, ctx.root, ctx.data_fingerprints, rerun)
        if not state.complete and wanted:
            rerun.add(node.name)
        planned.append(Planned(node, state, wanted))
    return planned


def verb_of(node: Node, config_file: Path) -> list[str]:
    """Words behind `deepspeed --module m2mkd_ds` (or `m2mkd`) that run just this node."""
    if node.name == "evaluate":
        return ["eval", str(config_file.parent)]
    return ["train", "--config", str(config_file), "--phase", node.name]


def describe_plan(ctx: RunContext, planned: list[Planned]) -> str:
    """What `--dry-run` prints: the DAG with decisions, reasons and the commands that would run."""
    config_file = (ctx.root / "config.yaml").resolve()
    lines = []
    for item in planned:
        action = "skip" if item.state.complete else "run" if item.wanted else "leave"
        inputs = f" <- {', '.join(item.node.inputs)}" if item.node.inputs else ""
        lines.append(f"{action:5} {item.node.name}{inputs}: {item.state.reason}")
        if action == "run" and item.node.launched:
            lines.append("        " + spell(launch_command(ctx.config.launch, verb_of(item.node, config_file))))
    return "\n".join(lines)


def run_pipeline(
    config: RunConfig, runners: Mapping[str, LocalRunner], *, until: str = "", only: str = "", dry_run: bool = False
) -> str:
    """Bring the run up to date and return what was (or would be) done.

    `runners` brings the nodes of other rooms (export, report) by name. Raises ConfigError before any compute is spent,
    RuntimeError when a node fails or leaves no result.
    """
    ctx = open_run(config, World(0, 1, 0, 1, torch.device("cpu")))
    planned = plan_run(ctx, until=until, only=only)
    text = describe_plan(ctx, planned)
    if dry_run:
        return text
    config_file = write_config(config)
    local = {"split": local_nodes.split, "assemble": local_nodes.assemble, **runners}
    todo = [item for item in planned if item.wanted and not item.state.complete]
    logger.info("pipeline %s in %s: %d nodes to run, %d skipped", config.name, config.run_dir, len(todo),
                sum(item.state.complete for item in planned))  # fmt: skip
    for number, item in enumerate(todo, 1):
        node, started = item.node, time.monotonic()
        logger.info("[%d/%d] %s (%s)", number, len(todo), node.name, item.state.reason)
        if node.launched:
            run_launched(config.launch, verb_of(node, config_file))
        else:
            local[node.name](ctx)
        done = read_done(ctx.root / node.name)
        if done is None or missing_files(ctx.root / node.name, done):
            raise RuntimeError(f"{node.name} ended without a result in {ctx.root / node.name}; its log is above")
        logger.info("[%d/%d] %s done in %s", number, len(todo), node.name, format_seconds(time.monotonic() - started))
    return text
