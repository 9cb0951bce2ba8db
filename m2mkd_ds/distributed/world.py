"""The job: which rank this process is, its device, and the few collectives that code outside the engine needs.

A process may come from the `deepspeed` launcher, from any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT (torchrun), or from no launcher at all: then the job has one rank. DeepSpeed is imported inside functions, so
importing this file costs nothing.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import socket
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed

from m2mkd_ds.distributed.activity import collective
from m2mkd_ds.distributed.rendezvous import meet

logger = logging.getLogger("m2mkd_ds")

Precision = Literal["fp32", "bf16"]

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for every rank."""

_TASK_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Number of tasks as srun and mpirun tell it; they set none of the variables above."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the job."""

    rank: int
    """0..size-1 over all hosts."""
    size: int
    local_rank: int
    """0..local_size-1 on this host."""
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Rank 0: writes logs, manifests and reports."""
        return self.rank == 0


def init_world(timeout_s: float = 600.0, *, start_timeout_s: float = 300.0, give_up: Callable[[], bool] = lambda: False) -> World:
    """Join the job and choose this rank's device; call once, before any engine is made.

    `timeout_s` bounds every collective: when a rank dies, the others fail after it instead of waiting for ever. `start_timeout_s` (0:
    `timeout_s`) bounds the wait for ranks that do not come; `give_up` is asked meanwhile.
    Raises ValueError when srun or mpirun started several tasks but nothing told them their ranks, MissingRanksError, which names them,
    and GivenUpError.
    """
    # Must stand before DeepSpeed is imported: without an accelerator it would probe, and warn on every rank.
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops
    from deepspeed.accelerator import get_accelerator

    _import_functional_collectives()
    # Asked for by `--verbose` runs only: DeepSpeed says hundreds of lines at INFO.
    logging.getLogger("DeepSpeed").setLevel(logging.INFO if logger.isEnabledFor(logging.DEBUG) else logging.WARNING)
    # DeepSpeed calls them by the names that torch >= 2.11 knows; some releases between say so at every rank's first call.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # On CPU, DeepSpeed would compile its shared-memory op here (minutes; a killed build leaves a lock on which every later
    # run waits without a word). gloo does the same collectives.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    accelerator = get_accelerator()
    options: dict[str, Any] = {}
    if was_launched(os.environ):
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        local_size = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        # Held until the process group has a store of its own on the same port.
        met = meet(rank, size, start_timeout_s or timeout_s, give_up)
    else:
        rank, size, local_rank, local_size, met = 0, 1, 0, 1, None
        # By arguments, not by environment: child processes must not think that they are rank 0 of this job.
        options = {"init_method": f"tcp://127.0.0.1:{_free_port()}", "rank": rank, "world_size": size}
        os.environ["LOCAL_RANK"] = "0"  # deepspeed.initialize asks for this one in any case
    accelerator.set_device(local_rank)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
        **options,
    )
    del met
    return World(rank, size, local_rank, local_size, torch.device(accelerator.device_name(local_rank)))


def was_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher set the variables of a rank; false for a process that stands alone.

    Raises ValueError when some variables are missing, or when the process is one of several tasks of srun or mpirun.
    """
    missing = [name for name in LAUNCHER_VARIABLES if name not in environ]
    if not missing:
        return True
    if "RANK" in environ or "WORLD_SIZE" in environ:
        raise ValueError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}: start by `deepspeed` or torchrun")
    for name in _TASK_COUNTS:
        if int(environ.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {environ[name]}, so this is one task of several, but RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
                "MASTER_PORT are not set: export them for every task, or start by `deepspeed` with a hostfile"
            )
    return False


def _import_functional_collectives() -> None:
    """Import torch.distributed.nn, which DeepSpeed's engine needs, before there is a process group.

    Its functions take the group that is the default one at the time of the import as their default argument. Imported inside a
    job, they would keep that job's group alive past `shutdown`, and use it in the next job.
    """
    importlib.import_module("torch.distributed.nn")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shutdown() -> None:
    """Leave the job. Every rank calls it at the end, so that none is cut off in the middle of a collective.

    Close the engines before. A process group ends its threads only when nothing refers to it any more; one that lives until
    the interpreter ends may hold a tensor in a thread then, whose release asks for an interpreter that is gone and aborts the process.
    """
    if torch.distributed.is_initialized():
        import deepspeed

        barrier("leave the job")
        deepspeed.comm.destroy_process_group()  # also forgets the groups that DeepSpeed keeps, so that a job can be joined again
        _free_cycles()


def _free_cycles() -> None:
    """Free what closed engines were: cycles that hold groups, some of them reachable only through tensors of others."""
    for _ in range(10):
        if gc.collect() == 0:
            return


def _require_world() -> None:
    if not torch.distributed.is_initialized():
        raise RuntimeError("no job was joined: call init_world() first")


def barrier(what: str = "barrier") -> None:
    """Wait until every rank is here. `what` names it in errors and diagnoses, as in the functions below."""
    _require_world()
    with collective(what):
        torch.distributed.barrier()


def all_reduce_sum(tensor: torch.Tensor, what: str = "sum") -> torch.Tensor:
    """Replace `tensor` on every rank by its sum over the ranks, and return it. It must lie on the rank's device."""
    _require_world()
    with collective(what):
        torch.distributed.all_reduce(tensor)
    return tensor


def gather_object(value: Any, what: str = "gather") -> list[Any]:
    """Every rank's `value`, in rank order, on every rank. For small plain data (counts, names, times)."""
    _require_world()
    values: list[Any] = [None] * torch.distributed.get_world_size()
    with collective(what):
        torch.distributed.all_gather_object(values, value)
    return values


def broadcast_object(value: Any, src: int = 0, what: str = "broadcast") -> Any:
    """The `value` of rank `src`, on every rank. For small plain data."""
    _require_world()
    box = [value]
    with collective(what):
        torch.distributed.broadcast_object_list(box, src=src)
    return box[0]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16 in its own units (not by emulation)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's name
    from deepspeed.accelerator import get_accelerator

    return bool(get_accelerator().is_bf16_supported())


def resolve_precision(precision: str, device: torch.device) -> Precision:
    """`auto` -> bf16 where `has_fast_bf16`, else fp32; `fp32` and `bf16` stay. Raises ValueError for anything else."""
    if precision == "auto":
        return "bf16" if has_fast_bf16(device) else "fp32"
    if precision == "fp32":
        return "fp32"
    if precision == "bf16":
        return "bf16"
    raise ValueError(f"precision is {precision!r}; allowed are auto, fp32 and bf16")
