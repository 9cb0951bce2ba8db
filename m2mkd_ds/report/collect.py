"""Read a run folder into one plain object, and note what is not there. First step of the report: folder -> RunFacts -> pages.

Nothing here trusts the folder: a run may be half-way, interrupted, or copied without its checkpoints, and the report of
such a run is worth having. What cannot be read ends up in `RunFacts.missing` as one sentence a reader understands.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from m2mkd_ds import config as config_tree
from m2mkd_ds.logs import read_metrics

NODES = (
    "pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "assemble", "end_to_end", "baseline", "evaluate", "export",
)  # fmt: skip
"""Nodes of a run, in the order in which they are told; the report itself is not one of them."""

T = TypeVar("T")


@dataclass(frozen=True)
class Curve:
    """One metrics.jsonl: the whole phase, or one pair of it."""

    name: str
    """`whole`, or `pair 2`."""
    records: list[dict[str, Any]]

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric; records without it are passed over."""
        points = [(record["step"], record[key]) for record in self.records if is_number(record.get(key)) and is_number(record.get("step"))]
        return [float(step) for step, _ in points], [float(value) for _, value in points]

    def last(self, key: str) -> float | None:
        """The newest finite value of one metric, or None."""
        values = self.series(key)[1]
        return values[-1] if values else None


@dataclass(frozen=True)
class NodeFacts:
    """What one node's done.json and metrics say about time and size; None where they are silent."""

    name: str
    finished: str | None
    wall_s: float | None
    steps: int | None
    images: int | None
    images_per_second: float | None
    """Median over the logged intervals: start-up, evaluation and checkpoints do not count."""


@dataclass
class RunFacts:
    """Everything the report shows."""

    run_dir: Path
    name: str
    config: config_tree.RunConfig | None = None
    config_text: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    """evaluate/results.json; empty when there is none."""
    few_shot: dict[str, dict[str, Any]] = field(default_factory=dict)
    """few_shot/NAME/result.json by name; a run need not have any."""
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    """Curves by phase, phases and pairs in running order; a phase without metrics is absent."""
    nodes: list[NodeFacts] = field(default_factory=list)
    bad_samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Uses of damaged training images, by the list that tells of them (relative to the run); empty when there were none."""
    versions: dict[str, str] = field(default_factory=dict)
    export: str | None = None
    """The exported folder, relative to the run, when it is there."""
    missing: list[str] = field(default_factory=list)


def is_number(value: Any) -> bool:
    """True for a finite int or float (a bool is none)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def collect(run_dir: Path) -> RunFacts:
    """Read `run_dir`. Raises ValueError when it is no folder or holds nothing that a run writes."""
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir}: no such run folder; `m2mkd pipeline --recipe NAME --run-dir {run_dir}` makes one")
    facts = RunFacts(run_dir, run_dir.resolve().name)
    _read_config(facts)
    results = _read(facts, "evaluate/results.json", "table of accuracies", _json_object)
    facts.results = results or {}
    for file in sorted(run_dir.glob("few_shot/*/result.json")):
        found = _read(facts, file.relative_to(run_dir).as_posix(), f"few-shot results {file.parent.name}", _json_object)
        if found:
            facts.few_shot[file.parent.name] = found
    _read_curves(facts)
    _read_bad_samples(facts)
    _read_nodes(facts)
    if (run_dir / "export" / "model" / "config.json").is_file():
        facts.export = "export/model"
    if not (facts.config or facts.results or facts.curves or facts.nodes):
        raise ValueError(f"{run_dir}: not a run folder (no config.yaml, no metrics.jsonl, no done.json, no evaluate/results.json in it)")
    return facts


def _read(facts: RunFacts, relative: str, what: str, parse: Callable[[Path], T]) -> T | None:
    """Parse one file of the run; absent or damaged, note it and return None."""
    path = facts.run_dir / relative
    if not path.is_file():
        facts.missing.append(f"{relative} is not there, so this report has no {what}")
        return None
    try:
        return parse(path)
    except (OSError, ValueError, yaml.YAMLError) as err:
        facts.missing.append(f"{relative} cannot be read ({str(err).splitlines()[0]}), so this report has no {what}")
        return None


