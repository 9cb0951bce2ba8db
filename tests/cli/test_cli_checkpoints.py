"""The verbs on checkpoints: what they print, refuse, and return."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m2mkd_ds.checkpoint.store import StoreError, file_sha256, read_weights, save_weights, verify_checkpoint
from tests.checkpoint.checkpoint_maker import SHAPES, Bomb, make_checkpoint, make_state
from tests.checkpoint.exported_models import export, make_model
from tests.cli.ended import Run

ELEMENTS = {name: torch.Size(shape).numel() for name, shape in SHAPES.items()}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A phase's folder with two checkpoints of 2 ranks, ep 2, and a weights file."""
    for step in (6, 7):
        make_checkpoint(tmp_path / "phase" / "checkpoints" / f"step-{step:08d}", make_state(step), ep_size=2, data_size=1, step=step)
    save_weights(tmp_path / "phase" / "weights.safetensors", make_state(7)["master"], {"recipe": "tiny"})
    return tmp_path / "phase"


def test_reshard_says_what_it_did(m2mkd: Run, root: Path) -> None:
    ended = m2mkd("reshard", str(root), "moved/step-00000007", "--ep", "4", "--dp", "2", "--zero", "2")
    assert ended.code == 2 and "moved: no such folder" in ended.err
    Path("moved").mkdir()
    ended = m2mkd("reshard", str(root), "moved/step-00000007", "--ep", "4", "--dp", "2", "--zero", "2")
    assert ended.code == 0, ended.err
    assert "step 7 of" in ended.out and "laid out for 8 ranks (ep 4 x dp 2), ZeRO-2; it was for 2 ranks (ep 2 x dp 1), ZeRO-1" in ended.out
    assert verify_checkpoint("moved/step-00000007")["step"] == 7
    again = m2mkd("reshard", str(root), "moved/step-00000007", "--ep", "4", "--dp", "2")
    assert again.code == 2 and again.err.count("\n") == 1 and "exists already" in again.err
    assert "allowed are the divisors 1, 2, 4" in m2mkd("reshard", str(root), "moved/x", "--ep", "3", "--dp", "1").err


def test_consolidate_names_its_files(m2mkd: Run, root: Path) -> None:
    ended = m2mkd("consolidate", str(root), "w.safetensors")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "w.safetensors"
    assert torch.equal(load_file("w.safetensors")["head.bias"], make_state(7)["master"]["head.bias"])
    ended = m2mkd("consolidate", str(root / "checkpoints" / "step-00000006"), "e.safetensors", "--what", "ema", "--max-shard-size", "600")
    assert ended.code == 0 and ended.out.splitlines()[-1] == "e.safetensors.index.json" and len(ended.out.splitlines()) > 3
    wrong = m2mkd("consolidate", str(root), "x.safetensors", "--max-shard-size", "big")
    assert wrong.code == 2 and "max-shard-size is big; allowed is a number with a unit" in wrong.err


@pytest.mark.parametrize("damage", ["", '{"format": 1}', '{"form'])
def test_a_damaged_manifest_is_told_with_what_helps(m2mkd: Run, root: Path, damage: str) -> None:
    folder = root / "checkpoints" / "step-00000007"
    (folder / "manifest.json").write_text(damage)
    helps = "take an earlier checkpoint, or name the phase's folder for its newest good one"
    for words in (["consolidate", str(folder), "w.safetensors"], ["reshard", str(folder), "step-00000008", "--ep", "2", "--dp", "1"]):
        ended = m2mkd(*words)
        assert ended.code == 2 and "manifest.json: damaged" in ended.err and ended.err.endswith(f"; {helps}\n"), ended.err
        assert "delete" not in ended.err and "restore" not in ended.err
    assert m2mkd("consolidate", str(root), "w.safetensors").out.startswith("step 6 of")  # it does help


def test_inspect_tells_what_a_checkpoint_holds(m2mkd: Run, root: Path) -> None:
    folder = root / "checkpoints" / "step-00000007"
    tree = json.loads(m2mkd("inspect", str(folder), "--json").out)
    assert tree["damage"] == [] and tree["step"] == 7 and tree["record"]["global_batch_size"] == 32 and tree["files"] == 2
    assert tree["layout"] == {"ranks": 2, "ep_size": 2, "data_size": 1, "zero_stage": 1}
    assert tree["kinds"] == ["master", "exp_avg", "exp_avg_sq", "ema"] and tree["scalars"] == {"step": 7.0}
    assert (tree["tensors"], tree["elements"]) == (len(ELEMENTS), sum(ELEMENTS.values()))
    assert tree["expert_elements"] == sum(n for name, n in ELEMENTS.items() if "experts" in name) == 4 * 7 * 5 + 4 * 7
    assert [g["elements"] for g in tree["groups"]] == [5 + 3, 75 + 20 + 15, 28, 140] and [g["ep_size"] for g in tree["groups"]] == [
        1,
        1,
        2,
        2,
    ]
    assert tree["modules"] == {"cls_token": 5, "blocks.0": 75 + 140 + 28 + 20, "head": 18}
    assert tree["shared"] == {"blocks.0.moe.router.balance_bias": [4], "calls": []}
    text = m2mkd("inspect", str(folder)).out
    assert "step-00000007: verified" in text and "2 ranks (ep 2 x dp 1), ZeRO-1" in text and "global_batch_size: 32" in text
    assert "stream.seed: 0" in text


