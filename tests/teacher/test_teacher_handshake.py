"""The handshake refuses what differs, by field and with both values, on either side; what may differ is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from m2mkd_ds.config import RunConfig, apply_overrides
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.plan import BatchLayout
from m2mkd_ds.teacher.protocol.connection import LocalConnection
from m2mkd_ds.teacher.protocol.handshake import (
    _class_map,
    check_hello,
    check_welcome,
    fingerprints,
    plan_digest,
    version_differences,
    versions,
)
from m2mkd_ds.teacher.protocol.packing import pack, unpack
from m2mkd_ds.teacher.protocol.wire import FeedError, Hello, Limits, Welcome
from m2mkd_ds.teacher.server.service import TeacherService
from tests.teacher.conftest import LIMITS, tiny_fingerprints

LAYOUT = BatchLayout(micro_batch_size=4, accumulation=2, world=2)


def hello(prints: dict[str, str], **changes: Any) -> Hello:
    given: dict[str, Any] = {
        "oldest_protocol": 2, "newest_protocol": 2, "client": "test", "rank": 1, "layout": LAYOUT, "pairs": (0, 1, 2), "payload": "hidden",
        "wire_dtype": "fp32", "with_teacher": True, "fingerprints": prints,
    }  # fmt: skip
    return Hello(**{**given, **changes})


@pytest.fixture(scope="module")
def prints(tiny_config: RunConfig, tiny_index: ShardIndex) -> dict[str, str]:
    return tiny_fingerprints(tiny_config, tiny_index)


def refusal(trainer: dict[str, str], server: dict[str, str], **changes: Any) -> str:
    """What the server says to the trainer; where the payload allows, the trainer must say the same of the server's welcome."""
    with pytest.raises(FeedError) as refused:
        check_hello(hello(trainer, **changes), server, LIMITS)
    assert refused.value.code == "mismatch"
    welcome = Welcome(protocol=2, instance="i", plan="p", fingerprints=server, limits=LIMITS)
    with pytest.raises(FeedError) as ours:
        check_welcome(welcome, trainer, decodes=changes.get("payload") == "logits")
    assert str(ours.value) == str(refused.value)
    return str(refused.value)


# what is set on the server's side -> the whole refusal: nothing else may differ
SETTINGS = {
    "data.augment.mixup=0.0": "data.augment.mixup: the trainer has 0.2, the server has 0.0",
    "data.augment.random_erase=0.5": "data.augment.random_erase: the trainer has 0.25, the server has 0.5",
    "data.augment.auto_augment=rand-m9": "data.augment.auto_augment: the trainer has , the server has rand-m9",
    "data.augment.mix_group=4": "data.augment.mix_group: the trainer has 2, the server has 4",
    "data.augment.crop_scale=[0.5,1]": "data.augment.crop_scale: the trainer has [0.08,1.0], the server has [0.5,1.0]",
    "data.mean=[0.5,0.5,0.5]": "data.mean: the trainer has [0.485,0.456,0.406], the server has [0.5,0.5,0.5]",
    "data.std=[0.5,0.5,0.5]": "data.std: the trainer has [0.229,0.224,0.225], the server has [0.5,0.5,0.5]",
    "data.interpolation=bilinear": "data.interpolation: the trainer has bicubic, the server has bilinear",
    "data.decode=fast": "data.decode: the trainer has pil, the server has fast",
    "data.order=block": "data.order: the trainer has global, the server has block/16",
    "seed=8": "seed: the trainer has 7, the server has 8",
    "meta.depths=[1,1,2]": "meta.depths: the trainer has [1,1,1], the server has [1,1,2]",
    "teacher.depths=[1,2,3]": "teacher.depths: the trainer has [2,2,2], the server has [1,2,3]",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_that_differs_is_the_only_one_named(
    setting: str, tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]
) -> None:
    server = tiny_fingerprints(apply_overrides(tiny_config, [setting]), tiny_index)
    assert refusal(prints, server) == SETTINGS[setting]
    assert plan_digest(prints, LAYOUT) != plan_digest(server, LAYOUT)


def test_settings_that_change_no_number_do_not_matter(tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]) -> None:
    other = apply_overrides(
        tiny_config, ["data.num_workers=8", "data.order_window=4", "data.crop_pct=0.9", "m2mkd.lr=1", "student.embed_dim=32", "name=x"]
    )
    assert tiny_fingerprints(other, tiny_index) == prints


