"""The one configuration tree of a run: frozen dataclasses, a YAML file in the run folder, typed dotted overrides.

    recipe function -> RunConfig -> `--set a.b=c` overrides -> RUN/config.yaml -> every rank reads that file

Each number has one owner. Batch, accumulation, clipping, learning rate and precision live here; ZeRO stage, buckets and
communication live in `ds_configs/*.json`; `distributed.ds_config` refuses a clash and names both places. Derived numbers
(global batch, number of steps, scaled learning rate) are computed where the world size is known and written to the log.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from dataclasses import dataclass, field
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from m2mkd_ds.checkpoint_config import CHECKPOINT_LIMITS, CheckpointConfig
from m2mkd_ds.data_config import DATA_LIMITS, AugmentConfig, DataConfig, check_data_config
from m2mkd_ds.phase_config import PHASE_LIMITS, PhaseConfig
from m2mkd_ds.router_config import ROUTER_PRESETS, RouterConfig, check_router, router_preset
from m2mkd_ds.teacher_config import TEACHER_LIMITS, TeacherConfig, check_teacher_config
from m2mkd_ds.watch_config import WATCH_LIMITS, WatchConfig, check_watch_config

__all__ = [
    "PAIR_PHASES", "PHASES", "ROUTER_PRESETS", "AugmentConfig", "CheckpointConfig", "ConfigError", "DataConfig", "DistillConfig",
    "ExportConfig", "LaunchConfig", "MetaConfig", "MoEConfig", "PhaseConfig", "RouterConfig", "RunConfig", "StudentConfig", "TeacherConfig",
    "WatchConfig", "apply_overrides", "check_router", "dump", "field_paths", "from_dict", "load", "to_dict",
]  # fmt: skip

PHASES = ("pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline")
"""Training phases, in the order in which the pipeline runs them."""
PAIR_PHASES = ("modular_train", "m2mkd")
"""Those that train a module of every pair; the others train a whole model."""


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The meta model M: a small ViT of the teacher's width with as many stages as the teacher."""

    depths: tuple[int, ...] = (1, 1, 1, 1)
    """Blocks per stage (one each in the paper; any positive number here)."""
    align_weight: float = 1.0
    """For teacher.source=pretrained: weight of the loss that makes the hidden state after meta stage i follow the
    teacher's after its stage i, so that teacher modules work inside the meta model. Not used with incubate."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which blocks are sparse, and their experts."""

    placement: Literal["all", "every", "last"] = "all"
    """all: every block. every: blocks n-1, 2n-1, ... last: the last n blocks."""
    placement_n: int = 2
    """The n of `every` and `last`."""
    num_experts: int = 8
    """Experts a MoE block."""
    backend: Literal["auto", "reference", "loop", "grouped", "padded", "fused", "triton", "tutel_dispatch"] = "auto"
    """Expert compute; does not change weights or names. auto: picked by device, dtype and shape from the measured table in
    `moe/backends/auto_table.py`, and the log says what and why. The others: docs/moe_backends.md."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Inside an expert. gelu: down(gelu(up(x))), exact erf form. swiglu: up has twice the rows, down(silu(gate) * value); half again
    as many weights and operations at the same width. Dense blocks keep GELU."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """How tokens choose; `student.moe.router=NAME` takes one of the presets (docs/moe.md)."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The V-MoE student S."""

    embed_dim: int = 768
    """Width D; stitch layers translate between it and the teacher's."""
    num_heads: int = 12
    """Attention heads; must divide `embed_dim`."""
    patch_size: int = 16
    """Side of a patch in pixels; must divide data.image_size."""
    mlp_ratio: float = 4.0
    """Hidden width of an expert (and of a dense block's MLP) over `embed_dim`."""
    depths: tuple[int, ...] = (3, 3, 3, 3)
    """Blocks per stage; as many stages as the teacher, any number of blocks."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """Its sparse blocks."""
    keep_stitches: bool = False
    """Keep the stitch layers when the modules are assembled (false: drop them, the authors' later default)."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The loss of a teaching pair: (1 - kd_weight) * task + kd_weight * T^2 * KD + router losses."""

    temperature: float = 1.0
    """T, which both logits are divided by before the softmax (soft distillation)."""
    kd_weight: float = 0.5
    """alpha; 0 is the control without a teacher, 1 uses no labels."""
    kd_type: Literal["soft", "hard"] = "soft"
    """soft: KL(teacher || student). hard: cross entropy with the teacher's argmax."""
    kd_reduction: Literal["batchmean", "deit_numel"] = "batchmean"
    """batchmean divides the summed KL by the batch. PAPER: the authors (after DeiT) divide by batch * classes, which
    switches the term almost off at 1000 classes; `deit_numel` reproduces that."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the pipeline calls the `deepspeed` launcher."""

    num_gpus: int = 0
    """Ranks on this host (CPU ranks too), or on each host of a hostfile; 0 leaves it to the launcher (all GPUs or one CPU rank; the
    slots of the hostfile)."""
    hostfile: str = ""
    """Hostfile of a cluster (scripts/hostfile.example), reached over ssh by pdsh; empty for this host alone."""
    master_addr: str = ""
    """Address of the first host of the hostfile as the others reach it; empty: what its name stands for here."""
    extra: tuple[str, ...] = ()
    """Further launcher flags, word by word."""
    threads_per_rank: int = 1
    """OMP_NUM_THREADS of a rank."""
    one_job: bool = False
    """Run neighbouring nodes in one launch: saves about ten seconds of start-up each, which matters for small runs only."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What the Hugging Face folder says about the model."""

    class_names: tuple[str, ...] = ()
    """id2label; empty: the names that the shards' index holds."""
    license: str = "mit"
    """Licence of the exported weights, as the model card's `license` field."""
    max_shard_size: str = "2GB"
    """Largest weights file of the folder, for example 500MB; larger models get several."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is. Built by a recipe, written to RUN/config.yaml, never edited after that."""

    name: str
    """Name of the recipe."""
    run_dir: str = ""
    """The run folder; holds config, weights, metrics and report."""
    seed: int = 0
    """Fresh weights, order of the images, augmentation and drop-path follow from it."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """Who teaches."""
    meta: MetaConfig = field(default_factory=MetaConfig)
    """The scaffold that modules are trained in."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """Who learns."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """The loss of phase m2mkd."""
    pretrain_meta: PhaseConfig = field(default_factory=PhaseConfig)
    """Train the meta model."""
    modular_train: PhaseConfig = field(default_factory=PhaseConfig)
    """Train the teacher's modules inside the meta model; not used with teacher.source=pretrained."""
    assemble_finetune: PhaseConfig = field(default_factory=PhaseConfig)
    """Train the assembled teacher; not used with teacher.source=pretrained."""
    m2mkd: PhaseConfig = field(default_factory=PhaseConfig)
    """Train the student's modules, each taught by its teacher module."""
    end_to_end: PhaseConfig = field(default_factory=PhaseConfig)
    """Train the assembled student."""
    baseline: bool = True
    """Also train the same student from scratch: as many steps as m2mkd + end_to_end, end_to_end's settings, m2mkd's lr and warm-up."""
    trackers: tuple[Literal["auto", "tensorboard", "wandb", "trackio"], ...] = ("auto",)
    """Who else gets what metrics.jsonl says. auto: tensorboard where it is installed; [] for nobody. Keys and addresses of wandb and
    trackio come from their own environment variables and log-ins, never from here."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written, and which stay."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """How ranks are started."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """When a rank counts as hung."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """The Hugging Face folder."""

    @property
    def num_stages(self) -> int:
        """N, the number of teaching pairs."""
        return len(self.teacher.depths)

    def __post_init__(self) -> None:
        _check(self)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, what was given, what is allowed and what to do."""


_LIMITS: dict[str, tuple[float, float]] = {
    **{f"data.{field}": limits for field, limits in DATA_LIMITS.items()},
    **{f"teacher.{field}": limits for field, limits in TEACHER_LIMITS.items()},
    **{f"checkpoint.{field}": limits for field, limits in CHECKPOINT_LIMITS.items()},
    **{f"watch.{field}": limits for field, limits in WATCH_LIMITS.items()},
    "student.embed_dim": (1, inf), "student.num_heads": (1, inf), "student.patch_size": (1, inf), "student.mlp_ratio": (0.01, inf),
    "student.moe.placement_n": (1, inf), "student.moe.num_experts": (1, inf), "launch.num_gpus": (0, inf),
    "launch.threads_per_rank": (1, inf), "meta.align_weight": (0, inf),
}  # fmt: skip
"""Smallest and largest allowed value by dotted field."""


def _check(config: RunConfig) -> None:
    """Refuse what is wrong in the tree itself; what needs the data or the models is checked where they are known."""
    for path, (low, high) in _LIMITS.items():
        _check_limits(path, attrgetter(path)(config), low, high)
    for name in ("teacher", "meta", "student"):
        depths = getattr(config, name).depths
        if not depths or min(depths) < 1:
            raise ConfigError(f"{name}.depths is {list(depths)}: every stage needs at least one block")
        if len(depths) != config.num_stages:
            raise ConfigError(
                f"{name}.depths has {len(depths)} stages and teacher.depths has {config.num_stages}: "
                "teacher, meta and student must have the same number of stages"
            )
    if config.student.embed_dim % config.student.num_heads:
        raise ConfigError(f"student.embed_dim {config.student.embed_dim} is not a multiple of student.num_heads {config.student.num_heads}")
    if not 0.0 <= config.distill.kd_weight <= 1.0:
        raise ConfigError(f"distill.kd_weight is {config.distill.kd_weight}; allowed is 0 (no teacher) to 1 (no labels)")
    if config.distill.temperature <= 0:
        raise ConfigError(f"distill.temperature is {config.distill.temperature}; it must be positive")
    try:
        check_data_config(config.data)
        check_teacher_config(config.teacher)
        patience_s = config.teacher.patience_s if config.teacher.is_remote else 0.0
        check_watch_config(config.watch, patience_s=patience_s, deadline_s=config.checkpoint.deadline_s)
        check_router(config.student.moe.router, config.student.moe.num_experts, at="student.moe.")
    except ValueError as err:
        raise ConfigError(str(err)) from None
    if config.data.image_size % config.student.patch_size:
        raise ConfigError(f"data.image_size {config.data.image_size} is not a multiple of student.patch_size {config.student.patch_size}")
    for name in ("pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end"):
        _check_phase(name, getattr(config, name))


def _check_limits(path: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ConfigError(f"{path} is {value}; " + (f"it must be at least {low}" if high == inf else f"allowed is {low} to {high}"))


def _check_phase(name: str, phase: PhaseConfig) -> None:
    for key, (low, high) in PHASE_LIMITS.items():
        _check_limits(f"{name}.{key}", getattr(phase, key), low, high)
    if phase.epochs <= 0 or phase.lr <= 0:
        raise ConfigError(f"{name}.epochs is {phase.epochs} and {name}.lr is {phase.lr}; both must be positive")
    if not 0 <= phase.warmup_epochs < phase.epochs:
        raise ConfigError(f"{name}.warmup_epochs is {phase.warmup_epochs}; allowed is 0 to less than {name}.epochs = {phase.epochs}")


for _cls in (
    AugmentConfig, DataConfig, TeacherConfig, MetaConfig, RouterConfig, MoEConfig, StudentConfig, DistillConfig, PhaseConfig,
    CheckpointConfig, LaunchConfig, WatchConfig, ExportConfig, RunConfig,
):  # fmt: skip
    # pydantic refuses keys that no field has, and NaN and infinity, all the way down
    _cls.__pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)  # type: ignore[union-attr]


def from_dict(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Build and check a RunConfig from plain data. Raises ConfigError with one line a wrong field."""
    if "tensorboard" in tree:  # of files that were written before there was `trackers`
        tree = {"trackers": ["tensorboard"] if tree["tensorboard"] else [], **{k: v for k, v in tree.items() if k != "tensorboard"}}
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as err:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in err.errors())) from None


def _explain(error: Any) -> str:
    """One pydantic error as `field: what is wrong (given ...)`."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{path}: no such field{_nearest(path)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    if error["type"] == "tuple_type":
        return f"{path}: expected a list, written '[A,B]' (given {error['input']!r})"
    return f"{path}: {error['msg']} (given {error['input']!r})"


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain data (dicts, lists, scalars) that `from_dict` reads back to an equal tree."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))


def field_paths() -> list[str]:
    """Every dotted path that `--set` accepts, in the order of the tree."""

    def walk(cls: Any, prefix: str) -> list[str]:
        paths = []
        for f in dataclasses.fields(cls):
            branch = dataclasses.is_dataclass(f.default_factory)
            paths += walk(f.default_factory, f"{prefix}{f.name}.") if branch else [f"{prefix}{f.name}"]
        return paths

    return walk(RunConfig, "")


def _nearest(path: str) -> str:
    paths = field_paths()
    close = difflib.get_close_matches(path, paths, n=1, cutoff=0.5)
    if not close:
        # Half a path (`lr`) or its end misspelt: compare the last words only.
        leaf = difflib.get_close_matches(path.rpartition(".")[2], [p.rpartition(".")[2] for p in paths], n=1)
        close = [p for p in paths if leaf and p.rpartition(".")[2] == leaf[0]]
    return f"; did you mean {' or '.join(close)}?" if close else "; `m2mkd recipes NAME` lists all fields"


def apply_overrides(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `key.path=value` strings (values are YAML: `[1, 2]`, `true`, `1e-3`, `text`) and check types and names.

    `teacher.arch_args.KEY=value` reaches into the free dictionary; `student.moe.router=PRESET` replaces that branch, and later
    words refine it. Raises ConfigError with the nearest field name.
    """
    tree = to_dict(config)
    known = set(field_paths())
    switches = []
    for text in assignments:
        path, sep, raw = text.partition("=")
        path = path.strip()
        if not sep:
            raise ConfigError(f"--set {text!r}: expected key=value, for example m2mkd.lr=1e-3")
        free = path.startswith("teacher.arch_args.") and path.count(".") == 2
        if path not in known and not free and path != _ROUTER_BRANCH:
            raise ConfigError(f"--set {path}: no such field{_nearest(path)}")
        node = tree
        *parents, leaf = path.split(".")
        for part in parents:
            node = node[part]
        node[leaf] = _parse_value(raw, path)
        if path == _ROUTER_BRANCH:
            node[leaf] = _router_tree(node[leaf])
        if isinstance(node[leaf], bool) and not free:
            switches.append(path)
    built = from_dict(tree, where="--set")
    for path in switches:
        if not isinstance(attrgetter(path)(built), bool):  # pydantic takes `true` for the number 1
            raise ConfigError(f"--set {path}: expected a number or text, and true or false was given")
    return built


_ROUTER_BRANCH = "student.moe.router"
"""The branch that takes the name of a preset."""


def _router_tree(name: Any) -> dict[str, Any]:
    try:
        return dataclasses.asdict(router_preset(name, _ROUTER_BRANCH))
    except ValueError as err:
        raise ConfigError(f"--set {err}") from None


class _YamlReader(yaml.SafeLoader):
    """YAML with the numbers that people write: 1e-3 is one (YAML 1.1 asks for 1.0e-3)."""


class _YamlWriter(yaml.SafeDumper):
    """Quotes text that the reader would take for such a number."""


for _yaml in (_YamlReader, _YamlWriter):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def _parse_value(raw: str, path: str) -> Any:
    try:
        return yaml.load(raw, Loader=_YamlReader) if raw.strip() else ""
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {path}={raw}: not a YAML value ({' '.join(str(err).split())})") from None


def dump(config: RunConfig) -> str:
    """The tree as YAML text."""
    return yaml.dump(to_dict(config), Dumper=_YamlWriter, sort_keys=False, width=120)


def load(path: str | Path) -> RunConfig:
    """Read a resolved file (RUN/config.yaml). Raises ConfigError when it is absent, not YAML, or not a tree of our fields."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file; `m2mkd pipeline --recipe NAME` writes one into the run folder")
    try:
        tree = yaml.load(file.read_text(), Loader=_YamlReader)
    except yaml.YAMLError as err:
        raise ConfigError(f"{file}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of fields, found {type(tree).__name__}")
    return from_dict(tree, where=str(file))
