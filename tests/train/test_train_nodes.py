"""Nodes: what their fingerprints depend on, and how a finished one is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from m2mkd_ds.checkpoint.atomic import StoreError
from m2mkd_ds.checkpoint.finished import read_done
from m2mkd_ds.config import ConfigError, RunConfig, apply_overrides
from m2mkd_ds.distributed.world import World
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train import nodes
from m2mkd_ds.train.context import open_run
from m2mkd_ds.train.nodes import (
    build_dag,
    describe_change,
    find_node,
    fingerprint,
    is_done,
    node_state,
    output_hashes,
    relevant_config,
    write_done,
)
from m2mkd_ds.train.phases.finish import unfinished_pairs
from tests.train.finished_run import DATA, finish, finish_all, tiny_config

TINY = get_recipe("tiny")
TRAINED = {"pretrain_meta", "modular_train", "assemble_finetune", "m2mkd", "end_to_end", "baseline"}
STUDENT = {"m2mkd", "assemble", "end_to_end", "baseline", "evaluate", "export"}
TEACHER = {"pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "evaluate"}


def nodes_that_see(*overrides: str) -> set[str]:
    """Nodes whose own fields change with the overrides (not those that only hang on them)."""
    other = apply_overrides(TINY, list(overrides))
    before = {node.name: relevant_config(TINY, node) for node in build_dag(TINY)}
    after = {node.name: relevant_config(other, node) for node in build_dag(other)}
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("pretrain_meta.lr=1e-4", {"pretrain_meta"}),
        ("modular_train.drop_path=0.1", {"modular_train"}),
        ("assemble_finetune.epochs=2", {"assemble_finetune"}),
        ("m2mkd.clip_grad=0.5", {"m2mkd"}),
        ("m2mkd.lr=1e-4", {"m2mkd", "baseline"}),  # the control starts from fresh weights too, with the same learning rate
        ("distill.kd_weight=0", {"m2mkd"}),
        ("m2mkd.epochs=7", {"m2mkd", "baseline"}),  # the control takes as many steps as m2mkd and end_to_end
        ("data.decode=fast", TRAINED | {"evaluate", "export"}),
        ("data.order=block", TRAINED | {"evaluate", "export"}),
        ("data.augment.repeats=3", TRAINED | {"evaluate", "export"}),
        ("end_to_end.lr=1e-4", {"end_to_end", "baseline"}),
        ("student.moe.num_experts=5", STUDENT),
        ("student.keep_stitches=true", STUDENT - {"m2mkd", "baseline"}),
        ("meta.depths=[2,1]", {"pretrain_meta", "modular_train", "m2mkd", "evaluate"}),
        ("teacher.arch_args.num_heads=4", TEACHER),
        ("seed=1", TRAINED),
        ("data.image_size=32", TRAINED | {"evaluate", "export"}),
        ("export.license=apache-2.0", {"export"}),
        ("name=other", {"report"}),
    ],
)
def test_a_field_changes_exactly_the_nodes_that_it_matters_to(override: str, expected: set[str]) -> None:
    assert nodes_that_see(override) == expected


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=/elsewhere", "data.train=/elsewhere/train", "data.validation=/elsewhere/validation", "data.source=", "data.num_workers=3",
        "m2mkd.log_steps=7", "m2mkd.checkpoint_steps=7", "end_to_end.eval_epochs=1", "launch.num_gpus=7", "launch.one_job=false",
        "trackers=[wandb]", "teacher.weights=unused.pth", "teacher.feed=colocated", "m2mkd.micro_batch_size=8",
        "m2mkd.gradient_accumulation_steps=2", "end_to_end.ep_size=2", "pretrain_meta.ds_config=zero2", "data.cache_dir=/elsewhere",
        "data.cache_gb=1", "data.look_ahead=1", "data.io_deadline_s=1", "data.allow_pipe=true", "data.max_bad_samples=7",
        # tiny has order=global, repeats=1 and no mixing
        "data.order_window=4", "data.augment.repeat_mode=deit", "data.augment.mix_group=4", "data.augment.mix_prob=0.5",
        "data.augment.mix_switch_prob=0.1",
        "checkpoint.asynchronous=true", "checkpoint.deadline_s=1", "checkpoint.keep_last=5", "checkpoint.keep_every=10",
        "checkpoint.keep_best=1", "checkpoint.after_done=none",
    ],
)  # fmt: skip
def test_a_field_that_does_not_change_results_changes_no_node(override: str) -> None:
    assert nodes_that_see(override) == set()


def test_the_micro_batch_counts_where_whole_micro_batches_are_mixed() -> None:
    mixed = ["data.augment.mixup=0.8", "data.augment.mix_group=0"]
    base = apply_overrides(TINY, mixed)
    other = apply_overrides(TINY, [*mixed, "m2mkd.micro_batch_size=8", "m2mkd.gradient_accumulation_steps=2"])
    node = find_node(base, "m2mkd")
    assert describe_change(relevant_config(base, node), relevant_config(other, node)) == "m2mkd.micro_batch_size changed: 16 -> 8"
    fixed = [apply_overrides(config, ["data.augment.mix_group=2"]) for config in (base, other)]
    assert relevant_config(fixed[0], node) == relevant_config(fixed[1], node)


@pytest.mark.parametrize(
    ("used", "override"),
    [
        (["data.order=block"], "data.order_window=4"),
        (["data.augment.repeats=2"], "data.augment.repeat_mode=deit"),
        (["data.augment.mixup=0.8"], "data.augment.mix_group=4"),
        (["data.augment.cutmix=1"], "data.augment.mix_prob=0.5"),
        (["data.augment.cutmix=1", "data.augment.mixup=0.8"], "data.augment.mix_switch_prob=0.1"),
    ],
)
def test_a_field_of_the_data_counts_where_it_is_used(used: list[str], override: str) -> None:
    node = find_node(TINY, "m2mkd")
    before, after = (relevant_config(apply_overrides(TINY, words), node) for words in (used, [*used, override]))
    assert describe_change(before, after).startswith(override.split("=")[0] + " changed: ")


def test_the_layout_counts_where_it_deals_the_images_to_ranks() -> None:
    deit = ["data.augment.repeats=2", "data.augment.repeat_mode=deit"]
    other = [*deit, "m2mkd.micro_batch_size=8", "m2mkd.gradient_accumulation_steps=2"]
    for name in ("m2mkd", "baseline"):  # the control is as long as m2mkd, whose batch is a setting of it too
        node = find_node(TINY, name)
        before, after = (relevant_config(apply_overrides(TINY, words), node) for words in (deit, other))
        assert {path for path in after if before[path] != after[path]} == {
            "m2mkd.micro_batch_size", "m2mkd.gradient_accumulation_steps",
        }  # fmt: skip


@pytest.mark.parametrize(("mode", "left"), [("deit", [1]), ("stream", [])])
def test_pairs_that_ranks_give_other_images_do_not_make_one_node(tmp_path: Path, digits_shards: Path, mode: str, left: list[int]) -> None:
    config = tiny_config(tmp_path, digits_shards, "data.augment.repeats=2", f"data.augment.repeat_mode={mode}")
    finish_all(config, tmp_path)
    ctx = open_run(config, World(0, 2, 0, 2, torch.device("cpu")))
    node = find_node(config, "m2mkd")
    print_ = fingerprint(config, node, tmp_path, DATA)
    for pair, ranks in ((0, 2), (1, 4)):
        file = tmp_path / "m2mkd" / f"pair_{pair}" / "weights"
        file.parent.mkdir()
        file.write_text("weights")
        write_done(file.parent, node, config, print_, [file], world_size=ranks)
    assert [ctx.pairs[i].index for i in range(2)] == [0, 1] and len(ctx.pairs) == 2
    assert unfinished_pairs(ctx, node, print_) == left


def test_the_content_of_the_data_counts_where_it_is_read(tmp_path: Path) -> None:
    finish_all(TINY, tmp_path)
    changed = {**DATA, "train": "other images"}
    reading = {n.name for n in build_dag(TINY) if fingerprint(TINY, n, tmp_path, DATA) != fingerprint(TINY, n, tmp_path, changed)}
    assert reading == TRAINED | {"evaluate"}


def test_the_bytes_of_inputs_count_and_nothing_else_of_them(tmp_path: Path) -> None:
    finish_all(TINY, tmp_path)
    dag = build_dag(TINY)
    before = {node.name: fingerprint(TINY, node, tmp_path, DATA) for node in dag}
    finish(TINY, tmp_path, "m2mkd")  # done.json has a new time, the output the same bytes
    assert {node.name: fingerprint(TINY, node, tmp_path, DATA) for node in dag} == before
    finish(TINY, tmp_path, "m2mkd", content="other weights")
    after = {node.name: fingerprint(TINY, node, tmp_path, DATA) for node in dag}
    assert {name for name in before if before[name] != after[name]} == {"assemble", "evaluate", "report"}


def test_the_run_folder_and_its_place_do_not_count(tmp_path: Path) -> None:
    node = find_node(TINY, "pretrain_meta")
    assert fingerprint(TINY, node, tmp_path / "a", DATA) == fingerprint(replace(TINY, run_dir="/b"), node, tmp_path / "b", DATA)


def pretrained(weights: Path | str) -> RunConfig:
    base = get_recipe("tiny_pretrained")
    return replace(base, teacher=replace(base.teacher, weights=str(weights)))


def test_a_teacher_file_counts_by_its_content(tmp_path: Path) -> None:
    first, second = tmp_path / "first.pth", tmp_path / "elsewhere.pth"
    first.write_bytes(b"weights")
    second.write_bytes(b"weights")
    node = find_node(pretrained(first), "split")
    before = fingerprint(pretrained(first), node, tmp_path, DATA)
    assert fingerprint(pretrained(second), node, tmp_path, DATA) == before
    first.write_bytes(b"retrained")
    assert fingerprint(pretrained(first), node, tmp_path, DATA) != before
    assert fingerprint(pretrained("timm"), node, tmp_path, DATA) != before  # from timm's hub: no file is read
    with pytest.raises(ConfigError, match=r"teacher\.weights .*none\.pth: no such file"):
        fingerprint(pretrained(tmp_path / "none.pth"), node, tmp_path, DATA)


def test_the_two_routes_to_a_teacher_have_their_own_order() -> None:
    names = [node.name for node in build_dag(TINY)]
    assert names == [
        "pretrain_meta", "modular_train", "assemble_finetune", "split", "m2mkd", "assemble", "end_to_end", "baseline", "evaluate",
        "export", "report",
    ]  # fmt: skip
    other = [node.name for node in build_dag(replace(pretrained("timm"), baseline=False))]
    assert other == ["split", "pretrain_meta", "m2mkd", "assemble", "end_to_end", "evaluate", "export", "report"]
    for config in (TINY, pretrained("timm")):
        done: set[str] = set()
        for node in build_dag(config):
            assert set(node.inputs) <= done, "inputs come first"
            done.add(node.name)


def test_an_unknown_node_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ConfigError, match="no node 'm2mk' in this run; allowed are pretrain_meta, modular_train, .*report"):
        find_node(TINY, "m2mk")


def test_describe_change_names_the_field_and_both_values() -> None:
    before = {"m2mkd.lr": 0.001, "seed": 0, "old": 1}
    assert describe_change(before, dict(before)) == ""
    assert describe_change(before, {**before, "m2mkd.lr": 0.002}) == "m2mkd.lr changed: 0.001 -> 0.002"
    assert describe_change(before, {"m2mkd.lr": 0.001, "seed": 0}) == "made by another version, for which old (1) counted"
    assert describe_change(before, {**before, "data.decode": "pil"}) == "made by an older version, which did not have data.decode"
    # repeat_mode counts because repeats changed, and that is what is said
    counted = {**before, "data.augment.repeat_mode": "stream", "data.augment.repeats": 3}
    assert describe_change({**before, "data.augment.repeats": 1}, counted) == "data.augment.repeats changed: 1 -> 3"


def judge(config: RunConfig, root: Path, name: str, *, rerun: str = "", data: dict[str, str] = DATA) -> tuple[bool, str]:
    state = node_state(config, find_node(config, name), root, data, {rerun})
    return state.complete, state.reason


def test_a_finished_node_is_complete_and_says_since_when(tmp_path: Path) -> None:
    finish_all(TINY, tmp_path)
    done = json.loads((tmp_path / "m2mkd" / "done.json").read_text())
    assert judge(TINY, tmp_path, "m2mkd") == (True, f"complete since {done['finished']}, inputs unchanged")
    assert {"torch", "deepspeed", "timm", "python"} <= done["versions"].keys() and done["inputs"] == ["pretrain_meta", "split"]


def test_why_a_node_must_run(tmp_path: Path) -> None:
    assert judge(TINY, tmp_path, "m2mkd") == (False, "not done yet")
    (tmp_path / "m2mkd" / "pair_1" / "checkpoints" / "step-00000010").mkdir(parents=True)
    assert judge(TINY, tmp_path, "m2mkd") == (False, "goes on from its checkpoint")
    finish_all(TINY, tmp_path)
    changed = apply_overrides(TINY, ["m2mkd.lr=1e-4"])
    assert judge(changed, tmp_path, "m2mkd") == (False, "m2mkd.lr changed: 0.002 -> 0.0001")
    assert judge(TINY, tmp_path, "m2mkd", rerun="split") == (False, "its input split runs first")
    assert judge(TINY, tmp_path, "m2mkd", data={**DATA, "train": "other"}) == (False, "its inputs or the data changed")
    finish(TINY, tmp_path, "split", content="other modules")
    assert judge(TINY, tmp_path, "m2mkd") == (False, "its inputs or the data changed")
    (tmp_path / "split" / "done.json").unlink()
    assert judge(TINY, tmp_path, "m2mkd") == (False, "its input split is not done")


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        # tiny: 16 images a rank, 2 ranks, so 32 a step
        ([], ""),
        (["m2mkd.ds_config=zero2", "m2mkd.ep_size=2"], ""),
        (["m2mkd.micro_batch_size=8", "m2mkd.gradient_accumulation_steps=2"], ""),
        (["launch.num_gpus=1", "m2mkd.gradient_accumulation_steps=2"], ""),
        (["launch.num_gpus=4", "m2mkd.micro_batch_size=8"], ""),
        (["launch.num_gpus=7"], ""),  # the number of ranks alone was never a setting of the result
        (["m2mkd.micro_batch_size=8"], "the global batch of m2mkd changed: 16 x 2 ranks = 32 -> 8 x 2 ranks = 16"),
        (["launch.num_gpus=1", "m2mkd.micro_batch_size=8"], "the global batch of m2mkd changed: 16 x 2 ranks = 32 -> 8 x 1 ranks = 8"),
        (["launch.num_gpus=0", "m2mkd.micro_batch_size=8"], ""),  # on CPUs: whatever the launcher starts
        # with a hostfile nobody here knows the ranks: 8 images a rank may be 32 on four of them, 24 cannot
        (["launch.hostfile=hosts", "m2mkd.micro_batch_size=8"], ""),
        (
            ["launch.hostfile=hosts", "m2mkd.micro_batch_size=24"],
            "the global batch of m2mkd changed: 16 x 2 ranks = 32 -> 24 images a rank and step",
        ),
    ],
)
@pytest.mark.parametrize("name", ["m2mkd", "baseline"])
def test_a_finished_node_outlives_another_layout_but_not_another_batch(
    tmp_path: Path, overrides: list[str], reason: str, name: str
) -> None:
    # The control takes as many steps as m2mkd, whose batch counts for it too.
    finish_all(apply_overrides(TINY, []), tmp_path)
    changed = apply_overrides(TINY, overrides)
    complete, why = judge(changed, tmp_path, name)
    assert complete == (not reason) and (complete or why == reason)
    # A launched job knows its ranks, and judges alike.
    node = find_node(changed, name)
    if changed.launch.num_gpus and not changed.launch.hostfile:
        print_ = fingerprint(changed, node, tmp_path, DATA)
        assert is_done(tmp_path / name, node, changed, print_, changed.launch.num_gpus) == (not reason)


def test_a_missing_or_truncated_output_file_is_noticed(tmp_path: Path) -> None:
    finish_all(TINY, tmp_path)
    file = tmp_path / "split" / "output.txt"
    file.write_text("spli")  # one byte is gone
    assert judge(TINY, tmp_path, "split") == (False, "split/output.txt is missing or has another size")
    file.unlink()
    assert judge(TINY, tmp_path, "split") == (False, "split/output.txt is missing or has another size")
    finish(TINY, tmp_path, "split")
    assert judge(TINY, tmp_path, "split")[0]


def test_inputs_that_are_not_finished_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"split holds no finished output; run it first: m2mkd pipeline --config .*config.yaml"):
        output_hashes(tmp_path, "split")
    assert read_done(tmp_path / "split") is None


def test_a_damaged_done_record_is_told_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text('{"fingerprint": ')
    with pytest.raises(StoreError, match=r"done\.json: damaged, not JSON \(.*\); delete it, and the node runs again$"):
        read_done(tmp_path)


def test_only_rounding_of_what_a_teacher_elsewhere_gives_is_part_of_a_node(tmp_path: Path, digits_shards: Path) -> None:
    def seen(*overrides: str) -> dict[str, object]:
        config = tiny_config(tmp_path, digits_shards, *overrides)
        return relevant_config(config, find_node(config, "m2mkd"))

    remote = ("teacher.feed=remote", "teacher.endpoints=[127.0.0.1:1]")
    plain = seen()
    assert seen(*remote) == seen(*remote, "teacher.payload=logits", "teacher.wire_dtype=fp16") == seen("teacher.feed=shm") == plain
    rounded = seen(*remote, "teacher.wire_dtype=int8")
    assert rounded == {**plain, "teacher.rounding": "hidden states in int8"}
    assert describe_change(plain, rounded) == "teacher.rounding changed: none -> hidden states in int8"
    assert describe_change(rounded, plain) == "teacher.rounding changed: hidden states in int8 -> none"


@pytest.mark.parametrize(("stored", "rounding"), [("fp16", "logits in fp16"), ("bf16", "logits in bf16"), ("fp32", None)])
def test_logits_stored_in_16_bits_make_another_node(
    tmp_path: Path, digits_shards: Path, monkeypatch: pytest.MonkeyPatch, stored: str, rounding: str | None
) -> None:
    manifest = SimpleNamespace(contents=SimpleNamespace(dtype=stored))
    monkeypatch.setattr(nodes, "read_manifest", lambda folder: manifest if folder == Path("logits") else None)
    config = tiny_config(tmp_path, digits_shards, "teacher.feed=replay", "teacher.replay=logits")
    assert relevant_config(config, find_node(config, "m2mkd")).get("teacher.rounding") == rounding
    assert "teacher.rounding" not in relevant_config(config, find_node(config, "end_to_end"))
