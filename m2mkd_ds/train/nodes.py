"""The nodes of a run: what each reads, what it writes, and whether its output is still valid.

A node is *complete* when RUN/<node>/done.json was written (last, atomically), its files are there, and its fingerprint
is unchanged. The fingerprint covers the config fields that can change the result, the content of the data, and the
sha256 of every input file; where the run folder lies, how many ranks ran it and how the batch was dealt to them (`batch.py`) are not
part of it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from m2mkd_ds import __version__
from m2mkd_ds.checkpoint.finished import DONE, read_done
from m2mkd_ds.checkpoint.store import file_sha256, write_json_atomic
from m2mkd_ds.config import ConfigError, DataConfig, RunConfig, TeacherConfig, to_dict
from m2mkd_ds.teacher.stored.logit_files import read_manifest
from m2mkd_ds.train.batch import batch_change, expected_ranks, is_layout, layout_of_images

ASSEMBLY = "student.keep_stitches"
"""Decides how modules are put together, not how they are trained."""

ACCESS = tuple(
    f"data.{key}"
    for key in (
        "train", "validation", "source", "num_workers", "cache_dir", "cache_gb", "look_ahead", "io_deadline_s", "allow_pipe",
        "max_bad_samples",
    )
)  # fmt: skip
"""Where the shards lie, how they were made and how they are read do not change a pixel."""

STEPS_OF_M2MKD = tuple(
    f"m2mkd.{key}"
    for key in ("epochs", "max_steps", "micro_batch_size", "gradient_accumulation_steps", "lr", "lr_batch", "warmup_epochs", "warmup_lr")
)
"""What length, learning rate and warm-up of the baseline follow from."""

ROUNDING = "teacher.rounding"
"""How what comes from a teacher elsewhere is rounded on its way, where it is; nothing else about where it is made changes a bit."""

TEACHER_FIELDS = ("teacher.arch", "teacher.arch_args", "teacher.depths", "teacher.source", "teacher.weights")


@dataclass(frozen=True)
class Node:
    """One step of the DAG."""

    name: str
    inputs: tuple[str, ...]
    """Nodes whose output files this one reads."""
    fields: tuple[str, ...]
    """Dotted config fields (or whole branches) that its result depends on."""
    launched: bool = False
    """Runs under the `deepspeed` launcher on all ranks (else in the pipeline's own process)."""
    per_pair: bool = False
    """Consists of N independent parts RUN/<node>/pair_<i>."""
    reads_data: bool = True
    """Whether the content of the shards is part of the fingerprint."""
    without: tuple[str, ...] = ()
    """Fields below `fields` that its result does not depend on."""


def build_dag(config: RunConfig) -> tuple[Node, ...]:
    """The nodes of this run in running order (Deep Incubation, or a pretrained teacher that is only split)."""
    common = ("seed", "data", *TEACHER_FIELDS)
    incubate = config.teacher.source == "incubate"
    teacher_nodes = (
        (
            Node("pretrain_meta", (), (*common, "meta", "pretrain_meta"), launched=True),
            Node("modular_train", ("pretrain_meta",), (*common, "meta", "modular_train"), launched=True, per_pair=True),
            Node("assemble_finetune", ("modular_train",), (*common, "assemble_finetune"), launched=True),
            Node("split", ("assemble_finetune",), TEACHER_FIELDS, reads_data=False),
        )
        if incubate
        else (
            Node("split", (), (*TEACHER_FIELDS, "data.num_classes", "data.image_size"), reads_data=False),
            Node("pretrain_meta", ("split",), (*common, "meta", "pretrain_meta"), launched=True),
        )
    )
    student_fields = ("seed", "data", "student")
    control = Node("baseline", (), (*student_fields, *STEPS_OF_M2MKD, "end_to_end"), launched=True, without=(ASSEMBLY,))
    baseline = (control,) if config.baseline else ()
    evaluated = ("pretrain_meta", "split", "m2mkd", "assemble", "end_to_end", *(n.name for n in baseline))
    return (
        *teacher_nodes,
        Node(
            "m2mkd", ("pretrain_meta", "split"), (*common, "meta", "student", "distill", "m2mkd"), launched=True, per_pair=True,
            without=(ASSEMBLY,),
        ),
        Node("assemble", ("m2mkd",), ("student", "teacher.depths"), reads_data=False),
        Node("end_to_end", ("assemble",), (*student_fields, "end_to_end"), launched=True),
        *baseline,
        Node("evaluate", evaluated, ("data", "student", "meta", *TEACHER_FIELDS), launched=True),
        Node("export", ("end_to_end", "evaluate"), ("export", "data", "student"), reads_data=False),
        Node("report", evaluated + ("evaluate", "export"), ("name",), reads_data=False),
    )  # fmt: skip


def find_node(config: RunConfig, name: str) -> Node:
    """The node called `name`; raises ConfigError listing the nodes of this run."""
    nodes = {node.name: node for node in build_dag(config)}
    if name not in nodes:
        raise ConfigError(f"no node {name!r} in this run; allowed are {', '.join(nodes)}")
    return nodes[name]


def relevant_config(config: RunConfig, node: Node) -> dict[str, Any]:
    """The part of the config that the node's result depends on, as {dotted field: value}."""
    picked = _picked(config, node)
    for path in (*ACCESS, *node.without):
        picked.pop(path, None)
    # A file counts by its content (see `fingerprint`), wherever it lies, and only where it is used.
    if config.teacher.source == "incubate" or reads_teacher_file(config):
        picked.pop("teacher.weights", None)
    for path in [p for p in picked if p.endswith((".log_steps", ".checkpoint_steps", ".eval_epochs"))]:
        picked.pop(path)
    for path in _idle(config.data):
        picked.pop(path, None)
    rounding = _rounding(config.teacher) if node.name == "m2mkd" else ""
    picked |= {ROUNDING: rounding} if rounding else {}
    kept = layout_of_images(config.data.augment)
    return {path: value for path, value in picked.items() if not is_layout(path) or path.endswith(kept)}


def _rounding(teacher: TeacherConfig) -> str:
    """What teacher.feed does to numbers; empty where it changes no bit. Raises StoreError for an unfinished folder of logits."""
    if teacher.is_remote and teacher.payload == "hidden" and teacher.wire_dtype not in ("auto", "fp32"):
        return f"hidden states in {teacher.wire_dtype}"
    if teacher.feed == "replay":
        stored = read_manifest(Path(teacher.replay)).contents.dtype
        return f"logits in {stored}" if stored != "fp32" else ""
    return ""


def _idle(data: DataConfig) -> list[str]:
    """Fields of the data that nothing reads with the others as they are."""
    augment = data.augment
    idle = [] if data.order == "block" else ["data.order_window"]
    idle += [] if augment.repeats > 1 else ["data.augment.repeat_mode"]
    return idle + ([] if augment.mixes else [f"data.augment.{key}" for key in ("mix_group", "mix_prob", "mix_switch_prob")])


def relevant_layout(config: RunConfig, node: Node) -> dict[str, Any]:
    """The layout fields of the phases that the node's result depends on, as {dotted field: value}; empty for nodes that train nothing."""
    return {path: value for path, value in _picked(config, node).items() if is_layout(path)}


def _picked(config: RunConfig, node: Node) -> dict[str, Any]:
    """All of `node.fields`, flat."""
    tree = to_dict(config)
    picked = {}
    for path in node.fields:
        value: Any = tree
        for part in path.split("."):
            value = value[part]
        picked.update(_flatten(path, value))
    return picked


def _flatten(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {path: leaf for key, sub in value.items() for path, leaf in _flatten(f"{prefix}.{key}", sub).items()}


def fingerprint(config: RunConfig, node: Node, root: Path, data_fingerprints: Mapping[str, str]) -> str:
    """sha256 of everything that determines the node's result. Raises ConfigError when an input is not complete."""
    material = {
        "node": node.name,
        "config": relevant_config(config, node),
        "data": dict(data_fingerprints) if node.reads_data else {},
        "inputs": {name: output_hashes(root, name) for name in node.inputs},
    }
    if node.name == "split" and reads_teacher_file(config):
        material["teacher.weights"] = file_sha256(teacher_file(config))
    return hashlib.sha256(json.dumps(material, sort_keys=True).encode()).hexdigest()


def reads_teacher_file(config: RunConfig) -> bool:
    """Whether the teacher comes from a file (and not from incubation or from timm's hub)."""
    return config.teacher.source == "pretrained" and config.teacher.weights != "timm"


def teacher_file(config: RunConfig) -> Path:
    """The file that teacher.weights names. Raises ConfigError when it is not there."""
    file = Path(config.teacher.weights)
    if not file.is_file():
        raise ConfigError(f"teacher.weights {file}: no such file; give a .safetensors or .pth file of {config.teacher.arch}, or `timm`")
    return file


def output_hashes(root: Path, name: str) -> dict[str, str]:
    """{relative file: sha256} that the finished node `name` recorded."""
    done = read_done(root / name)
    if done is None:
        raise ConfigError(f"{root / name} holds no finished output; run it first: m2mkd pipeline --config {root}/config.yaml")
    return {path: entry["sha256"] for path, entry in done["files"].items()}


def is_done(folder: Path, node: Node, config: RunConfig, print_: str, ranks: int) -> bool:
    """Whether the folder holds a finished result for the fingerprint `print_` and the batch that a job of `ranks` ranks would use."""
    done = read_done(folder)
    if done is None or done["fingerprint"] != print_ or missing_files(folder, done):
        return False
    return not batch_change(done, relevant_layout(config, node), ranks)


def missing_files(folder: Path, done: Mapping[str, Any]) -> list[str]:
    """Files of the record that are absent or of another size."""
    return [
        path for path, entry in done["files"].items()
        if not (folder / path).is_file() or (folder / path).stat().st_size != entry["bytes"]
    ]  # fmt: skip


def withdraw_done(folder: Path) -> None:
    """Remove the record of an output that is about to be replaced: stopped half-way, it must not vouch for the new files."""
    (folder / DONE).unlink(missing_ok=True)


def write_done(folder: Path, node: Node, config: RunConfig, print_: str, files: list[Path], **facts: Any) -> None:
    """Write done.json, the last act of a node. `print_` is its fingerprint; `facts` such as wall_s, steps, images are kept."""
    record = {
        "node": node.name,
        "fingerprint": print_,
        "config": relevant_config(config, node),
        "layout": relevant_layout(config, node),
        "inputs": list(node.inputs),
        "files": {str(f.relative_to(folder)): {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in sorted(files)},
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "commit": source_commit(),
        **facts,
    }
    write_json_atomic(folder / DONE, record)


def versions() -> dict[str, str]:
    """Versions of what determines the numbers."""
    packages = ("torch", "timm", "deepspeed", "webdataset", "transformers", "pillow", "numpy")
    return {"m2mkd_ds": __version__, "python": platform.python_version(), **{name: version(name) for name in packages}}


@dataclass(frozen=True)
class NodeState:
    """Whether a node must run, and why; `partial` tells that a checkpoint is there to go on from."""

    complete: bool
    reason: str


def node_state(config: RunConfig, node: Node, root: Path, data_fingerprints: Mapping[str, str], rerun: set[str]) -> NodeState:
    """Judge one node; `rerun` holds the names of earlier nodes that will run first."""
    folder = root / node.name
    done = read_done(folder)
    if done is None:
        started = any(folder.glob("**/checkpoints/step-*"))
        return NodeState(False, "goes on from its checkpoint" if started else "not done yet")
    for name in node.inputs:
        if name in rerun:
            return NodeState(False, f"its input {name} runs first")
        if read_done(root / name) is None:
            return NodeState(False, f"its input {name} is not done")
    changed = describe_change(done["config"], relevant_config(config, node))
    changed = changed or batch_change(done, relevant_layout(config, node), expected_ranks(config.launch))
    if changed:
        return NodeState(False, changed)
    gone = missing_files(folder, done)
    if gone:
        return NodeState(False, f"{node.name}/{gone[0]} is missing or has another size")
    if done["fingerprint"] != fingerprint(config, node, root, data_fingerprints):
        return NodeState(False, "its inputs or the data changed")
    return NodeState(True, f"complete since {done['finished']}, inputs unchanged")


def describe_change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """`m2mkd.lr changed: 0.001 -> 0.002`, or an empty string. What only one side has comes last: a field may count or not because of
    another one that changed."""
    if before.get(ROUNDING) != now.get(ROUNDING):
        return f"{ROUNDING} changed: {before.get(ROUNDING, 'none')} -> {now.get(ROUNDING, 'none')}"
    for path in sorted(before.keys() & now.keys()):
        if before[path] != now[path]:
            return f"{path} changed: {before[path]} -> {now[path]}"
    for path in sorted(now.keys() - before.keys()):
        return f"made by an older version, which did not have {path}"
    for path in sorted(before.keys() - now.keys()):
        return f"made by another version, for which {path} ({before[path]}) counted"
    return ""


def source_commit() -> str:
    """The git commit of the package's checkout, `-dirty` when changed; `unknown` outside one."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return run.stdout.strip()