def test_an_epsilon_behind_the_same_weights_is_named(tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]) -> None:
    """timm's CLIP models have eps 1e-5, vit_tiny 1e-6; without CLIP's first norm, every weight has the same name and shape."""
    arch_args = {**tiny_config.teacher.arch_args, "pre_norm": False}
    teacher = replace(tiny_config.teacher, arch="vit_base_patch16_clip_224", arch_args=arch_args)
    server = tiny_fingerprints(replace(tiny_config, teacher=teacher), tiny_index)
    assert "model.eps: the trainer has [1e-06], the server has [1e-05]" in refusal(prints, server)
    assert server["model.parameters"] == prints["model.parameters"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num_heads": 4}, "model.heads: the trainer has [2], the server has [4]"),
        ({"global_pool": "avg"}, "model.pool: the trainer has token, the server has avg"),
        ({"class_token": False, "global_pool": "avg"}, "model.tokens: the trainer has 17, the server has 16"),
        ({"act_layer": "relu"}, '"LayerNorm","Linear","ReLU"]; teacher'),
        ({"no_embed_class": True}, "model.positions: the trainer has [1,17,32], the server has [1,16,32]"),
        ({"patch_size": 8}, "model.patch_size: the trainer has [4,4], the server has [8,8]"),
    ],
)
def test_an_architecture_that_computes_something_else_is_named(
    change: dict[str, Any], told: str, tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]
) -> None:
    teacher = replace(tiny_config.teacher, arch_args={**tiny_config.teacher.arch_args, **change})
    server = tiny_fingerprints(replace(tiny_config, teacher=teacher), tiny_index)
    message = refusal(prints, server)
    assert told in message and f"teacher.arch_args.{next(iter(change))}" in message


def test_the_label_map_is_named_class_by_class_or_span_by_span(tiny_index: ShardIndex, prints: dict[str, str]) -> None:
    assert prints["data.classes.3"] == tiny_index.class_names[3]
    swapped = {**prints, "data.classes.3": prints["data.classes.5"], "data.classes.5": prints["data.classes.3"]}
    message = refusal(prints, swapped)
    assert message.startswith(
        f"data.classes.3: the trainer has {tiny_index.class_names[3]}, the server has {tiny_index.class_names[5]}; data."
    )
    names = [f"class {i}" for i in range(1000)]
    other = [*names[:500], "another", *names[501:]]
    ours, theirs = _class_map(names), _class_map(other)
    # 1000 names in spans of 32: 500 lies in 480-511, the 16th of 32
    assert len(ours) == 32 and [name for name in ours if ours[name] != theirs[name]] == ["480-511"]
    assert list(ours)[-1] == "992-999"


def test_precision_and_meta_weights_are_compared(tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]) -> None:
    assert refusal(prints, {**prints, "precision": "bf16"}) == "precision: the trainer has fp32, the server has bf16"
    assert "weights.meta: the trainer has 000" in refusal(prints, {**prints, "weights.meta": "1" * 64})


def test_a_trainer_may_leave_out_what_it_does_not_have_and_nothing_else(prints: dict[str, str], tiny_config: RunConfig) -> None:
    weights = {"meta": "0" * 64, "teacher.1": "1" * 64}
    bare = fingerprints(tiny_config, None, precision="fp32", weights=weights)  # no shards here, one pair's teacher
    assert not any(name.startswith(("data.shards", "data.classes", "weights.teacher.0")) for name in bare)
    check_hello(hello(bare, pairs=(1,)), prints, LIMITS)
    for name in ("seed", "data.augment.mixup", "weights.meta", "model.eps"):
        less = {key: value for key, value in bare.items() if key != name}
        assert refusal(less, prints) == f"{name}: the trainer does not say, the server has {prints[name]}"
        assert refusal({**bare, "data.new": "1"}, prints) == "data.new: the trainer has 1, the server has none"
    # who reads the shards itself must say which
    assert f"data.shards: the trainer does not say, the server has {prints['data.shards']}" in refusal(bare, prints, payload="logits")


