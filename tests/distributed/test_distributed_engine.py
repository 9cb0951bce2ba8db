"""Two ranks by the real launcher against one process of plain torch. Two starts; every fact is a test of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.expert_parallel import ParallelExperts
from m2mkd_ds.distributed.flat_state import RankSnapshot
from m2mkd_ds.distributed.groups import ExpertGroups
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.train.optim import build_adamw
from tests.distributed import engine_job as job
from tests.launching import launch

IDS = [f"{name}-{precision}" for name, precision in job.CASES]
SCRIPT = Path(job.__file__)

# Largest difference of a weight after five steps (weights move by about 1e-2), by how gradients are summed. bf16 keeps 8 bits:
# a sum rounded to bf16 is off by 2^-9 of itself, and AdamW's first steps pass that on to a step of size lr.
PARITY = {"zero1-fp32": 1e-6, "zero2-fp32": 1e-6, "zero1-bf16": 1e-6, "zero2-bf16": 1e-6, "zero2_bf16_reduce-bf16": 5e-4}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def first_output(out: Path) -> str:
    return launch(SCRIPT, ["first", str(out)], ranks=job.RANKS).stdout


@pytest.fixture(scope="module")
def first(out: Path, first_output: str) -> dict[str, Any]:
    return torch.load(out / "first.pt", weights_only=True)


@pytest.fixture(scope="module")
def second(out: Path, first: dict[str, Any]) -> dict[str, Any]:
    launch(SCRIPT, ["second", str(out)], ranks=job.RANKS)
    return torch.load(out / "second.pt", weights_only=True)


@pytest.fixture(scope="module")
def world() -> Iterator[jobs.World]:
    """This process as a job of one rank, without a launcher."""
    yield jobs.init_world(timeout_s=60)
    jobs.shutdown()


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of floating-point entries; the names must agree."""
    assert list(left) == list(right)
    # By torch's max, which passes NaN on (Python's does not).
    return float(torch.stack([(left[k] - right[k]).abs().max() for k in left if left[k].is_floating_point()]).max())


@pytest.mark.parametrize("case", IDS)
def test_two_ranks_equal_one_process_with_clipping_and_accumulation(first: dict[str, Any], case: str) -> None:
    weights, norms = job.reference(case.split("-")[1], job.RATES)
    result = first[case.replace("-", "_")]
    assert worst(result["end"], weights) <= PARITY[case]
    # The reported norm is the one before clipping: the reference's norms are well above the limit of 0.05.
    assert min(norms) > 2 * job.PHASE.clip_grad
    assert result["norms"] == pytest.approx(norms, rel=1e-6 if PARITY[case] == 1e-6 else 2e-3)


def test_bf16_really_computes_in_bf16_and_stays_near_fp32(first: dict[str, Any]) -> None:
    weights, _ = job.reference("fp32", job.RATES)
    for name in ("zero1", "zero2"):
        # Adam's step has size lr whatever the gradient's: the bound is a tenth of the summed learning rates, 0.026.
        assert 1e-5 < worst(first[f"{name}_bf16"]["end"], weights) < 0.1 * sum(job.RATES)


@pytest.mark.parametrize("case", IDS)
def test_full_state_dict_is_fp32_and_the_same_on_every_rank(first: dict[str, Any], case: str) -> None:
    result = first[case.replace("-", "_")]
    assert result["same"]
    state = job.Net(0).state_dict()
    assert {k: (v.dtype, v.shape) for k, v in result["end"].items()} == {k: (v.dtype, v.shape) for k, v in state.items()}
    # Before any step: rank 0's weights bit for bit, though rank 1 had others and bf16 would round them.
    assert worst(result["start"], state) == 0.0
    # What the forward pass uses is the master weight, rounded to the precision of the run.
    dtype = torch.bfloat16 if case.endswith("bf16") else torch.float32
    for name, used in result["rounded"].items():
        assert torch.equal(used, result["end"][name].to(dtype).float()), name


@pytest.mark.parametrize("case", IDS)
def test_resume_is_bitwise_the_uninterrupted_run(first: dict[str, Any], second: dict[str, Any], case: str) -> None:
    key = case.replace("-", "_")
    for part in ("middle", "end", "ema_end"):
        assert worst(second[key][part], first[key][part]) == 0.0, part
        assert torch.equal(second[key][part]["calls"], first[key][part]["calls"])
    assert second[key]["norms"] == first[key]["norms"][3:]


def test_save_inside_a_step_is_refused(first: dict[str, Any]) -> None:
    assert all("inside a step" in first[case.replace("-", "_")]["refusal"] for case in IDS)


@pytest.mark.parametrize("case", IDS)
def test_a_gradient_that_is_not_finite_skips_the_update_on_every_rank(first: dict[str, Any], case: str) -> None:
    result = first[f"not_finite_{case.replace('-', '_')}"]
    assert result["norm"] == [float("inf")] * job.RANKS
    assert result["unchanged"]


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_three_engines_in_one_job_equal_an_engine_alone(first: dict[str, Any], second: dict[str, Any], name: str) -> None:
    together, alone = first[f"engines_{name}"], second[f"engines_{name}"]
    assert worst(together[1], alone[0]) == 0.0
    assert worst(together[1], together[0]) > 1e-3  # the engines did not all train the same net


