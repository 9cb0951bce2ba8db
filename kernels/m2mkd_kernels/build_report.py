"""Compile kernels for a GPU that need not be there, and tell registers, spills and shared memory: python -m m2mkd_kernels.build_report

Triton carries ptxas and cuobjdump, so the machine code of sm_90 can be made and looked into on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.configs import TABLE, TileConfig
from m2mkd_kernels.runtime import Launch
from m2mkd_kernels.sample_layer import sample_launches

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
    torch.uint8: "u8",
}
SM90_SHARED_BYTES = 227 * 1024


class Build(NamedTuple):
    """What ptxas made of one launch."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    uses_wgmma: bool
    num_fma: int
    """Instructions that multiply and add fp32 with one rounding."""


class Specialisation(NamedTuple):
    """What triton makes a program of its own for: a launch with another one is compiled again."""

    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict[tuple[int], list[list[object]]]


def specialise(launch: Launch) -> Specialisation:
    """The specialisation that a launch gets: numbers that are 1 or divisible by 16, and tensors as aligned as torch allocates them.

    Only where triton compiles: its interpreter's functions do not tell their parameters.
    """
    made = Specialisation({}, dict(launch.constants), {})
    for position, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        value = launch.constants.get(name, launch.arguments.get(name))
        if name in launch.constants or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            made.signature[name] = "constexpr"
            made.constants[name] = value
        elif isinstance(value, Tensor):
            made.signature[name] = "*" + TYPES[value.dtype]
            made.attributes[position,] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, int)
            made.signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                made.attributes[position,] = [["tt.divisibility", 16]]
    return made


def compile_launch(launch: Launch, capability: int = 90) -> Build:
    """Compile for sm_<capability> with the launch's specialisation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(launch.kernel, *specialise(launch))
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.compile_options())
    registers, spilled = _resource_usage(built.asm["cubin"])
    ptx = built.asm["ptx"]
    num_fma = len(re.findall(r"\bfma\.rn(?:\.ftz)?\.f32", ptx))
    return Build(registers, spilled, built.metadata.shared, "wgmma" in ptx, num_fma)


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) as cuobjdump tells them; local memory is where spilled registers go."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def report(dtype: torch.dtype, size: str) -> Iterator[tuple[str, Launch, Build]]:
    """Build every launch of a layer with the table's tiles of the given size; of the small ones, those that the table names."""
    kind = "float" if dtype == torch.float32 else "half"
    tiles: dict[str, TileConfig] = {
        kernel: config for (kernel, *rest), config in TABLE.items() if rest == [kind, size]
    }  # fmt: skip
    for sample in sample_launches(dtype, tiles):
        if sample.kernel or size == "large":
            yield sample.name, sample.launch, compile_launch(sample.launch)


def main() -> None:
    """Print the table of builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--size", choices=["small", "large"], default="large")
    chosen = parser.parse_args()
    write = sys.stdout.write
    write("launch               tile          warps stages registers spilled_B shared_KiB wgmma fma\n")
    for name, launch, build in report(getattr(torch, chosen.dtype), chosen.size):
        tile = "x".join(str(launch.constants[block]) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if block in launch.constants) or "-"
        write(f"{name:20} {tile:13} {launch.num_warps:5} {launch.num_stages:6} {build.registers:9} {build.spilled_bytes:9}")
        write(f" {build.shared_bytes / 1024:10.1f} {build.uses_wgmma} {build.num_fma}\n")


if __name__ == "__main__":
    main()