def _json_object(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    return value


def _records(path: Path) -> list[dict[str, Any]]:
    records = read_metrics(path)
    if not all(isinstance(record, dict) for record in records):
        raise ValueError("a line is not a JSON object")
    return records


def _read_config(facts: RunFacts) -> None:
    facts.config_text = _read(facts, "config.yaml", "configuration", lambda path: path.read_text(encoding="utf-8")) or ""
    if facts.config_text:
        facts.config = _read(facts, "config.yaml", "summary of the configuration", config_tree.load)
    if facts.config is not None:
        facts.name = facts.config.name


def _read_curves(facts: RunFacts) -> None:
    for phase in config_tree.PHASES:
        folder = facts.run_dir / phase
        of_pairs = folder.glob("pair_*/metrics.jsonl") if phase in config_tree.PAIR_PHASES else ()
        files = sorted(of_pairs, key=lambda path: _pair_number(path.parent.name)) or [folder / "metrics.jsonl"]
        if files == [folder / "metrics.jsonl"] and not _expected(facts, phase) and not files[0].exists():
            continue
        found = []
        for file in files:
            relative = file.relative_to(facts.run_dir).as_posix()
            records = _read(facts, relative, f"curves of {phase}", _records)
            if records:
                found.append(Curve("whole" if file.parent == folder else f"pair {_pair_number(file.parent.name)}", records))
            elif records is not None:
                facts.missing.append(f"{relative} has no line yet, so this report has no curves of {phase}")
        if phase in config_tree.PAIR_PHASES and found and facts.config and len(found) < facts.config.num_stages:
            facts.missing.append(f"{phase} has curves of {len(found)} of {facts.config.num_stages} pairs")
        if found:
            facts.curves[phase] = found


def _read_bad_samples(facts: RunFacts) -> None:
    for phase in config_tree.PHASES:
        folder = facts.run_dir / phase
        for file in [*folder.glob("bad_samples.jsonl"), *sorted(folder.glob("pair_*/bad_samples.jsonl"))]:
            relative = file.relative_to(facts.run_dir).as_posix()
            records = _read(facts, relative, f"damaged images of {phase}", _records)
            if records:
                facts.bad_samples[relative] = records


def _expected(facts: RunFacts, phase: str) -> bool:
    """Whether the run's configuration has this phase at all (unknown configuration: assume so)."""
    if facts.config is None:
        return True
    if phase == "baseline":
        return facts.config.baseline
    return facts.config.teacher.source == "incubate" or phase not in ("modular_train", "assemble_finetune")


def _pair_number(name: str) -> int:
    match = re.fullmatch(r"pair_(\d+)", name)
    return int(match[1]) if match else 0


def _read_nodes(facts: RunFacts) -> None:
    for name in NODES:
        folder = facts.run_dir / name
        whole = folder / "done.json"
        files = [whole] if whole.is_file() else sorted(folder.glob("pair_*/done.json"), key=lambda path: _pair_number(path.parent.name))
        for file in files:
            done = _read(facts, file.relative_to(facts.run_dir).as_posix(), f"times of {name}", _json_object)
            if done is None:
                continue
            label = name if file == whole else f"{name} {file.parent.name.replace('_', ' ')}"
            facts.nodes.append(_node_facts(label, done, facts.curves.get(name, [])))
            if isinstance(done.get("versions"), dict):
                facts.versions = {str(key): str(value) for key, value in done["versions"].items()}
        if not files and _expected(facts, name):
            facts.missing.append(f"{name}/done.json is not there: {name} has not finished")


def _node_facts(label: str, done: dict[str, Any], curves: list[Curve]) -> NodeFacts:
    own = [curve for curve in curves if label.endswith(curve.name)] or curves
    rates = sorted(value for curve in own for value in curve.series("images_per_second")[1])

    def number(key: str) -> float | None:
        return done[key] if is_number(done.get(key)) else None

    steps, images = number("steps"), number("images")
    return NodeFacts(
        name=label,
        finished=str(done["finished"]) if "finished" in done else None,
        wall_s=number("wall_s"),
        steps=None if steps is None else int(steps),
        images=None if images is None else int(images),
        images_per_second=rates[len(rates) // 2] if rates else None,
    )
