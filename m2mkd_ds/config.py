"""The one configuration tree of a run: frozen dataclasses, a YAML file in the run folder, typed dotted overrides.

    recipe function -> RunConfig -> `--set a.b=c` overrides -> RUN/config.yaml -> every rank reads that file

Each number has one owner. Batch, accumulation, clipping, learning rate and precision live here; ZeRO stage, buckets and
communication live in `ds_configs/*.json`; `distributed.ds_config` refuses a clash and names both places. Derived numbers
(global batch, number of steps, scaled learning rate) are computed where the world size is known and written to the log.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

PHASES = ("pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline")
"""Training phases, in the order in which the pipeline runs them."""

PhaseName = Literal["pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline"]


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Training-time augmentation; every name means what it means in timm's `create_transform` and `Mixup`."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop. (1, 1) switches the crop off and pads/shifts instead (small images)."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    color_jitter: float = 0.0
    """Strength of colour jitter; ignored by timm when `auto_augment` is set."""
    auto_augment: str = ""
    """timm policy string, for example `rand-m9-mstd0.5-inc1`; empty for none."""
    random_erase: float = 0.0
    """Probability of random erasing (timm mode `pixel`)."""
    mixup: float = 0.0
    """Mixup alpha; 0 switches mixup off."""
    cutmix: float = 0.0
    """Cutmix alpha; 0 switches cutmix off."""
    mix_prob: float = 1.0
    """Probability that a micro-batch is mixed at all."""
    mix_switch_prob: float = 0.5
    """Probability of cutmix when both are on."""
    label_smoothing: float = 0.0
    """Label smoothing, folded into the soft targets."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how an image becomes a tensor."""

    train: str = ""
    """Folder of the training shards (holds `index.json`, see `m2mkd shards`)."""
    validation: str = ""
    """Folder of the validation shards; evaluation uses every image of it exactly once."""
    source: str = ""
    """Named source that the pipeline makes the shards from when they are not there: digits | fashion_mnist."""
    num_classes: int = 1000
    """Number of classes; checked against the index of the shards before anything runs."""
    image_size: int = 224
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per-channel mean that is subtracted from pixels in [0, 1]."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per-channel standard deviation that pixels are divided by."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resampling filter of training and evaluation."""
    crop_pct: float = 0.875
    """Evaluation: the shorter side is resized to image_size / crop_pct, then the centre is cropped."""
    num_workers: int = 2
    """Loader worker processes a rank; 0 decodes in the training process. The pixels do not depend on it."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The monolithic teacher T: any timm VisionTransformer, cut into N stages."""

    arch: str = "deit_large_patch16_224"
    """timm model name."""
    arch_args: dict[str, Any] = field(default_factory=dict)
    """Extra arguments of `timm.create_model`, for example {embed_dim: 96, depth: 8, num_heads: 4, patch_size: 4}."""
    depths: tuple[int, ...] = (6, 6, 6, 6)
    """Blocks per stage; their number is N, the number of teaching pairs; their sum is the depth of the teacher."""
    source: Literal["incubate", "pretrained"] = "incubate"
    """incubate: Deep Incubation (pretrain_meta, modular_train, assemble_finetune). pretrained: `weights`, only M is trained."""
    weights: str = ""
    """For source=pretrained: a .safetensors or .pth file, or `timm` for the weights that timm's hub entry of `arch` names."""
    feed: Literal["colocated"] = "colocated"
    """Where hidden states and teacher logits are made."""


@dataclass(frozen=True, kw_only=True)
class MetaConfig:
    """The meta model M: a small ViT of the teacher's width with as many stages as the teacher."""

    depths: tuple[int, ...] = (1, 1, 1, 1)
    """Blocks per stage (one each in the paper; any positive number here)."""
    align_weight: float = 1.0
    """For teacher.source=pretrained: weight of the loss that makes the hidden state after meta stage i follow the
    teacher's after its stage i, so that teacher modules work inside the meta model. Not used with incubate."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts."""

    top_k: int = 2
    """Experts a token."""
    softmax: Literal["before", "after"] = "after"
    """before: softmax over all experts, then top-k (V-MoE). after: top-k of the logits, then softmax over them (the authors' NaiveGate)."""
    renormalize: bool = False
    """With softmax=before: divide the kept weights by their sum."""
    bias: bool = True
    """Whether the router's linear map has a bias (the authors' has)."""
    importance_weight: float = 0.0
    """Weight of the importance loss, CV^2 of the summed gate values (V-MoE appendix A)."""
    switch_weight: float = 0.01
    """Weight of the Switch load-balancing loss. PAPER: the authors' release trains with no balancing loss at all (0)."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Which blocks are sparse, and their experts."""

    placement: Literal["all", "every", "last"] = "all"
    """all: every block. every: blocks n-1, 2n-1, ... last: the last n blocks."""
    placement_n: int = 2
    """The n of `every` and `last`."""
    num_experts: int = 8
    """Experts a MoE block."""
    backend: Literal["auto", "reference", "grouped"] = "auto"
    """Expert compute. auto: `grouped` where torch's grouped matmul supports dtype and shape, else an error names why."""
    router: RouterConfig = field(default_factory=RouterConfig)


