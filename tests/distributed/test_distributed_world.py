"""Joining a job, and the launcher helper itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.distributed import world as jobs
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.train.optim import build_adamw
from tests.launching import LaunchError, launch

LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_a_launcher_is_told_by_its_variables() -> None:
    assert jobs.was_launched(LAUNCHED)
    assert not jobs.was_launched({})
    assert not jobs.was_launched({"LOCAL_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"})


def test_half_a_launcher_is_refused() -> None:
    partial = {k: v for k, v in LAUNCHED.items() if k != "MASTER_PORT"}
    with pytest.raises(ValueError, match="RANK or WORLD_SIZE but not MASTER_PORT"):
        jobs.was_launched(partial)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_tasks_that_know_no_rank_do_not_train_the_same_thing_twice(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 4, so this is one task of several"):
        jobs.was_launched({name: "4"})


def test_collectives_outside_a_job_say_so() -> None:
    if torch.distributed.is_initialized():
        jobs.shutdown()
    with pytest.raises(RuntimeError, match=r"call init_world\(\) first"):
        jobs.barrier()


def test_one_rank_job_without_a_launcher() -> None:
    world = jobs.init_world(timeout_s=30)
    assert (world.rank, world.size, world.local_rank, world.local_size, world.is_main) == (0, 1, 0, 1, True)
    assert world.device == torch.device("cpu")
    assert jobs.gather_object({"a": 1}) == [{"a": 1}]
    assert jobs.broadcast_object("text") == "text"
    assert torch.equal(jobs.all_reduce_sum(torch.arange(3)), torch.arange(3))
    jobs.barrier()
    jobs.shutdown()
    assert not torch.distributed.is_initialized()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"} & set(os.environ)


def test_a_job_can_be_joined_again() -> None:
    norms = []
    for _ in range(2):
        world = jobs.init_world(timeout_s=30)
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 2)
        phase = PhaseConfig(micro_batch_size=1)
        config = resolve_ds_config("zero1", phase, world_size=1, precision="fp32")
        engine = DeepSpeedEngine(net, build_adamw(net, phase), config, world)
        engine.backward(engine(torch.ones(1, 3)).sum())
        norms.append(engine.step(0.1))
        engine.close()
        jobs.shutdown()
    # The gradient is 1 for each of 3 * 2 weights and 2 biases.
    assert norms == pytest.approx([8**0.5] * 2)


def test_precision_follows_the_cpu_flags() -> None:
    cpu = torch.device("cpu")
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert jobs.has_fast_bf16(cpu) == bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))
    assert jobs.resolve_precision("auto", cpu) == ("bf16" if jobs.has_fast_bf16(cpu) else "fp32")
    assert [jobs.resolve_precision(p, cpu) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    with pytest.raises(ValueError, match="precision is 'fp16'; allowed are auto, fp32 and bf16"):
        jobs.resolve_precision("fp16", cpu)


def test_a_failed_rank_shows_its_output(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("import os, sys\nsys.exit('rank 1 has had enough' if os.environ['RANK'] == '1' else 0)\n")
    with pytest.raises(LaunchError, match="(?s)exit code 1: .*rank 1 has had enough"):
        launch(script, timeout_s=120)


@pytest.mark.slow
def test_a_job_out_of_time_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text(f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, str(os.getpid()) + '.pid').touch()\ntime.sleep(600)\n")
    with pytest.raises(LaunchError, match="no end after 20 s"):
        launch(script, timeout_s=20)
    time.sleep(0.5)
    pids = [int(path.stem) for path in tmp_path.glob("*.pid")]
    assert len(pids) == 2
    assert not [pid for pid in pids if _runs(pid)]


def _runs(pid: int) -> bool:
    """Whether the process exists and is not a zombie that waits for its parent."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z" and os.getpgid(pid) != os.getpgid(0)
