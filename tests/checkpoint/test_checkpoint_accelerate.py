"""Big students by accelerate: the same logits wherever the blocks lie, and a peak of memory far below the model's size."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from m2mkd_ds.checkpoint.big_models import load_big_model, parse_max_memory
from m2mkd_ds.checkpoint.mapping import same_bits
from m2mkd_ds.checkpoint.store import save_weights
from m2mkd_ds.config import ROUTER_PRESETS
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import VisionMoE
from tests.checkpoint.students import ARCH, STITCHES, exported, run_folder, shaken

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
# One block holds 4 experts of 2 * 32 * 64 weights, 66 kB with biases, and 17 kB of attention.
ROOM = {"all": None, "two blocks": {"cpu": "250KB"}, "nothing": {"cpu": 1}}


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("stitches", [(), STITCHES], ids=["bare", "stitched"])
@torch.no_grad()
def test_logits_do_not_depend_on_where_the_blocks_lie(tmp_path: Path, room: str, stitches: tuple) -> None:
    model = shaken(dataclasses.replace(ARCH, router=ROUTER_PRESETS["loss_free"]), stitches)
    big = load_big_model(exported(model, tmp_path / "model", max_shard_size="50KB"), max_memory=ROOM[room])
    blocks_on_disk = {i for i, block in big.blocks.items() if all(p.is_meta for p in block.parameters())}
    assert {"all": 0, "two blocks": 2, "nothing": 4}[room] == len(blocks_on_disk)
    expected = model(IMAGES)
    for _ in range(2):  # what was read once is read again
        given = big(IMAGES)
        assert torch.equal(given.output, expected.output)
        assert {i: s.load_E.tolist() for i, s in given.stats.items()} == {i: s.load_E.tolist() for i, s in expected.stats.items()}
        assert blocks_on_disk == {i for i, block in big.blocks.items() if all(p.is_meta for p in block.parameters())}


@torch.no_grad()
def test_a_run_and_a_bf16_export_are_computed_in_fp32(tmp_path: Path) -> None:
    run, student = run_folder(tmp_path / "run", keep_stitches=True)
    assert torch.equal(load_big_model(run, device_map={"": "disk"})(IMAGES).output, student(IMAGES).output)
    model = shaken()
    folder = exported(model, tmp_path / "bf16", dtype="bf16")
    rounded = {n: t if ".router." in n else t.to(torch.bfloat16).float() for n, t in model.state_dict().items()}
    model.load_state_dict(rounded)
    assert torch.equal(load_big_model(folder, device_map={"": "disk"})(IMAGES).output, model(IMAGES).output)
    loaded = load_big_model(folder).state_dict()
    assert all(same_bits(tensor, rounded[name]) for name, tensor in loaded.items())


def test_a_map_with_gaps_and_sizes_that_are_none_are_refused(tmp_path: Path) -> None:
    folder = exported(shaken(), tmp_path / "model")
    with pytest.raises(ValueError, match=r"device_map names no device for .*; name its module"):
        load_big_model(folder, device_map={"blocks": "cpu"})
    assert parse_max_memory(["0=10GB", "cpu=500MB"]) == {0: "10GB", "cpu": "500MB"}
    for word in ("cpu", "gpu=1GB", "cpu=much"):
        with pytest.raises(ValueError, match="--max-memory cpu|--max-memory gpu=1GB: expected"):
            parse_max_memory([word])
    with pytest.raises(ValueError, match="max_memory names GPU 99; here (is none|are GPUs 0 to .*); name those, or cpu"):
        load_big_model(folder, max_memory={99: "1GB"})


CHILD = """
import json, re, sys, torch
from m2mkd_ds.checkpoint.big_models import load_big_model
from m2mkd_ds.checkpoint.student_files import open_student
def peak():  # of this program alone: getrusage would start with the peak of the process that it was forked from
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
with torch.no_grad():
    load_big_model(sys.argv[3], max_memory={"cpu": 1})(images)  # what is imported at the first use is no part of the model
    before = peak()
    big = load_big_model(sys.argv[1], max_memory={"cpu": sys.argv[2]})
    logits = big(images).output
    offloaded = peak() - before
    same = torch.equal(open_student(sys.argv[1]).build()(images).output, logits)
print(json.dumps([offloaded, peak() - before, same]))
"""


def test_the_peak_of_memory_is_that_of_one_layer(tmp_path: Path) -> None:
    # 8 blocks of 8 experts of 2 * 256 * 1024 weights: 17 MB of experts a block and 1 MB of attention, 143 MB in all.
    arch = dataclasses.replace(
        ARCH, embed_dim=256, num_heads=4, mlp_ratio=4.0, num_blocks=8, moe_blocks=tuple(range(8)), num_experts=8
    )  # fmt: skip
    model = VisionMoE(arch, StageSpan.whole(8), seed=0)
    size = sum(4 * p.numel() for p in model.parameters())
    words = [str(exported(model, tmp_path / "model")), "20MB", str(exported(shaken(), tmp_path / "small"))]
    del model
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    offloaded, whole, same = json.loads(done.stdout)
    assert same and whole > size  # the measure sees a model that lies in memory
    assert offloaded < 0.3 * size, f"{offloaded / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"


@pytest.mark.gpu
@torch.no_grad()
def test_gpu_cpu_and_disk_share_one_model(tmp_path: Path) -> None:
    model = shaken(stitches=STITCHES)
    folder = exported(model, tmp_path / "model")
    big = load_big_model(folder, max_memory={0: "250KB", "cpu": "100KB"})
    assert {str(device) for device in big.hf_device_map.values()} == {"0", "cpu", "disk"}
    logits = big(IMAGES).output
    assert logits.device.type == "cpu"  # they come back to where the images were
    torch.testing.assert_close(logits, model(IMAGES).output, rtol=1e-3, atol=1e-3)


def test_save_weights_of_a_run_may_be_rewritten_while_the_model_on_the_cpu_is_used(tmp_path: Path) -> None:
    run, student = run_folder(tmp_path / "run")
    big = load_big_model(run)
    save_weights(run / "end_to_end" / "weights.safetensors", {n: t * 0 for n, t in student.state_dict().items()}, {"phase": "end_to_end"})
    with torch.no_grad():
        assert torch.equal(big(IMAGES).output, student(IMAGES).output)