def test_ema_follows_its_formula(first: dict[str, Any]) -> None:
    # decay 0.5 from the start values: ema_t = (ema_{t-1} + w_t) / 2; w_1..w_3 from the reference run.
    ema = job.reference("fp32", ())[0]
    for steps in (1, 2, 3):
        weights, _ = job.reference("fp32", job.RATES[:steps])
        ema = {k: (ema[k] + weights[k]) / 2 if ema[k].is_floating_point() else ema[k] for k in ema}
    assert worst(first["zero1_fp32"]["ema"], ema) < 1e-6


def test_collectives(first: dict[str, Any]) -> None:
    assert first["collectives"] == {"ranks": [0, 1], "local": (0, 2, 2, "cpu"), "from_1": {"rank": 1}, "sum": 3.0}


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
@pytest.mark.parametrize("part", ["first", "second"])
def test_no_process_group_lives_after_the_shutdown(first: dict[str, Any], second: dict[str, Any], out: Path, part: str) -> None:
    """A thread of one could release a tensor while the interpreter ends, which aborts the rank after its work is done."""
    for rank in range(job.RANKS):
        threads = json.loads((out / f"{part}_threads_{rank}.json").read_text())
        # Two threads that work and one that listens, in each of two groups: the job's, and DeepSpeed's copy of it.
        assert threads == {"working": 6, "left": 0}


def test_deepspeed_is_quiet(first_output: str) -> None:
    lines = [line for line in first_output.splitlines() if line and "OVERFLOW! Skipping step" not in line]
    assert lines == []


@pytest.mark.parametrize("case", ["zero1-fp32", "zero2-bf16"])
def test_one_rank_goes_on_from_what_two_ranks_saved(first: dict[str, Any], world: jobs.World, out: Path, case: str) -> None:
    name, precision = case.split("-")
    saved = first[case.replace("-", "_")]
    # One rank does the work of two: four micro-batches a step.
    phase = job.dataclasses.replace(job.PHASE, gradient_accumulation_steps=4)
    engine = job.make_engine(world, name, precision, seed=3, phase=phase, ema_decay=0.5)
    engine.load(out / case.replace("-", "_"))
    assert worst(engine.full_state_dict(), saved["middle"]) == 0.0
    assert worst(engine.full_state_dict(ema=True), saved["ema"]) == 0.0
    for step in (3, 4):
        for micro_step, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
            x_BD, labels_B = job.batch(step, micro_step, rank)
            engine.backward(job.loss_of(engine(x_BD), labels_B))
            engine.step(job.RATES[step])
    assert worst(engine.full_state_dict(), saved["end"]) < 1e-6
    engine.close()


@pytest.mark.parametrize(("saved", "wanted"), [("zero1", "zero3"), ("zero3", "zero1")])
def test_one_rank_reads_what_another_zero_stage_wrote_on_one_rank(world: jobs.World, tmp_path: Path, saved: str, wanted: str) -> None:
    """All trainable: ZeRO-3 takes no frozen parameters."""

    def engine_of(name: str, seed: int) -> DeepSpeedEngine:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
        phase = job.dataclasses.replace(job.PHASE, gradient_accumulation_steps=1)
        return DeepSpeedEngine(net, build_adamw(net, phase), resolve_ds_config(name, phase, world_size=1, precision="fp32"), world)

    def step(engine: DeepSpeedEngine) -> float | None:
        engine.backward(engine(torch.randn(4, 5, generator=torch.Generator().manual_seed(1))).square().mean())
        return engine.step(1e-2)

    first, second = engine_of(saved, 0), engine_of(wanted, 9)
    step(first)
    first.save(tmp_path)
    second.load(tmp_path)
    assert worst(second.full_state_dict(), first.full_state_dict()) == 0.0
    assert step(second) == pytest.approx(step(first), rel=1e-5)
    assert worst(second.full_state_dict(), first.full_state_dict()) < 1e-6
    first.close()
    second.close()


def test_load_refuses_files_of_another_model(first: dict[str, Any], world: jobs.World, out: Path, tmp_path: Path) -> None:
    engine = job.make_engine(world, "zero1", "fp32")
    before = engine.full_state_dict()
    with pytest.raises(ValueError, match="ema_decay is 0.0, but the checkpoint has an average"):
        engine.load(out / "zero1_fp32")
    with pytest.raises(ValueError, match="engine_rank_00000.safetensors: this file of the checkpoint is missing"):
        engine.load(tmp_path)
    other = one_engine(world, nn.Linear(2, 3))
    with pytest.raises(ValueError, match="only in the checkpoint: .*fc1.weight.* only in the module: .*'weight'"):
        other.load(out / "zero1_fp32")
    wide = one_engine(world, nn.Linear(4, 3))
    (tmp_path / "narrow").mkdir()
    other.save(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"weight is \(3, 2\) in the checkpoint and \(3, 4\) in the module"):
        wide.load(tmp_path / "narrow")
    wide.close()
    assert worst(engine.full_state_dict(), before) == 0.0
    with pytest.raises(ValueError, match="keeps no moving average"):
        engine.full_state_dict(ema=True)
    engine.close()
    other.close()