def test_inspect_of_a_phase_lists_every_checkpoint_and_names_all_damage(m2mkd: Run, root: Path) -> None:
    good = m2mkd("inspect", str(root))
    assert (
        good.code == 0 and good.out.count("verified") == 2 and "weights.safetensors" in good.out and "2 checkpoints, 1 weights" in good.out
    )
    for step, rank in ((6, 0), (6, 1), (7, 1)):
        path = root / "checkpoints" / f"step-{step:08d}" / f"engine_rank_{rank:05d}.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 4
        path.write_bytes(data)
    ended = m2mkd("inspect", str(root))
    damage = [line for line in ended.out.splitlines() if line.startswith("damaged: ")]
    assert ended.code == 1 and ended.out.count("DAMAGED") == 2 and len(damage) == 3 and "verified" not in ended.out
    assert ["step-00000006/engine_rank_00001" in line for line in damage] == [False, True, False]


def test_inspect_of_a_weights_file(m2mkd: Run, root: Path) -> None:
    tree = json.loads(m2mkd("inspect", str(root / "weights.safetensors"), "--json").out)
    assert (
        tree["elements"] == sum(ELEMENTS.values())
        and tree["dtypes"] == {"float32": len(ELEMENTS)}
        and tree["metadata"] == {"recipe": "tiny"}
    )
    (root / "weights.safetensors").write_bytes(b"short")
    ended = m2mkd("inspect", str(root / "weights.safetensors"))
    assert ended.code == 1 and "weights.safetensors: damaged or not a safetensors file" in ended.out
    ended = m2mkd("inspect", "nowhere")
    assert ended.code == 2 and "nowhere: neither a checkpoint folder" in ended.err


def test_inspect_of_a_run_keeps_to_120_columns(m2mkd: Run, root: Path) -> None:
    (root.parent / "run" / "modular_train").mkdir(parents=True)
    root.rename(root.parent / "run" / "modular_train" / "pair_0")
    lines = m2mkd("inspect", str(root.parent / "run")).out.splitlines()[1:]
    assert len(lines) == 3 and max(map(len, lines)) <= 120 and "2 ranks, ep 2, ZeRO-1" in lines[0]
    assert len({line.index("MiB") for line in lines}) == 1


def test_a_flipped_bit_of_a_finished_result_is_found_by_its_record(m2mkd: Run, tmp_path: Path) -> None:
    file = tmp_path / "end_to_end" / "weights.safetensors"
    file.parent.mkdir()
    save_weights(file, {"head.weight": torch.arange(64.0)})
    assert "header good" in m2mkd("inspect", str(file)).out  # nobody vouches for it yet
    entry = {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
    (file.parent / "done.json").write_text(json.dumps({"files": {file.name: entry}}))
    good = m2mkd("inspect", str(file))
    assert good.code == 0 and "verified" in good.out and read_weights(file)["head.weight"][5] == 5
    content = bytearray(file.read_bytes())
    content[-10] ^= 1
    file.write_bytes(content)
    for path in (file, tmp_path):
        damaged = m2mkd("inspect", str(path))
        assert damaged.code == 1 and "DAMAGED" in damaged.out and "has not the bytes that" in damaged.out
    with pytest.raises(StoreError, match=r"weights\.safetensors: damaged, .*done\.json records; restore it from a copy"):
        read_weights(file)


@pytest.mark.parametrize("inside", [False, True])
def test_an_exported_folder_is_no_damaged_checkpoint(m2mkd: Run, tmp_path: Path, inside: bool) -> None:
    folder = export(make_model(), tmp_path / "run" / "exported")
    asked = str(folder.parent if inside else folder)
    good = m2mkd("inspect", asked)
    assert good.code == 0 and "header good" in good.out and "0 checkpoints, 1 weights files" in good.out
    code = folder / "modeling_vmoe.py"
    code.write_text(code.read_text() + "x = 1\n")
    changed = m2mkd("inspect", asked)
    assert changed.code == 1 and "damaged: " in changed.out and "modeling_vmoe.py: changed since the export" in changed.out
    code.unlink()
    gone = m2mkd("inspect", asked)
    assert gone.code == 1 and "damaged: " in gone.out and "modeling_vmoe.py" in gone.out
    for text in ('{"a": 1}', "[]", '{"files": {"x": 1}}', "{"):
        (folder / "manifest.json").write_text(text)
        ended = m2mkd("inspect", asked)
        assert ended.code == 1 and "manifest.json: " in ended.out


@pytest.mark.parametrize("name", ["engine_rank_00000.safetensors", "engine_rank_00000.pt"])
def test_no_verb_unpickles_anything(m2mkd: Run, tmp_path: Path, name: str) -> None:
    folder, canary = tmp_path / "step-00000007", tmp_path / "canary"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
    assert m2mkd("inspect", str(folder)).code == 1
    assert m2mkd("reshard", str(folder), "out", "--ep", "1", "--dp", "1").code == 2
    assert m2mkd("consolidate", str(folder), "out.safetensors").code == 2
    assert not canary.exists() and not Path("out").exists()
