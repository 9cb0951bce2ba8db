"""DeepSpeed's JSON: found by name, filled from the run config, checked before any compute.

Each number has one owner. Batch, accumulation, clipping and precision belong to the run config (`PhaseConfig`): the JSON says
"auto" or nothing, or the same value. ZeRO, buckets and communication belong to the JSON. Optimizer and schedule are not
DeepSpeed's here. Keys that DeepSpeed has removed, or that this trainer was never tested with, are refused by name, because
DeepSpeed ignores many of them without a word.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import m2mkd_ds
from m2mkd_ds.config import ConfigError, PhaseConfig

ALLOWED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "zero_optimization",
    "communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "timers",
    "flops_profiler",
    "comms_logger",
)
"""Top-level keys that may stand in a file of ds_configs/."""

ALLOWED_ZERO_KEYS = (
    "stage",
    "reduce_scatter",
    "contiguous_gradients",
    "reduce_bucket_size",
    "use_multi_rank_bucket_allreduce",
    "allgather_partitions",
    "allgather_bucket_size",
    "overlap_comm",
    "ignore_unused_parameters",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_model_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
"""Keys that may stand in `zero_optimization`; those from `sub_group_size` on matter to stage 3 only."""

_REMOVED = "DeepSpeed 0.19 has removed it"
_OPTIMIZER = "the run config owns optimizer and schedule (lr, min_lr, warmup_epochs, betas, eps, weight_decay)"
_UNTESTED = "this trainer does not support it"

REFUSED_KEYS = {
    "elasticity": _REMOVED,
    "compression_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "nebula": _REMOVED,
    "amp": f"{_REMOVED}; use precision=bf16 in the run config",
    "quantize_training": _REMOVED,
    "sparse_gradients": _REMOVED,
    "eigenvalue": _REMOVED,
    "graph_harvesting": _REMOVED,
    "curriculum_learning": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "optimizer": _OPTIMIZER,
    "scheduler": _OPTIMIZER,
    "torch_autocast": "the run config owns the precision (fp32 or bf16 with fp32 master weights)",
    "managed_gradient_accumulation": "the run config owns gradient accumulation",
    "expert_parallel": "DeepSpeed's AutoEP knows gated experts of language models only; expert parallelism here is not DeepSpeed's",
    "data_efficiency": "the order of the data is a function of seed and step here",
    "hybrid_engine": _UNTESTED,
    "tensor_parallel": _UNTESTED,
    "sequence_parallel_size": _UNTESTED,
    "data_parallel_size": _UNTESTED,
    "pipeline": _UNTESTED,
    "autotuning": _UNTESTED,
    "compile": _UNTESTED,
    "aio": "it serves NVMe offload, which this trainer does not support",
    "checkpoint": "checkpoints are written by m2mkd_ds.checkpoint, not by DeepSpeed",
}
"""Top-level keys that are refused, each with its reason."""

REFUSED_ZERO_KEYS = {
    "mics_shard_size": _REMOVED,
    "mics_hierarchical_params_gather": _REMOVED,
    "zeropp_loco_param": _REMOVED,
    "offload_optimizer": "it needs a CPU Adam that is compiled at start-up; use more ranks or a smaller micro-batch",
    "offload_param": _UNTESTED,
    "zero_hpz_partition_size": _UNTESTED,
    "zero_quantized_weights": _UNTESTED,
    "zero_quantized_gradients": _UNTESTED,
    "leaf_module": _UNTESTED,
    "stage3_module_granularity_threshold": _UNTESTED,
    "stage3_gather_16bit_weights_on_model_save": "weights are gathered and written by m2mkd_ds",
    "zenflow": _UNTESTED,
    "round_robin_gradients": "checkpoints rely on parameters lying in order in the flat buffers",
    "parameter_alignment": "checkpoints rely on parameters lying without gaps in the flat buffers",
    "elastic_checkpoint": "checkpoints are written by m2mkd_ds.checkpoint, not by DeepSpeed",
    "compute_grad_norm": "the gradient norm is always logged and checked",
}
"""Keys of `zero_optimization` that are refused, each with its reason."""

SUPPORTED_STAGES = (1, 2, 3)


def config_folders() -> tuple[Path, ...]:
    """Where names are looked up: `ds_configs/` of a checkout, then the copy that an installed package carries."""
    package = Path(m2mkd_ds.__file__).parent
    return (package.parent / "ds_configs", package / "_ds_configs")


def find_ds_config(name_or_path: str) -> Path:
    """The file of a name (`zero1`) or of a path (`my/zero1.json`). Raises ConfigError listing the names there are."""
    if name_or_path.endswith(".json") or "/" in name_or_path:
        path = Path(name_or_path)
        if path.is_file():
            return path
        raise ConfigError(f"ds_config: no file {path}; give an existing JSON file, or a name: {', '.join(_names())}")
    for folder in config_folders():
        path = folder / f"{name_or_path}.json"
        if path.is_file():
            return path
    raise ConfigError(f"ds_config: there is no {name_or_path!r}; allowed are {', '.join(_names())}, or the path of a JSON file")


def _names() -> list[str]:
    return sorted({path.stem for folder in config_folders() for path in folder.glob("*.json")})


def read_ds_config(path: Path) -> dict[str, Any]:
    """Parse a JSON file; a key given twice and text that is not JSON are errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"{path}: {key} is given {keys.count(key)} times; give it once")
        return dict(pairs)

    try:
        tree = json.loads(path.read_text(), object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path}: not a JSON file ({err})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a JSON object of DeepSpeed settings, found {type(tree).__name__}")
    return tree