def one_engine(world: jobs.World, net: nn.Module, params: list[Any] | None = None) -> DeepSpeedEngine:
    optimizer = torch.optim.AdamW(params or list(net.parameters()))
    phase = job.dataclasses.replace(job.PHASE, gradient_accumulation_steps=1)
    return DeepSpeedEngine(net, optimizer, resolve_ds_config("zero1", phase, world_size=world.size, precision="fp32"), world)


def test_a_snapshot_stays_as_it_was_while_training_goes_on(world: jobs.World, tmp_path: Path) -> None:
    engine = one_engine(world, nn.Linear(2, 3))

    def step() -> None:
        engine.backward(engine(torch.ones(4, 2)).square().sum())
        engine.step(0.1)

    step()
    taken, before = engine.snapshot(), engine.full_state_dict()
    step()
    after = engine.full_state_dict()
    assert worst(after, before) > 1e-2
    files = taken.write(tmp_path)
    assert {name: path.stat().st_size for name in files for path in [tmp_path / name]} == {name: file.bytes for name, file in files.items()}
    engine.load(tmp_path)
    assert worst(engine.full_state_dict(), before) == 0.0
    step()
    assert worst(engine.full_state_dict(), after) == 0.0  # moments and step came back, too
    engine.close()


def test_the_optimizer_must_hold_every_trainable_parameter_once(world: jobs.World) -> None:
    net = nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"missing \['bias'\]"):
        one_engine(world, net, [net.weight])
    with pytest.raises(ValueError, match=r"frozen or foreign \['<not of the module: \(1, 2\)>'\]"):
        one_engine(world, net, [net.weight, net.bias, nn.Linear(2, 1, bias=False).weight])
    with pytest.raises(ValueError, match="needs fp32 parameters .* weight is torch.bfloat16"):
        one_engine(world, nn.Linear(2, 3).bfloat16())


def test_frozen_experts_are_not_spread(world: jobs.World) -> None:
    experts = Experts(4, 6, 4, "reference", generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    net = nn.ModuleDict({"experts": ParallelExperts(experts, ExpertGroups(2, 0, 1, 0), world.device), "head": nn.Linear(4, 2)})
    with pytest.raises(ValueError, match=r"experts.\w+ is frozen and spread over ranks, which no rank could save; set ep_size to 1"):
        one_engine(world, net, list(net["head"].parameters()))


def test_a_frozen_suffix_lets_gradients_through(world: jobs.World) -> None:
    # The student's hidden states run through a frozen module before the loss; plain torch is the reference.
    torch.manual_seed(0)
    net, suffix, x_BD = nn.Linear(4, 4), nn.Linear(4, 2).requires_grad_(False), torch.randn(3, 4)
    twin = nn.Linear(4, 4)
    twin.load_state_dict(net.state_dict())
    engine = one_engine(world, net)
    engine.backward(suffix(engine(x_BD)).square().sum())
    norm = engine.step(0.0)
    suffix(twin(x_BD)).square().sum().backward()
    assert norm == pytest.approx(float(torch.cat([p.grad.flatten() for p in twin.parameters()]).norm()), rel=1e-6)
    assert suffix.weight.grad is None
    engine.close()


def test_a_checkpoint_holds_plain_tensors_only(first: dict[str, Any], out: Path) -> None:
    with safe_open(out / "zero2_bf16" / "engine_rank_00001.safetensors", framework="pt") as file:
        kinds = {name.split(".")[1] for name in file.keys()}
        head = json.loads(file.metadata()["m2mkd_ds"])
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}  # what is the same on all ranks is in the file of rank 0
    assert (head["format"], head["rank"], head["size"], head["zero_stage"]) == (3, 1, 2, 2)
    with safe_open(out / "zero2_bf16" / "engine_rank_00000.safetensors", framework="pt") as file:
        assert set(file.keys()) >= {"scalar.step", "shared.frozen", "shared.calls"}
        assert float(file.get_tensor("scalar.step")) >= 3.0


def test_a_snapshot_that_gave_its_memory_away_is_of_no_use_any_more(tmp_path: Path) -> None:
    first = RankSnapshot(cast(Any, None), 0, {"a": torch.zeros(3), "b": torch.zeros(2)}, None)
    room = cast(Any, first)._tensors["a"]
    second = RankSnapshot(cast(Any, None), 0, {"a": torch.ones(3), "b": torch.ones(4)}, first)
    assert cast(Any, second)._tensors["a"] is room and room.tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="given away as `reuse` to a later one"):
        first.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