@dataclass(frozen=True, kw_only=True)
class StudentConfig:
    """The V-MoE student S."""

    embed_dim: int = 768
    num_heads: int = 12
    patch_size: int = 16
    mlp_ratio: float = 4.0
    depths: tuple[int, ...] = (3, 3, 3, 3)
    """Blocks per stage; as many stages as the teacher, any number of blocks."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    keep_stitches: bool = False
    """Keep the stitch layers when the modules are assembled (false: drop them, the authors' later default)."""


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The loss of a teaching pair: (1 - kd_weight) * task + kd_weight * T^2 * KD + router losses."""

    temperature: float = 1.0
    kd_weight: float = 0.5
    """alpha; 0 is the control without a teacher, 1 uses no labels."""
    kd_type: Literal["soft", "hard"] = "soft"
    """soft: KL(teacher || student). hard: cross entropy with the teacher's argmax."""
    kd_reduction: Literal["batchmean", "deit_numel"] = "batchmean"
    """batchmean divides the summed KL by the batch. PAPER: the authors (after DeiT) divide by batch * classes, which
    switches the term almost off at 1000 classes; `deit_numel` reproduces that."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One training phase."""

    epochs: float = 100.0
    """Passes over the training images. steps = round(epochs * images / global batch), at least 1."""
    max_steps: int = 0
    """Upper bound on optimizer steps; 0 for none."""
    micro_batch_size: int = 128
    """Images of one forward pass on one rank."""
    gradient_accumulation_steps: int = 1
    """Forward-backward passes an optimizer step. global batch = micro_batch_size * this * ranks."""
    lr: float = 5e-4
    """Peak learning rate for `lr_batch` images; the scaled value is logged, this field is never edited."""
    lr_batch: int = 512
    """Linear scaling: peak = lr * global_batch / lr_batch. 0 switches scaling off."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine (not scaled)."""
    warmup_lr: float = 1e-6
    """Learning rate of the first warm-up step (not scaled)."""
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    """Not applied to norms, biases, positions, tokens and layer scales."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip_grad: float = 0.0
    """Largest global gradient norm, in every precision, per teaching pair; 0 for none."""
    drop_path: float = 0.0
    """Stochastic depth of the last block of the whole model; the ramp is global, not per module."""
    ema_decay: float = 0.0
    """Exponential moving average of the weights; 0 for none. With it, the averaged weights are the phase's result."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the hardware has bf16 units, else fp32."""
    ds_config: str = "zero1"
    """Name of a file in ds_configs/ (without .json), or a path."""
    eval_epochs: float = 10.0
    """Evaluate every so many epochs, and always at the end; 0: only at the end."""
    checkpoint_steps: int = 500
    """Save a resumable checkpoint every so many steps, and at the end."""
    log_steps: int = 20
    """Write a line to metrics.jsonl every so many steps."""


@dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """How the pipeline calls the `deepspeed` launcher."""

    num_gpus: int = 0
    """Ranks on this host (CPU ranks too); 0 leaves it to the launcher (all GPUs, or one CPU rank)."""
    hostfile: str = ""
    """Hostfile of a cluster; empty for this host alone."""
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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything a run is. Built by a recipe, written to RUN/config.yaml, never edited after that."""

    name: str
    """Name of the recipe."""
    run_dir: str = ""
    """The run folder; holds config, weights, metrics and report."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    meta: MetaConfig = field(default_factory=MetaConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    pretrain_meta: PhaseConfig = field(default_factory=PhaseConfig)
    modular_train: PhaseConfig = field(default_factory=PhaseConfig)
    assemble_finetune: PhaseConfig = field(default_factory=PhaseConfig)
    m2mkd: PhaseConfig = field(default_factory=PhaseConfig)
    end_to_end: PhaseConfig = field(default_factory=PhaseConfig)
    baseline: bool = True
    """Also train the same student from scratch, with the end_to_end settings, for as many steps as m2mkd + end_to_end take."""
    tensorboard: bool = False
    """Mirror metrics.jsonl to TensorBoard event files beside it."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    @property
    def num_stages(self) -> int:
        """N, the number of teaching pairs."""
        return len(self.teacher.depths)

    def __post_init__(self) -> None:
        _check(self)


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the field, what was given, what is allowed and what to do."""


def _check(config: RunConfig) -> None:
    """Refuse what is wrong in the tree itself; what needs the data or the models is checked where they are known."""
    for name in ("teacher", "meta", "student"):
        depths = getattr(config, name).depths
        if not depths or min(depths) < 1:
            raise ConfigError(f"{name}.depths is {list(depths)}: every stage needs at least one block")
        if len(depths) != config.num_stages:
            raise ConfigError(
                f"{name}.depths has {len(depths)} stages and teacher.depths has {config.num_stages}: "
                "teacher, meta and student must have the same number of stages"
            )
    if config.teacher.source == "pretrained" and not config.teacher.weights:
        raise ConfigError("teacher.source=pretrained needs teacher.weights: a .safetensors or .pth file, or `timm`")
    if config.student.embed_dim % config.student.num_heads:
        raise ConfigError(f"student.embed_dim {config.student.embed_dim} is not a multiple of student.num_heads {config.student.num_heads}")
    if not 0.0 <= config.distill.kd_weight <= 1.0:
        raise ConfigError(f"distill.kd_weight is {config.distill.kd_weight}; allowed is 0 (no teacher) to 1 (no labels)")
    if config.distill.temperature <= 0:
        raise ConfigError(f"distill.temperature is {config.distill.temperature}; it must be positive")
    moe = config.student.moe
    if not 1 <= moe.router.top_k <= moe.num_experts:
        raise ConfigError(f"student.moe.router.top_k is {moe.router.top_k}; allowed is 1 to student.moe.num_experts = {moe.num_experts}")
    if config.data.image_size % config.student.patch_size:
        raise ConfigError(f"data.image_size {config.data.image_size} is not a multiple of student.patch_size {config.student.patch_size}")
    for phase in ("pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end"):
        p: PhaseConfig = getattr(config, phase)
        for key in ("micro_batch_size", "gradient_accumulation_steps", "checkpoint_steps", "log_steps"):
            if getattr(p, key) < 1:
                raise ConfigError(f"{phase}.{key} is {getattr(p, key)}; it must be at least 1")
        if p.epochs <= 0 or p.lr <= 0:
            raise ConfigError(f"{phase}.epochs is {p.epochs} and {phase}.lr is {p.lr}; both must be positive")


def _forbid_unknown_keys(cls: type) -> None:
    """Let pydantic refuse keys that no field has, all the way down."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]


_TREE: tuple[type, ...] = (
    AugmentConfig, DataConfig, TeacherConfig, MetaConfig, RouterConfig, MoEConfig, StudentConfig, DistillConfig, PhaseConfig,
    LaunchConfig, ExportConfig, RunConfig,
)  # fmt: skip
for _cls in _TREE:
    _forbid_unknown_keys(_cls)


def from_dict(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Build and check a RunConfig from plain data. Raises ConfigError with one line a wrong field."""
    try:
        return TypeAdapter(RunConfig).validate_python(tree)
    except ValidationError as err:
        lines = [_explain(e) for e in err.errors()]
        raise ConfigError(f"{where}: " + "; ".join(lines)) from None


def _explain(error: Any) -> str:
    """One pydantic error as `field: what is wrong (given ...)`."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "unexpected_keyword_argument":
        return f"{path}: no such field{_nearest(path)}"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
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
        hints = {f.name: f for f in dataclasses.fields(cls)}
        for name, f in hints.items():
            sub = f.default_factory if dataclasses.is_dataclass(f.default_factory) else None
            paths += walk(sub, f"{prefix}{name}.") if sub else [f"{prefix}{name}"]
        return paths

    return walk(RunConfig, "")


def _nearest(path: str) -> str:
    close = difflib.get_close_matches(path, field_paths(), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else "; `m2mkd recipes NAME` lists all fields"


def apply_overrides(config: RunConfig, assignments: list[str]) -> RunConfig:
    """Apply `key.path=value` strings (values are YAML: `[1, 2]`, `true`, `1e-3`, `text`) and check types and names.

    `teacher.arch_args.KEY=value` reaches into the free dictionary. Raises ConfigError with the nearest field name.
    """
    tree = to_dict(config)
    known = set(field_paths())
    for text in assignments:
        path, sep, raw = text.partition("=")
        path = path.strip()
        if not sep:
            raise ConfigError(f"--set {text!r}: expected key=value, for example m2mkd.lr=1e-3")
        free = path.startswith("teacher.arch_args.")
        if path not in known and not free:
            raise ConfigError(f"--set {path}: no such field{_nearest(path)}")
        node = tree
        *parents, leaf = path.split(".")
        for part in parents:
            node = node[part]
        node[leaf] = _parse_value(raw, path)
    return from_dict(tree, where="--set")


def _parse_value(raw: str, path: str) -> Any:
    try:
        return yaml.safe_load(raw) if raw.strip() else ""
    except yaml.YAMLError as err:
        raise ConfigError(f"--set {path}={raw}: not a YAML value ({err})") from None


def dump(config: RunConfig) -> str:
    """The tree as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, width=120)


def load(path: str | Path) -> RunConfig:
    """Read a resolved file (RUN/config.yaml)."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: no such config file; `m2mkd pipeline --recipe NAME` writes one into the run folder")
    try:
        tree = yaml.safe_load(file.read_text())
    except yaml.YAMLError as err:
        raise ConfigError(f"{file}: not YAML ({err})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: expected a mapping of fields, found {type(tree).__name__}")
    return from_dict(tree, where=str(file))
