"""Checkpoints moved between clusters of any shape: values bit for bit, refusals, memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from m2mkd_ds.checkpoint.saves.manifest import hash_files, write_manifest
from m2mkd_ds.checkpoint.state.canonical import SHARED, CanonicalCheckpoint
from m2mkd_ds.checkpoint.state.consolidate import consolidate
from m2mkd_ds.checkpoint.state.rank_files import Description, Parameter, write_rank_file
from m2mkd_ds.checkpoint.state.reshard import laid_out_for, reshard
from m2mkd_ds.checkpoint.store import StoreError, commit_checkpoint, latest_checkpoint, verify_checkpoint
from tests.checkpoint.checkpoint_maker import KINDS, SHAPES, make_checkpoint, make_state

# (ep, dp, ZeRO stage)
CLUSTERS = [(1, 1, 1), (2, 1, 1), (1, 2, 2), (4, 1, 2), (2, 2, 1), (1, 3, 3), (2, 3, 2), (1, 1, 3), (4, 2, 1)]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("engine_rank_*"))}


@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
def test_a_checkpoint_of_any_cluster_reads_the_same(tmp_path: Path, cluster: tuple[int, int, int]) -> None:
    ep, dp, zero = cluster
    state = make_state()
    read = CanonicalCheckpoint(make_checkpoint(tmp_path / "step-00000007", state, ep_size=ep, data_size=dp, zero_stage=zero))
    assert read.tensors == {name: torch.Size(shape) for name, shape in SHAPES.items()} and read.kinds == KINDS
    for kind in KINDS:
        for name, whole in state[kind].items():
            assert torch.equal(read.read(kind, name), whole), (kind, name)
            assert torch.equal(torch.cat(list(read.runs(kind, name))), whole.flatten())
            middle = whole.numel() // 2
            assert torch.equal(read.read_rows(kind, name, 1, middle + 1), whole.flatten()[1 : middle + 1])
    assert float(read.scalars["step"]) == 7.0
    assert read.shared == {"blocks.0.moe.router.balance_bias": (4,), "calls": ()}
    assert read.read(SHARED, "blocks.0.moe.router.balance_bias").tolist() == [0, 1, 2, 3] and int(read.read(SHARED, "calls")) == 9


@pytest.mark.parametrize("target", CLUSTERS, ids=str)
@pytest.mark.parametrize("source", CLUSTERS[:6], ids=str)
def test_resharding_gives_the_files_that_ranks_of_that_cluster_would_have_written(
    tmp_path: Path, source: tuple[int, int, int], target: tuple[int, int, int]
) -> None:
    state = make_state()
    wanted = make_checkpoint(tmp_path / "wanted", state, ep_size=target[0], data_size=target[1], zero_stage=target[2])
    before = make_checkpoint(tmp_path / "before", state, ep_size=source[0], data_size=source[1], zero_stage=source[2])
    done = reshard(before, tmp_path / "step-00000007", ep_size=target[0], data_size=target[1], zero_stage=target[2])
    assert bytes_of(done.out) == bytes_of(wanted)
    assert (done.step, done.after.size, done.bytes) == (7, target[0] * target[1], sum(map(len, bytes_of(wanted).values())))
    record = verify_checkpoint(done.out)
    shapes = [{"ranks": ep * dp, "ep_size": ep, "zero_stage": zero} for ep, dp, zero in (source, target)]
    assert record == verify_checkpoint(before) | {"resharded": [{"from": shapes[0], "to": shapes[1]}]}


def test_the_whole_cycle_comes_back_to_the_same_bytes(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path / "0", make_state(), ep_size=2, data_size=1)
    folder = first
    for number, (ep, dp) in enumerate([(1, 1), (4, 1), (2, 2), (2, 1)], start=1):
        folder = reshard(folder, tmp_path / str(number), ep_size=ep, data_size=dp).out
    assert bytes_of(folder) == bytes_of(first) and not list(tmp_path.glob("*.tmp"))
    assert len(verify_checkpoint(folder)["resharded"]) == 4


def test_the_newest_good_checkpoint_of_a_phase_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "phase" / "checkpoints"
    for step in (7, 8, 9):
        make_checkpoint(root / f"step-{step:08d}", make_state(step), ep_size=1, data_size=2, step=step)
    (root / "step-00000009" / "engine_rank_00001.safetensors").write_bytes(b"damaged")
    for number, place in enumerate((tmp_path / "phase", root)):
        done = reshard(place, tmp_path / f"out{number}", ep_size=2, data_size=1)
        assert (done.step, done.source.name) == (8, "step-00000008")
        assert torch.equal(CanonicalCheckpoint(done.out).read("ema", "head.bias"), make_state(8)["ema"]["head.bias"])
    with pytest.raises(StoreError, match="no checkpoint here .* name one of phase/checkpoints"):
        reshard(tmp_path, tmp_path / "out", ep_size=1, data_size=1)


@pytest.mark.parametrize(
    ("ep", "dp", "zero", "out", "message"),
    [
        (3, 1, None, "new", r"ep is 3 and blocks.0.moe.experts.up_proj has 4 experts; allowed are the divisors 1, 2, 4"),
        (0, 1, None, "new", "ep is 0, dp is 1"),
        (1, 0, None, "new", "dp is 0"),
        (2, 1, 3, "new", "ep is 2 with ZeRO-3: .* give --zero 1"),
        (2, 1, None, "there", "there: exists already; nothing is written over"),
        (2, 1, None, "step-00000008", "the checkpoint is of step 7, so a folder to go on from is called step-00000007"),
        (2, 1, None, "no/folder", "no such folder"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(tmp_path: Path, ep: int, dp: int, zero: int | None, out: str, message: str) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=2)
    (tmp_path / "there").mkdir()
    with pytest.raises(StoreError, match=message):
        reshard(folder, tmp_path / out, ep_size=ep, data_size=dp, zero_stage=zero)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007", "there"] and not list((tmp_path / "there").iterdir())


@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "swap"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_damaged_source_is_named_and_nothing_is_written(tmp_path: Path, how: str, rank: int) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=2, data_size=1)
    path = folder / f"engine_rank_{rank:05d}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    if how == "delete":
        path.unlink()
    elif how == "swap":  # another rank's file, good in itself
        path.write_bytes((folder / f"engine_rank_{1 - rank:05d}.safetensors").read_bytes())
    else:
        path.write_bytes(data[:-1] if how == "truncate" else data)
    with pytest.raises(StoreError, match=path.name):
        reshard(folder, tmp_path / "out", ep_size=1, data_size=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


def test_a_file_of_another_checkpoint_is_noticed_without_a_manifest(tmp_path: Path) -> None:
    two = make_checkpoint(tmp_path / "two", make_state(), ep_size=1, data_size=2)
    other = make_checkpoint(tmp_path / "other", make_state(), ep_size=2, data_size=1)
    name = "engine_rank_00001.safetensors"
    (two / name).write_bytes((other / name).read_bytes())
    read = CanonicalCheckpoint(two)
    with pytest.raises(StoreError, match="belongs to another checkpoint than the file of rank 0"):
        read.read("master", "head.bias")


def test_a_file_whose_tensors_are_not_those_of_its_description_is_refused(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=2)
    path = folder / "engine_rank_00001.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors | {"group1.ema": tensors["group1.ema"][:-1].clone()}, path, metadata)
    # Group 1 has 75 + 140 + 20 + 15 elements; half of 250, rounded up to an even number.
    with pytest.raises(StoreError, match="engine_rank_00001.safetensors: damaged, group1.ema should be 126 fp32 elements"):
        CanonicalCheckpoint(folder).read("master", "head.bias")


def test_files_beside_the_engines_come_along_but_not_those_of_a_rank(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=2)
    for name in ("notes.json", "rng_rank_00001.json"):
        (folder / name).write_text("{}")
        (folder / "manifest.json").unlink()
        write_manifest(folder, 7, {}, attempt="a", files=hash_files(folder))
        if name == "notes.json":
            out = reshard(folder, tmp_path / "out", ep_size=1, data_size=1).out
            assert (out / name).read_text() == "{}" and verify_checkpoint(out)
    with pytest.raises(StoreError, match="holds rng_rank_00001.json, a rank's own file"):
        reshard(folder, tmp_path / "other", ep_size=1, data_size=1)


def test_a_model_without_experts_has_none_to_spread() -> None:
    dense = Description(1, 1, ("master",), (Parameter("w", (4, 2), 0, False),), ())
    with pytest.raises(StoreError, match="ep is 2, but the model of this checkpoint has no experts; set it to 1"):
        laid_out_for(dense, ep_size=2, data_size=1, zero_stage=None)


def test_a_killed_reshard_leaves_no_checkpoint_and_a_save_clears_it(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source" / "step-00000007", make_state(), ep_size=1, data_size=1)
    root = tmp_path / "root"
    half = root / "step-00000007.tmp"
    half.mkdir(parents=True)
    (half / "engine_rank_00000.safetensors").write_bytes(b"half")
    assert latest_checkpoint(root) is None
    with pytest.raises(StoreError, match="step-00000007.tmp: left by a command that was killed"):
        reshard(folder, root / "step-00000007", ep_size=1, data_size=1)
    commit_checkpoint(root, 8, lambda place: hash_files(place), {})
    assert [path.name for path in root.iterdir()] == ["step-00000008"]


def test_a_disk_that_takes_no_more_is_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "step-00000007", make_state(), ep_size=1, data_size=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, limits[1]))
    try:
        with pytest.raises(StoreError, match="out: not written .*; free space or choose another folder"):
            reshard(folder, tmp_path / "out", ep_size=1, data_size=1)
        with pytest.raises(StoreError, match="out.safetensors: not written"):
            consolidate(folder, tmp_path / "out.safetensors", what="all")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


PEAK = """
import re, sys
from pathlib import Path
from m2mkd_ds.checkpoint.state.consolidate import consolidate
from m2mkd_ds.checkpoint.state.reshard import reshard

