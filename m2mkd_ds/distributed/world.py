"""The job: which rank this process is, its device, and the few collectives that code outside the engine needs.

A process may come from the `deepspeed` launcher, from any launcher that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT (torchrun), from srun, or from no launcher at all: then the job has one rank (`launched.py`). DeepSpeed is imported
inside functions, so importing this file costs nothing.
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

from m2mkd_ds.distributed.start.interface import interface_towards
from m2mkd_ds.distributed.start.launched import Place, place_of
from m2mkd_ds.distributed.start.rendezvous import meet
from m2mkd_ds.distributed.watch.activity import collective

logger = logging.getLogger("m2mkd_ds")

Precision = Literal["fp32", "bf16"]

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
    Raises ValueError when a launcher started several tasks but nothing told them their ranks, or when the meeting point cannot be reached;
    MissingRanksError, which names them, and GivenUpError.
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
    place = place_of(os.environ) or Place(0, 1, 0, 1, "127.0.0.1", _free_port(), "none")
    device_index = _device_index(place, accelerator.device_count())
    met = None
    if place.launcher != "none":
        _choose_interface(place)
        # Held until the process group has a store of its own on the same port.
        met = meet(place, start_timeout_s or timeout_s, give_up)
    if place.launcher != "environment":
        # By arguments, not by environment: child processes must not think that they are ranks of this job.
        host = f"[{place.master_addr}]" if ":" in place.master_addr else place.master_addr
        options = {"init_method": f"tcp://{host}:{place.master_port}", "rank": place.rank, "world_size": place.size}
        os.environ["LOCAL_RANK"] = str(device_index)  # deepspeed.initialize asks for this one in any case
    accelerator.set_device(device_index)
    deepspeed.init_distributed(
        dist_backend=accelerator.communication_backend_name(),
        auto_mpi_discovery=False,
        timeout=timedelta(seconds=timeout_s),
        verbose=False,
        **options,
    )
    del met
    device = torch.device(accelerator.device_name(device_index))
    return World(place.rank, place.size, place.local_rank, place.local_size or 1, device)


def was_launched(environ: Mapping[str, str]) -> bool:
    """Whether a launcher told this process its rank; false for one that stands alone. Raises ValueError as `place_of` does."""
    return place_of(environ) is not None


def _choose_interface(place: Place) -> None:
    """Name the interface of the collectives, unless the user did: the one towards the meeting point, looked up on each host."""
    wanted = {"GLOO_SOCKET_IFNAME": "{}"}
    if torch.cuda.is_available() and place.spans_hosts:
        wanted["NCCL_SOCKET_IFNAME"] = "={}"  # with `=`, eth1 does not mean eth10 as well
    unset = {variable: form for variable, form in wanted.items() if variable not in os.environ}
    name = interface_towards(place.master_addr, spans_hosts=place.spans_hosts) if unset else None
    if name is not None:
        os.environ.update({variable: form.format(name) for variable, form in unset.items()})


def _device_index(place: Place, visible: int) -> int:
    """Which of the visible devices is this rank's. Slurm may show each task its own device only, as number 0."""
    return 0 if place.launcher == "slurm" and visible == 1 else place.local_rank


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
        if "RANK" not in os.environ:
            # Set by `init_world` for DeepSpeed. Left behind, it would tell accelerate that this process is one of several.
            os.environ.pop("LOCAL_RANK", None)
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
