"""RunCluster: the hosts that a run is planned for, from flags or from a YAML file with the same names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from math import inf
from pathlib import Path
from typing import Any, Literal

import yaml


@dataclass(frozen=True, kw_only=True)
class RunCluster:
    """Equal hosts. The defaults are one host of eight 80 GB A100s; bandwidths are what payload reaches, not what is printed on the box."""

    nodes: int = 1
    """Hosts."""
    gpus_per_node: int = 8
    """GPUs of a host, one rank each."""
    gpu_memory_gb: float = 80.0
    """Memory of a GPU, 10^9 bytes (for device=cpu: of a rank)."""
    memory_reserve_gb: float = 4.0
    """Of it, what is not for tensors: CUDA's context, NCCL, cuBLAS, and what the allocator loses between blocks."""
    tflops: float = 312.0
    """Peak of a GPU in the precision of the phase, 10^12 operations a second (an A100 in bf16: 312)."""
    mfu: float = 0.4
    """Share of that peak which training reaches. An assumption, and the weakest number of a plan: measure a step and set it."""
    gpu_bandwidth: float = 200.0
    """Between GPUs of a host, 10^9 bytes a second and direction for each GPU."""
    network_gbps: float = 100.0
    """Of a host to the others, 10^9 bits a second and direction, all its cards together."""
    loader_images_per_s: float = 0.0
    """Images a second that a host's loader prepares; 0: not a limit."""
    device: Literal["gpu", "cpu"] = "gpu"
    """cpu: the experts' backend, AdamW and collectives are those of CPU ranks."""

    def __post_init__(self) -> None:
        for name, high in (("nodes", inf), ("gpus_per_node", inf), ("gpu_memory_gb", inf), ("tflops", inf), ("mfu", 1.0),
                           ("gpu_bandwidth", inf), ("network_gbps", inf)):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= high:
                bound = "" if high == inf else f", at most {high:g}"
                raise ValueError(f"cluster: {name} is {value!r}; it must be a number above 0{bound}")
        for name in ("memory_reserve_gb", "loader_images_per_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise ValueError(f"cluster: {name} is {value!r}; it must be a number, not negative")
        if not isinstance(self.nodes, int) or not isinstance(self.gpus_per_node, int):
            raise ValueError(f"cluster: nodes is {self.nodes!r} and gpus_per_node {self.gpus_per_node!r}; both must be whole numbers")
        if self.device not in ("gpu", "cpu"):
            raise ValueError(f"cluster: device is {self.device!r}; allowed are gpu and cpu")
        if self.memory_reserve_gb >= self.gpu_memory_gb:
            raise ValueError(f"cluster: memory_reserve_gb {self.memory_reserve_gb:g} is all of gpu_memory_gb {self.gpu_memory_gb:g}")

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """For the tensors of a rank."""
        return (self.gpu_memory_gb - self.memory_reserve_gb) * 1e9

    @property
    def flops_per_s(self) -> float:
        """Of all ranks."""
        return self.ranks * self.tflops * 1e12 * self.mfu


def read_cluster(file: Path) -> RunCluster:
    """The cluster of a YAML file. Raises ValueError for a file that is not there, is not YAML, or has a name that no field has."""
    if not file.is_file():
        raise ValueError(f"--cluster {file}: no such file; write one with lines such as `nodes: 2` and `gpus_per_node: 8`")
    try:
        tree: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ValueError(f"--cluster {file}: not YAML ({' '.join(str(err).split())})") from None
    if not isinstance(tree, dict):
        raise ValueError(f"--cluster {file}: expected lines such as `nodes: 2`, found {type(tree).__name__}")
    known = [field.name for field in fields(RunCluster)]
    for name in tree:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(known)}"
            raise ValueError(f"--cluster {file}: no such field {name!r}; {hint}")
    return RunCluster(**tree)