def peak_kib():  # not ru_maxrss, which begins with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

before = peak_kib()
source, out = map(Path, sys.argv[1:])
reshard(source, out / "moved", ep_size=1, data_size=1)
consolidate(source, out / "all.safetensors", what="all")
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_memory_is_bounded_by_a_piece_of_a_tensor_and_not_by_the_checkpoint(tmp_path: Path) -> None:
    # One tensor of 72 MiB and six of 12 MiB, three kinds: 432 MiB.
    kinds = ("master", "exp_avg", "exp_avg_sq")
    parameters = tuple(Parameter(f"w{i}", ((1 if i else 6) << 10, 3 << 10), 0, False) for i in range(7))
    description = laid_out_for(Description(2, 1, kinds, parameters, ()), ep_size=1, data_size=2, zero_stage=None)
    folder = tmp_path / "step-00000001"
    folder.mkdir()
    for rank in range(2):
        part = torch.full((description.groups[0].part_numel,), float(rank))
        write_rank_file(folder, description, rank, {f"group0.{kind}": part for kind in kinds})
    write_manifest(folder, 1, {}, attempt="by hand", files=hash_files(folder))
    assert sum(path.stat().st_size for path in folder.iterdir()) > 432 << 20
    words = [sys.executable, "-c", PEAK, str(folder), str(tmp_path)]
    growth_kib = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert growth_kib < 48 << 10, growth_kib
