"""The whole DAG by one command: each node is run, resumed, or skipped because its output is complete and still valid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill

import torch

from m2mkd_ds.config import ConfigError, RunConfig, dump
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import format_seconds, logger
from m2mkd_ds.train import local_nodes
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.ending.outcome import JobRecords
from m2mkd_ds.train.launching.hostfile import with_meeting_point
from m2mkd_ds.train.launching.launch import LaunchError, launch_command, run_launched, spell_in_lines
from m2mkd_ds.train.nodes import Node, NodeState, build_dag, node_state, reads_teacher_file, teacher_file
from m2mkd_ds.train.preflight import as_launched, check_settings
from m2mkd_ds.train.run_phase import RUNNABLE

PATIENCE_S = 1800.0
"""Where a limit of the watch is off: how long a job may take to save that was asked to stop."""

WIDTH = 120
"""Columns of what `--dry-run` prints."""

LocalRunner = Callable[[RunContext], None]


@dataclass(frozen=True)
class Planned:
    """A node, what will happen to it and why."""

    node: Node
    state: NodeState
    wanted: bool
    """Whether --until / --only leave it in."""

    @property
    def action(self) -> str:
        """skip (complete), run, or leave (not wanted)."""
        return "skip" if self.state.complete else "run" if self.wanted else "leave"


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
    complete: set[str] = set()
    planned: list[Planned] = []
    for position, node in enumerate(dag):
        wanted = node.name == only if only else (not until or position <= names.index(until))
        state = node_state(ctx.config, node, ctx.root, ctx.data_fingerprints, rerun)
        if state.complete:
            complete.add(node.name)
        elif wanted:
            absent = [name for name in node.inputs if name not in complete | rerun]
            if absent:
                why = next(item.state.reason for item in planned if item.node.name == absent[0])
                raise ConfigError(f"--only {node.name}: its input {absent[0]} is not complete ({why}); run it first, or use --until")
            if node.name == "split" and reads_teacher_file(ctx.config):
                teacher_file(ctx.config)  # its absence must show before anything runs
            rerun.add(node.name)
        planned.append(Planned(node, state, wanted))
    return planned


def train_verb(names: list[str], config_file: Path) -> list[str]:
    """Words behind `deepspeed --module m2mkd_ds` that run these nodes."""
    return ["train", "--config", str(config_file), "--phase", ",".join(names)]


def group(todo: list[Node], *, one_job: bool) -> list[list[Node]]:
    """Nodes that share a launch: each its own, or (`launch.one_job`) every run of neighbours that a launched job can run."""
    groups: list[list[Node]] = []
    for node in todo:
        joins = one_job and node.name in RUNNABLE and groups and groups[-1][0].name in RUNNABLE
        if joins:
            groups[-1].append(node)
        else:
            groups.append([node])
    return groups


def still_needed(ctx: RunContext, nodes: list[Node]) -> list[Node]:
    """The nodes of a group that must run now: an input that ran again may have come out with the same bytes as before."""
    rerun: set[str] = set()
    for node in nodes:
        if not node_state(ctx.config, node, ctx.root, ctx.data_fingerprints, rerun).complete:
            rerun.add(node.name)
    return [node for node in nodes if node.name in rerun]


def describe_plan(ctx: RunContext, planned: list[Planned]) -> str:
    """What `--dry-run` prints: the DAG with decisions and reasons, then the commands that would run."""
    lines = []
    for item in planned:
        inputs = f" <- {', '.join(item.node.inputs)}" if item.node.inputs else ""
        told = f"{item.action:5} {item.node.name}{inputs}: {item.state.reason}"
        lines.append(fill(told, WIDTH, subsequent_indent=" " * 10, break_long_words=False, break_on_hyphens=False))
    config_file = (ctx.root / "config.yaml").resolve()
    commands = []
    for nodes in group([item.node for item in planned if item.action == "run"], one_job=ctx.config.launch.one_job):
        if any(node.launched for node in nodes):
            names = [node.name for node in nodes]
            launch = with_meeting_point(ctx.config.launch, str(ctx.root.resolve()))
            commands.append(spell_in_lines(launch_command(launch, train_verb(names, config_file)), WIDTH))
        else:
            commands.append(f"(in this process) {nodes[0].name}")
    return "\n".join([*lines, *(["", "commands:", *commands] if commands else [])])


def run_pipeline(config: RunConfig, runners: Mapping[str, LocalRunner], *, until: str = "", only: str = "", dry_run: bool = False) -> str:
    """Bring the run up to date and return what was (or would be) done.

    `runners` brings the nodes of other rooms (export, report) by name. Raises ConfigError before any compute is spent,
    LaunchError when a node fails or leaves no result, StopRequested when the running job was asked to stop and has saved.
    """
    ctx = open_run(config, World(0, 1, 0, 1, torch.device("cpu")))
    planned = plan_run(ctx, until=until, only=only)
    ranks_known = bool(config.launch.num_gpus) and not config.launch.hostfile
    check_settings(as_launched(ctx), [item.node.name for item in planned if item.action == "run"], ranks_known=ranks_known)
    text = describe_plan(ctx, planned)
    if dry_run:
        return text
    config_file = write_config(config)
    local = {"split": local_nodes.split, "assemble": local_nodes.assemble, **runners}
    groups = group([item.node for item in planned if item.action == "run"], one_job=config.launch.one_job)
    skipped = sum(item.state.complete for item in planned)
    logger.info("pipeline %s in %s: %d nodes to run, %d complete", config.name, config.run_dir, sum(map(len, groups)), skipped)
    for planned_nodes in groups:
        nodes = still_needed(ctx, planned_nodes)
        if not nodes:
            logger.info("== %s: its inputs came out as before, nothing to do ==", ", ".join(node.name for node in planned_nodes))
            continue
        names, started = [node.name for node in nodes], time.monotonic()
        logger.info("== %s ==", ", ".join(names))
        if any(node.launched for node in nodes):
            records = JobRecords(ctx.root, names, config.watch.heartbeat_s)
            patience_s = config.watch.stop_s or PATIENCE_S
            run_launched(config.launch, train_verb(names, config_file), records, config_file.parent, patience_s=patience_s)
        else:
            local[names[0]](ctx)
        for node in nodes:
            _require_result(ctx, node)
        logger.info("== %s: %s ==", ", ".join(names), format_seconds(time.monotonic() - started))
    return text


def _require_result(ctx: RunContext, node: Node) -> None:
    """The launcher's exit code alone does not prove that a node was finished, and an old result proves nothing."""
    state = node_state(ctx.config, node, ctx.root, ctx.data_fingerprints, set())
    if not state.complete:
        raise LaunchError(f"{node.name} ended without its result in {ctx.root / node.name} ({state.reason}); its log is above")