def resolve_ds_config(name_or_path: str, phase: PhaseConfig, *, world_size: int, precision: str, where: str = "phase") -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` gets: the file's settings with everything the run config owns filled in.

    `precision` is the resolved one (fp32 or bf16); `where` is how messages call the phase (for example `m2mkd`).
    Raises ConfigError, with both places and values, when the file says another number than the run config; with the reason,
    when the file holds a key that is refused.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"{where}.precision is {precision!r}; allowed here are fp32 and bf16 (resolve `auto` first)")
    path = find_ds_config(name_or_path)
    tree = read_ds_config(path)
    _check_keys(tree, path, allowed=ALLOWED_KEYS, refused=REFUSED_KEYS, block="")
    zero = tree.get("zero_optimization", {})
    _check_zero(zero, path)

    batch = phase.micro_batch_size * phase.gradient_accumulation_steps * world_size
    product = f"{where}.micro_batch_size * {where}.gradient_accumulation_steps * ranks"
    owned = {
        "train_batch_size": (batch, product),
        "train_micro_batch_size_per_gpu": (phase.micro_batch_size, f"{where}.micro_batch_size"),
        "gradient_accumulation_steps": (phase.gradient_accumulation_steps, f"{where}.gradient_accumulation_steps"),
        "gradient_clipping": (phase.clip_grad, f"{where}.clip_grad"),
    }
    for key, (value, owner) in owned.items():
        tree[key] = _fill(tree.get(key), value, path=path, key=key, owner=owner)
    tree["bf16"] = _resolve_bf16(tree.get("bf16", {}), precision, path, where)
    _check_fp16(tree.pop("fp16", {}), path, where)
    _check_gradient_dtypes(tree, precision, path, where)
    tree["zero_optimization"] = dict(zero)
    return tree


def _fill(given: Any, value: Any, *, path: Path, key: str, owner: str) -> Any:
    """`value` where the file says "auto", null or nothing; an equal value is fine, another is a clash."""
    if given is None or given == "auto" or (not isinstance(given, bool) and given == value):
        return value
    raise ConfigError(f'{path}: {key} is {json.dumps(given)}, but {owner} is {value}; write "auto" in the file or change the run config')


def _check_keys(tree: dict[str, Any], path: Path, *, allowed: tuple[str, ...], refused: dict[str, str], block: str) -> None:
    for key in tree:
        if key in refused:
            raise ConfigError(f"{path}: {block}{key} is refused: {refused[key]}; remove it")
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
            hint = f"did you mean {block}{close[0]}?" if close else f"allowed are {', '.join(allowed)}"
            raise ConfigError(f"{path}: {block}{key} is not a setting that this trainer knows; {hint}")


def _check_zero(zero: Any, path: Path) -> None:
    """Stage 1 to 3, reduce-scatter, contiguous gradients."""
    if not isinstance(zero, dict):
        raise ConfigError(f'{path}: zero_optimization is {json.dumps(zero)}; give an object, for example {{"stage": 1}}')
    _check_keys(zero, path, allowed=ALLOWED_ZERO_KEYS, refused=REFUSED_ZERO_KEYS, block="zero_optimization.")
    stage = zero.get("stage")
    if stage not in SUPPORTED_STAGES or isinstance(stage, bool):
        raise ConfigError(
            f"{path}: zero_optimization.stage is {json.dumps(stage)}; allowed are 1 (spread the optimizer states), 2 (and gradients) and "
            "3 (and weights)"
        )
    for key in ("reduce_scatter", "contiguous_gradients"):
        if zero.get(key, True) is not True:
            raise ConfigError(f"{path}: zero_optimization.{key} is {json.dumps(zero[key])}; only true is supported")


def _resolve_bf16(block: Any, precision: str, path: Path, where: str) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigError(f'{path}: bf16 is {json.dumps(block)}; give an object, for example {{"enabled": "auto"}}')
    _check_keys(block, path, allowed=("enabled", "check_grad_overflow"), refused={}, block="bf16.")
    given = block.get("enabled")
    enabled = precision == "bf16"
    if given not in (None, "auto") and given is not enabled:
        raise ConfigError(
            f'{path}: bf16.enabled is {json.dumps(given)}, but {where}.precision is {precision}; write "auto" in the file '
            "or change the run config"
        )
    # check_grad_overflow: a gradient that is not finite skips the update on every rank, in every precision alike.
    if block.get("check_grad_overflow", True) is not True:
        raise ConfigError(f"{path}: bf16.check_grad_overflow is {json.dumps(block['check_grad_overflow'])}; only true is supported")
    return {"enabled": enabled, "check_grad_overflow": True}


def _check_fp16(block: Any, path: Path, where: str) -> None:
    enabled = block.get("enabled", False) if isinstance(block, dict) else block
    if enabled not in (False, None, "auto"):
        raise ConfigError(f"{path}: fp16.enabled is {json.dumps(enabled)}, but {where}.precision offers fp32 and bf16 only; remove fp16")


def _check_gradient_dtypes(tree: dict[str, Any], precision: str, path: Path, where: str) -> None:
    """How gradients are summed over micro-batches and over ranks: fp32, or bf16 in a bf16 run."""
    block = tree.setdefault("data_types", {})
    if not isinstance(block, dict):
        raise ConfigError(f'{path}: data_types is {json.dumps(block)}; give an object, for example {{"grad_accum_dtype": "fp32"}}')
    _check_keys(block, path, allowed=("grad_accum_dtype",), refused={}, block="data_types.")
    allowed = ("fp32", "bf16") if precision == "bf16" else ("fp32",)
    for node, prefix, key in ((block, "data_types.", "grad_accum_dtype"), (tree, "", "communication_data_type")):
        node[key] = "fp32" if node.get(key) in (None, "auto") else node[key]
        if node[key] not in allowed:
            raise ConfigError(
                f"{path}: {prefix}{key} is {json.dumps(node[key])}, but {where}.precision is {precision}; "
                f"allowed then: {', '.join(allowed)}"
            )
