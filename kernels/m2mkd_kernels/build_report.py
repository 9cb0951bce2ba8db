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
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from m2mkd_kernels.bias_grad.launch import prepare_row_sums, prepare_sum_tiles
from m2mkd_kernels.combine.launch import prepare_combine_backward, prepare_sum_choices
from m2mkd_kernels.configs import TABLE, TileConfig
from m2mkd_kernels.expert_ffn.launch import prepare_routing_grad
from m2mkd_kernels.gather import Gather
from m2mkd_kernels.grouped_gemm.launch import RowIndex, prepare_act_grad, prepare_gemm, prepare_weight_grad
from m2mkd_kernels.permute.op import prepare_permute
from m2mkd_kernels.runtime import Launch

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


def compile_launch(launch: Launch, capability: int = 90) -> Build:
    """Compile for sm_<capability> with the argument specialisation that a launch would get (1, divisible by 16)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], list[list[object]]] = {}
    for position, name in enumerate(launch.kernel.arg_names):
        value = launch.constants.get(name, launch.arguments.get(name))
        if name in constants or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[position,] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, int)
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spilled = _resource_usage(built.asm["cubin"])
    return Build(registers, spilled, built.metadata.shared, "wgmma" in built.asm["ptx"])


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


def layer_launches(
    dtype: torch.dtype, tiles: dict[str, TileConfig | None], *, num_tokens: int = 25216, top_k: int = 2, dim: int = 768, hidden: int = 3072
) -> Iterator[tuple[str, Launch]]:
    """Every kernel's launches for one layer on meta tensors, E = 8; `tiles` by kernel name, where absent the table's."""
    num_rows, num_experts = num_tokens * top_k, 8

    def empty(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    offsets_E = empty(num_experts, kind=torch.int32)
    index = RowIndex(empty(num_rows, kind=torch.int64), top_k)
    x_TD, h_RF, scale_N = empty(num_tokens, dim), empty(num_rows, hidden), empty(num_rows, kind=torch.float32)
    down_EDF, down_bias_ED = empty(num_experts, dim, hidden), empty(num_experts, dim)
    gemm, act_grad, weight_grad = (tiles.get(name) for name in ("gemm", "act_grad", "weight_grad"))
    activations: tuple[Literal["gelu", "swiglu"], ...] = ("gelu", "swiglu")
    for activation in activations:
        width = 2 * hidden if activation == "swiglu" else hidden
        up_EUD, z_RU = empty(num_experts, width, dim), empty(num_rows, width)
        up = prepare_gemm(
            x_TD, up_EUD, empty(num_experts, width), offsets_E, activation=activation, index=index, want_h=True, tiles=tiles.get(f"gemm_{activation}")
        )  # fmt: skip
        yield f"up {activation}", up[0]
        back = prepare_act_grad(
            x_TD, down_EDF, z_RU, offsets_E, activation=activation, index=index, scale_N=scale_N, want_row_dots=True, tiles=act_grad
        )  # fmt: skip
        yield f"act_grad {activation}", back[0]
    plan = Gather(index.index_R, empty(num_tokens, top_k, kind=torch.int64), empty(num_tokens, top_k, kind=torch.bool))
    routing_TK, rows_RD = empty(num_tokens, top_k, kind=torch.float32), empty(num_rows, dim)
    yield "permute", prepare_permute(x_TD, plan)[0]
    yield "combine", prepare_sum_choices(rows_RD, routing_TK, plan)[0]
    yield "combine grad", prepare_combine_backward(x_TD, rows_RD, routing_TK, plan, want_rows=True, want_weights=True)[0]
    yield "routing grad", prepare_routing_grad(empty(num_rows, 24, kind=torch.float32), x_TD, down_bias_ED, offsets_E, plan)[0]
    sums, sums_out = prepare_row_sums(x_TD, offsets_E, index, scale_N)
    yield "bias sums", sums
    yield "bias total", prepare_sum_tiles(sums_out, offsets_E, 64, dtype)[0]
    yield "down", prepare_gemm(h_RF, down_EDF, down_bias_ED, offsets_E, tiles=gemm)[0]
    yield "rows grad", prepare_gemm(h_RF, empty(num_experts, hidden, dim), None, offsets_E, transposed=True, tiles=gemm)[0]
    yield "down grad", prepare_weight_grad(x_TD, h_RF, offsets_E, grad_index=index, tiles=weight_grad)[0]
    yield "up grad", prepare_weight_grad(h_RF, x_TD, offsets_E, x_index=index, tiles=weight_grad)[0]


def report(dtype: torch.dtype, size: str) -> Iterator[tuple[str, Launch, Build]]:
    """Build every launch of a layer with the table's tiles of the given size."""
    kind = "float" if dtype == torch.float32 else "half"
    tiles: dict[str, TileConfig | None] = {
        kernel: config for (kernel, *rest), config in TABLE.items() if rest == [kind, size]
    }  # fmt: skip
    for name, launch in layer_launches(dtype, tiles):
        yield name, launch, compile_launch(launch)


def main() -> None:
    """Print the table of builds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--size", choices=["small", "large"], default="large")
    chosen = parser.parse_args()
    write = sys.stdout.write
    write("launch            tile          warps stages registers spilled_B shared_KiB wgmma\n")
    for name, launch, build in report(getattr(torch, chosen.dtype), chosen.size):
        tile = "x".join(str(launch.constants[block]) for block in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if block in launch.constants) or "-"
        write(f"{name:17} {tile:13} {launch.num_warps:5} {launch.num_stages:6} {build.registers:9} {build.spilled_bytes:9}")
        write(f" {build.shared_bytes / 1024:10.1f} {build.uses_wgmma}\n")


if __name__ == "__main__":
    main()
