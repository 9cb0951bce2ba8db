"""Which rank this process is, by what its launcher wrote into the environment. Nothing heavy is imported here.

Three families of launchers are understood:

    deepspeed, torchrun, accelerate launch --multi_gpu     RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT
    srun                                                   SLURM_*: the meeting point is the first node of the step
    none                                                   the job has one rank
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets for every rank."""

_MPI_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
"""Number of tasks as mpirun tells it; it sets none of the variables above."""

FIRST_PORT, NUM_PORTS = 20000, 12000
"""Ports that are derived from a name or a number: below those that the kernel gives to outgoing connections (32768 and more)."""


@dataclass(frozen=True)
class Place:
    """A rank's place in the job, as its launcher told it."""

    rank: int
    size: int
    local_rank: int
    local_size: int | None
    """Ranks on this host; None where the launcher does not tell."""
    master_addr: str
    master_port: int
    launcher: str
    """`slurm`, or `environment` for whoever sets RANK."""

    @property
    def spans_hosts(self) -> bool:
        """Whether other hosts take part, as far as the launcher told."""
        return self.local_size is not None and self.size > self.local_size


def place_of(environ: Mapping[str, str]) -> Place | None:
    """The rank's place; None for a process that stands alone.

    Raises ValueError when some variables are missing, or when the process is one of several tasks that were told no rank.
    """
    missing = [name for name in LAUNCHER_VARIABLES if name not in environ]
    if not missing:
        local_size = environ.get("LOCAL_SIZE") or environ.get("LOCAL_WORLD_SIZE")
        rank, size, local_rank = (int(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        port = int(environ["MASTER_PORT"])
        return Place(rank, size, local_rank, int(local_size) if local_size else None, environ["MASTER_ADDR"], port, "environment")
    if "RANK" in environ or "WORLD_SIZE" in environ:
        raise ValueError(f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}: start by `deepspeed`, torchrun or srun")
    # SLURM_NTASKS alone would not do: the batch script has it as well, where there is one process.
    if int(environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1:
        return _slurm_place(environ)
    for name in _MPI_COUNTS:
        if int(environ.get(name) or 1) > 1:
            raise ValueError(
                f"{name} is {environ[name]}, so this is one task of several, but RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
                "MASTER_PORT are not set: export them for every task, or start by `deepspeed` with a hostfile"
            )
    if "ACCELERATE_MIXED_PRECISION" in environ and "MASTER_PORT" in environ:
        raise ValueError(
            "`accelerate launch` was asked for several processes and started this one alone, as it does with --cpu; "
            "with --multi_gpu it starts them all, on CPUs too"
        )
    return None


def launched_rank(environ: Mapping[str, str]) -> int:
    """The rank of this process before the job is joined; 0 for one that stands alone."""
    place = place_of(environ)
    return place.rank if place else 0


def derived_port(number: int) -> int:
    """A port that every rank works out from a number that all know, so that two jobs on a host seldom meet."""
    return FIRST_PORT + number % NUM_PORTS


def _slurm_place(environ: Mapping[str, str]) -> Place:
    """Raises ValueError naming the variable of srun that is missing or that cannot be read."""
    values = {}
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_JOB_ID"):
        if not environ.get(name, "").isdigit():
            raise ValueError(
                f"SLURM_STEP_NUM_TASKS is {environ['SLURM_STEP_NUM_TASKS']}, so this is one task of several, but {name} is "
                f"{environ.get(name)!r}: start every task by srun"
            )
        values[name] = int(environ[name])
    nodes = expand_node_list(_first(environ, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"))
    counts = expand_counts(_first(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"))
    size = int(environ["SLURM_STEP_NUM_TASKS"])
    if len(counts) != len(nodes) or sum(counts) != size:
        raise ValueError(f"srun started {size} tasks, but {len(nodes)} nodes ({', '.join(nodes)}) with {counts} tasks each")
    # Two steps of a job may share a node, so their ports differ too.
    port = derived_port(7 * values["SLURM_JOB_ID"] + int(environ.get("SLURM_STEP_ID") or 0))
    return Place(
        rank=values["SLURM_PROCID"],
        size=size,
        local_rank=values["SLURM_LOCALID"],
        local_size=counts[values["SLURM_NODEID"]],
        # The address of the host that called srun (SLURM_LAUNCH_NODE_IPADDR) would not do: it may be a login node.
        master_addr=environ.get("MASTER_ADDR") or nodes[0],
        master_port=int(environ.get("MASTER_PORT") or port),
        launcher="slurm",
    )


def _first(environ: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environ.get(name):
            return environ[name]
    raise ValueError(f"one task of several under srun, but none of {', '.join(names)} is set: start every task by srun")


def expand_node_list(text: str) -> list[str]:
    """`gpu[08-10,12],login1` -> gpu08, gpu09, gpu10, gpu12, login1, in that order. Raises ValueError for what it cannot read."""
    names = []
    for word in _split_outside_brackets(text):
        pieces = re.findall(r"\[[^\[\]]*\]|[^\[\]]+", word)
        if not word or "".join(pieces) != word:
            raise ValueError(f"node list {text!r}: cannot read {word!r}; expected for example gpu[01-03,7],login1")
        parts = [list(_numbers(piece[1:-1], text)) if piece.startswith("[") else [piece] for piece in pieces]
        names += ["".join(choice) for choice in itertools.product(*parts)]
    return names


def _split_outside_brackets(text: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", text)


def _numbers(ranges: str, text: str) -> Iterator[str]:
    """`08-10,12` -> 08, 09, 10, 12: as many digits as the first number has."""
    for part in ranges.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"node list {text!r}: cannot read [{ranges}]; expected for example gpu[01-03,7],login1")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}d}"


def expand_counts(text: str) -> list[int]:
    """Tasks of each node: `2(x3),1` -> 2, 2, 2, 1. Raises ValueError for what it cannot read."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not match:
            raise ValueError(f"tasks per node {text!r}: cannot read {part!r}; expected for example 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
