"""Weights that a server vouches for and a trainer believes in: one bit in a file, and neither starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from m2mkd_ds.checkpoint.store import file_sha256
from m2mkd_ds.config import ConfigError, apply_overrides
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.distributed.world import World
from m2mkd_ds.teacher.protocol.handshake import check_hello
from m2mkd_ds.teacher.protocol.wire import FeedError, Hello, Limits
from m2mkd_ds.train.context import RunContext, open_run
from m2mkd_ds.train.teacher.run import check_files, run_fingerprints
from tests.train.finished_run import tiny_config

MODULES = ("split/module_0.safetensors", "split/module_1.safetensors")
META = "pretrain_meta/weights.safetensors"


def record(root: Path) -> None:
    """done.json of both nodes for the files that lie there."""
    for node in ("pretrain_meta", "split"):
        files = {file.name: {"bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in (root / node).glob("*.safetensors")}
        (root / node / "done.json").write_text(json.dumps({"files": files}))


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[7] ^= 1
    file.write_bytes(bytes(content))


@pytest.fixture
def ctx(tmp_path: Path, digits_shards: Path) -> RunContext:
    for number, name in enumerate((META, *MODULES)):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(range(number, number + 20)))
    record(tmp_path)
    return open_run(tiny_config(tmp_path, digits_shards), World(0, 1, 0, 1, torch.device("cpu")))


def test_a_server_refuses_a_module_with_another_bit_than_recorded(ctx: RunContext) -> None:
    check_files(ctx, ctx.pairs)
    flip_bit(ctx.root / MODULES[1])
    check_files(ctx, ctx.pairs[:1])  # a server of pair 0 has no use for it
    with pytest.raises(ConfigError, match=r"split/module_1.safetensors is not the file that the done.json beside it records"):
        check_files(ctx, ctx.pairs)


def test_a_trainer_refuses_a_meta_model_with_another_bit_than_recorded(ctx: RunContext) -> None:
    phase = ctx.config.m2mkd
    flip_bit(ctx.root / MODULES[0])  # a trainer need not have the teacher's modules, only their record
    assert run_fingerprints(ctx, phase, ctx.pairs)["weights.teacher.0"] != file_sha256(ctx.root / MODULES[0])
    flip_bit(ctx.root / META)
    with pytest.raises(ConfigError, match=r"pretrain_meta/weights.safetensors is not the file"):
        run_fingerprints(ctx, phase, ctx.pairs)


def test_trainer_and_server_of_weights_that_differ_in_one_bit_do_not_come_together(ctx: RunContext) -> None:
    trainer = run_fingerprints(ctx, ctx.config.m2mkd, ctx.pairs)
    flip_bit(ctx.root / MODULES[1])
    record(ctx.root)  # another run's module, rightly recorded there
    server = run_fingerprints(ctx, ctx.config.m2mkd, ctx.pairs)
    hello = Hello(
        oldest_protocol=2, newest_protocol=2, client="c", rank=0, layout=BatchLayout(micro_batch_size=4, accumulation=1, world=1),
        pairs=(0, 1), payload="hidden", wire_dtype="fp32", with_teacher=True, fingerprints=trainer,
    )  # fmt: skip
    limits = Limits(max_count=64, max_answer_bytes=2**20, max_in_flight=2, heartbeat_s=1.0)
    check_hello(hello, trainer, limits)
    with pytest.raises(FeedError) as refused:
        check_hello(hello, server, limits)
    ours, theirs = trainer["weights.teacher.1"], server["weights.teacher.1"]
    assert ours != theirs and str(refused.value) == f"weights.teacher.1: the trainer has {ours}, the server has {theirs}"


def test_another_crop_of_evaluation_images_is_another_fingerprint(ctx: RunContext) -> None:
    other = replace(ctx, config=apply_overrides(ctx.config, ["data.crop_pct=0.5"]))
    ours, theirs = (run_fingerprints(each, ctx.config.m2mkd, ctx.pairs) for each in (ctx, other))
    assert {name for name in ours if ours[name] != theirs[name]} == {"validation.crop_pct"}