def test_every_field_that_differs_is_told_up_to_a_few(prints: dict[str, str]) -> None:
    server = {**prints, "seed": "1", "data.mean": "[0,0,0]"}
    assert refusal(prints, server).count("the trainer has") == 2
    many = {name: value + "!" for name, value in prints.items() if not name.startswith("version.")}
    message = refusal(prints, {**prints, **many})
    assert message.count("the trainer has") == 8 and message.endswith(f"; and {len(many) - 8} more")


def test_versions_matter_to_who_decodes_and_are_told_to_others(prints: dict[str, str]) -> None:
    server = {**prints, "version.pillow": "9.0", "version.m2mkd_ds": "0.0.1"}
    check_hello(hello(prints), server, LIMITS)
    welcome = Welcome(protocol=2, instance="i", plan="p", fingerprints=server, limits=LIMITS)
    assert check_welcome(welcome, prints, decodes=False) == (
        f"version.m2mkd_ds: the trainer has {prints['version.m2mkd_ds']}, the server has 0.0.1",
        f"version.pillow: the trainer has {prints['version.pillow']}, the server has 9.0",
    )
    message = refusal(prints, server, payload="logits")
    assert message == (
        f"version.pillow: the trainer has {prints['version.pillow']}, the server has 9.0; who makes images itself needs the server's "
        "versions: install them, or use teacher.payload=hidden or image"
    )
    # another version is not another plan: servers of two versions may serve one run, and the log says so
    assert plan_digest(server, LAYOUT) == plan_digest(prints, LAYOUT)
    assert version_differences(prints, server, us="server a", them="server b")[1].startswith("version.pillow: server a has")


def test_versions_name_the_decoder_in_pillow_and_no_local_build() -> None:
    found = versions()
    assert found["torch"] == torch.__version__.split("+")[0] and "+" not in found["torch"]
    assert "(libjpeg-turbo " in found["pillow"] and found.keys() >= {"timm", "simplejpeg", "m2mkd_ds"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"layout": BatchLayout(micro_batch_size=65, accumulation=1, world=2)}, "micro_batch_size is 65; this server gives at most 64"),
        ({"rank": 2}, "rank is 2; the layout has 2 ranks"),
        ({"pairs": (0, 3)}, r"pairs: the trainer asks for \[3\], this server has the teacher modules of \[0, 1, 2\]"),
    ],
)
def test_a_wish_beyond_the_limits_is_a_bad_request(changes: dict[str, Any], told: str, prints: dict[str, str]) -> None:
    with pytest.raises(FeedError, match=told) as refused:
        check_hello(hello(prints, **changes), prints, LIMITS)
    assert refused.value.code == "bad_request"


def test_protocol_skew_is_refused_readably_by_either_side(prints: dict[str, str], make_service: Callable[..., TeacherService]) -> None:
    link = LocalConnection(make_service())
    assert link.hello(hello(prints, newest_protocol=9), 5.0).protocol == 2  # a newer trainer that still speaks ours
    told = "protocol: the trainer speaks 3 to 4, the server 2 to 2; install a newer m2mkd_ds for the server"
    with pytest.raises(FeedError, match=told) as new:
        link.hello(hello(prints, oldest_protocol=3, newest_protocol=4), 5.0)
    assert new.value.code == "mismatch"
    with pytest.raises(FeedError, match=told):  # however it came in
        check_hello(hello(prints, oldest_protocol=3, newest_protocol=4), prints, LIMITS)
    welcome = Welcome(protocol=3, instance="i", plan="p", fingerprints=prints, limits=LIMITS)
    with pytest.raises(FeedError, match="protocol"):
        check_welcome(welcome, prints, decodes=False)


def test_a_hello_and_a_welcome_fit_into_a_message(tiny_config: RunConfig, tiny_index: ShardIndex, prints: dict[str, str]) -> None:
    crowded = {**prints, **{f"weights.teacher.{i}": "f" * 64 for i in range(256)}, **{f"data.classes.{i}": "x" * 100 for i in range(64)}}
    assert unpack(Hello, pack(hello(crowded))).fingerprints == crowded
    welcome = Welcome(protocol=2, instance="i", plan="p", fingerprints=crowded, limits=Limits(**vars(LIMITS)))
    assert unpack(Welcome, pack(welcome)) == welcome
    assert all(len(value) <= 128 and len(name) <= 256 for name, value in prints.items())
    json.dumps(prints)
