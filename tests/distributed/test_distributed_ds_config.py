"""ds_configs/*.json: found, filled, and refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from m2mkd_ds.config import ConfigError, PhaseConfig
from m2mkd_ds.distributed.ds_config import REFUSED_KEYS, REFUSED_ZERO_KEYS, config_folders, find_ds_config, resolve_ds_config

PHASE = PhaseConfig(micro_batch_size=8, gradient_accumulation_steps=3, clip_grad=0.5)


def resolve(path: Path | str, tree: dict[str, Any] | None = None, *, precision: str = "fp32", where: str = "m2mkd") -> dict[str, Any]:
    if tree is not None:
        Path(path).write_text(json.dumps(tree))
    return resolve_ds_config(str(path), PHASE, world_size=4, precision=precision, where=where)


def with_zero(**zero: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 1, **zero}}


@pytest.mark.parametrize("name", sorted(path.stem for path in config_folders()[0].glob("*.json")))
def test_every_shipped_file_resolves_and_deepspeed_accepts_it(name: str) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    resolved = resolve(name, precision="bf16")
    # 8 images * 3 micro-batches * 4 ranks
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (96, 8)
    assert (resolved["gradient_accumulation_steps"], resolved["gradient_clipping"]) == (3, 0.5)
    assert resolved["bf16"]["enabled"] is True
    assert "auto" not in json.dumps(resolved)
    parsed = DeepSpeedConfig({**resolved, "train_batch_size": 24})  # 24: this process is one rank
    assert parsed.gradient_clipping == 0.5
    assert parsed.zero_config.stage == resolved["zero_optimization"]["stage"]


def test_readme_has_a_row_for_every_file() -> None:
    readme = (config_folders()[0] / "README.md").read_text()
    for path in config_folders()[0].glob("*.json"):
        assert f"| `{path.name}` |" in readme


def test_what_the_file_leaves_out_is_filled(tmp_path: Path) -> None:
    resolved = resolve(tmp_path / "mine.json", with_zero())
    assert resolved == {
        "zero_optimization": {"stage": 1},
        "train_batch_size": 96,
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 0.5,
        "bf16": {"enabled": False, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }


def test_equal_numbers_are_fine(tmp_path: Path) -> None:
    tree = {**with_zero(), "train_batch_size": 96, "gradient_clipping": 0.5, "bf16": {"enabled": False}, "fp16": {"enabled": False}}
    assert "fp16" not in resolve(tmp_path / "mine.json", tree)


CLASHES = {
    "train_batch_size is 64, but m2mkd.micro_batch_size * m2mkd.gradient_accumulation_steps * ranks is 96": {"train_batch_size": 64},
    "train_micro_batch_size_per_gpu is 16, but m2mkd.micro_batch_size is 8": {"train_micro_batch_size_per_gpu": 16},
    "gradient_accumulation_steps is 1, but m2mkd.gradient_accumulation_steps is 3": {"gradient_accumulation_steps": 1},
    "gradient_clipping is 1.0, but m2mkd.clip_grad is 0.5": {"gradient_clipping": 1.0},
    "bf16.enabled is true, but m2mkd.precision is fp32": {"bf16": {"enabled": True}},
    "fp16.enabled is true, but m2mkd.precision offers fp32 and bf16 only": {"fp16": {"enabled": True}},
    "communication_data_type is \"bf16\", but m2mkd.precision is fp32": {"communication_data_type": "bf16"},
    "data_types.grad_accum_dtype is \"bf16\", but m2mkd.precision is fp32": {"data_types": {"grad_accum_dtype": "bf16"}},
}  # fmt: skip


@pytest.mark.parametrize("message", CLASHES)
def test_a_clash_names_both_places_and_values(tmp_path: Path, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(tmp_path / "mine.json", {**with_zero(), **CLASHES[message]})
    assert message in str(caught.value)
    assert str(tmp_path / "mine.json") in str(caught.value)


def test_everything_that_deepspeed_removed_is_refused_with_that_reason() -> None:
    # DeepSpeed's own tables are the independent list.
    from deepspeed.runtime import config as theirs

    assert set(theirs._REMOVED_TOP_LEVEL_CONFIG_KEYS) <= {key for key, why in REFUSED_KEYS.items() if "removed" in why}
    assert set(theirs._REMOVED_ZERO_CONFIG_KEYS) <= {key for key, why in REFUSED_ZERO_KEYS.items() if "removed" in why}


@pytest.mark.parametrize("key", ["elasticity", "compression_training", "sparse_attention", "optimizer", "scheduler", "checkpoint"])
def test_refused_blocks_are_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine.json: {key} is refused: .*; remove it"):
        resolve(tmp_path / "mine.json", {**with_zero(), key: {"enabled": False}})


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"mics_shard_size": 4}, "zero_optimization.mics_shard_size is refused: DeepSpeed 0.19 has removed it"),
        ({"offload_optimizer": {"device": "cpu"}}, "zero_optimization.offload_optimizer is refused"),
        ({"stage": 4}, r"zero_optimization.stage is 4; allowed are 1 .*, 2 .* and 3"),
        ({"stage": 0}, r"zero_optimization.stage is 0; allowed are 1 .*, 2 .* and 3"),
        ({"stage": True}, "zero_optimization.stage is true"),
        ({"reduce_scatter": False}, "zero_optimization.reduce_scatter is false; only true"),
        ({"contiguous_gradients": False}, "zero_optimization.contiguous_gradients is false; only true"),
        ({"reduce_bucket": 5}, "did you mean zero_optimization.reduce_bucket_size?"),
    ],
)
def test_zero_settings_that_do_not_work_here_are_refused(tmp_path: Path, zero: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(tmp_path / "mine.json", with_zero(**zero))


def test_a_misspelt_key_gives_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gradient_cliping is not a setting .* did you mean gradient_clipping\?"):
        resolve(tmp_path / "mine.json", {**with_zero(), "gradient_cliping": 1.0})


def test_no_zero_block_and_a_wrong_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zero_optimization.stage is null"):
        resolve(tmp_path / "mine.json", {})
    with pytest.raises(ConfigError, match="zero_optimization is true; give an object"):
        resolve(tmp_path / "mine.json", {"zero_optimization": True})


def test_names_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no 'zero9'; allowed are zero1, .*zero2"):
        find_ds_config("zero9")
    with pytest.raises(ConfigError, match="no file .*nowhere.json"):
        find_ds_config(str(tmp_path / "nowhere.json"))


def test_text_that_is_not_a_json_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    for text, message in (("{", "not a JSON file"), ("[1]", "found list"), ('{"bf16": {}, "bf16": {}}', "bf16 is given 2 times")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            resolve(path)


def test_precision_must_be_resolved_first() -> None:
    with pytest.raises(ConfigError, match="m2mkd.precision is 'auto'; allowed here are fp32 and bf16"):
        resolve("zero1", precision="auto")
