"""Time tile candidates on this GPU and print lines for the table in configs.py: python -m m2mkd_kernels.tune

Nothing is chosen at run time: the winner is committed to the table by hand, so that results stay the same bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from m2mkd_kernels.configs import TABLE, KernelName, TileConfig
from m2mkd_kernels.runtime import Launch
from m2mkd_kernels.sample_layer import LayerSize, sample_launches

CANDIDATES: dict[KernelName, list[TileConfig]] = {
    "gemm": [
        TileConfig(128, 256, 64, 8, 8, 3),
        TileConfig(256, 128, 64, 8, 8, 3),
        TileConfig(128, 128, 64, 8, 8, 3),
        TileConfig(128, 128, 64, 8, 4, 3),
        TileConfig(128, 256, 64, 16, 8, 4),
    ],
    "gemm_gelu": [TileConfig(128, 256, 64, 8, 8, 3), TileConfig(128, 128, 64, 8, 4, 3), TileConfig(128, 128, 64, 16, 8, 3)],
    "gemm_swiglu": [TileConfig(128, 128, 64, 8, 8, 3), TileConfig(128, 64, 64, 8, 4, 3), TileConfig(64, 64, 64, 8, 4, 4)],
    "act_grad": [TileConfig(128, 128, 64, 8, 8, 3), TileConfig(128, 128, 64, 8, 8, 4), TileConfig(128, 64, 64, 8, 4, 4)],
    "weight_grad": [
        TileConfig(256, 128, 64, 8, 8, 5),
        TileConfig(128, 128, 64, 8, 8, 5),
        TileConfig(128, 128, 64, 8, 4, 5),
        # Without an index at most four stages are taken, so these are other programs in expert_ffn than the same tiles with five.
        TileConfig(128, 256, 64, 8, 8, 3),
        TileConfig(128, 128, 64, 8, 8, 3),
    ],
}
FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
LAUNCHES = 8


def time_launch(launch: Launch, repeats: int) -> float:
    """Median milliseconds with a cold L2 cache, after three runs to warm up.

    Between two events lie LAUNCHES pairs of flush and launch; the time of as many flushes alone is taken off. The flushes keep the
    GPU longer busy than the host needs for a launch, so what is timed is the GPU and not the host.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    for _ in range(3):
        launch.run()
    times = []
    for _ in range(repeats):
        both = _time_flushes(flush, launch.run)
        times.append((both - _time_flushes(flush, lambda: None)) / LAUNCHES)
    return statistics.median(times)


def _time_flushes(flush: torch.Tensor, work: Callable[[], None]) -> float:
    """Milliseconds of LAUNCHES times a flush and the work; two flushes before give the host a lead."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        flush.zero_()
    start.record()
    for _ in range(LAUNCHES):
        flush.zero_()
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def time_candidates(dtype: torch.dtype, size: LayerSize, repeats: int) -> dict[str, dict[TileConfig, tuple[float, float]]]:
    """Milliseconds of each kernel's launches together, by candidate: (those of `expert_layer`, those of `expert_ffn`).

    A candidate that this GPU cannot hold is left out.
    """
    from triton.runtime.errors import OutOfResources

    measured: dict[str, dict[TileConfig, tuple[float, float]]] = defaultdict(dict)
    kind: Any = "float" if dtype == torch.float32 else "half"
    for kernel, candidates in CANDIDATES.items():
        for tiles in dict.fromkeys([TABLE[kernel, kind, "large"], TABLE[kernel, kind, "small"], *candidates]):
            samples = [s for s in sample_launches(dtype, {kernel: tiles}, size=size, device="cuda") if s.kernel == kernel]
            milliseconds = dict.fromkeys(("expert_layer", "expert_ffn"), 0.0)
            try:
                for sample in samples:
                    milliseconds[sample.op] += time_launch(sample.launch, repeats)
            except OutOfResources as error:
                sys.stdout.write(f"{kernel} {tuple(tiles)}: {error}\n")
            else:
                measured[kernel][tiles] = (milliseconds["expert_layer"], milliseconds["expert_ffn"])
    return measured


def main() -> None:
    """Print all timings, fastest first, as lines of the table; then each launch of the layer with the table's tiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    for field, default in LayerSize()._asdict().items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    chosen = vars(parser.parse_args())
    if not torch.cuda.is_available():
        parser.exit(1, "timings need a CUDA device, and this machine has none\n")
    dtype, repeats = getattr(torch, chosen.pop("dtype")), chosen.pop("repeats")
    size = LayerSize(**chosen)
    write = sys.stdout.write
    write(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, {size}\n")
    write(f"median of {repeats} times {LAUNCHES} launches, cold L2\n")
    kind = "float" if dtype == torch.float32 else "half"
    for kernel, times in time_candidates(dtype, size, repeats).items():
        for tiles, (layer, ffn) in sorted(times.items(), key=lambda item: item[1]):
            in_ffn = f", {ffn:.3f} ms in expert_ffn" if ffn else ""
            write(f'    ("{kernel}", "{kind}", SIZE): TileConfig{tuple(tiles)},  # {layer:.3f} ms{in_ffn}\n')
    write("\nlaunch                    ms   TFLOP/s    GB/s   (with the table's tiles)\n")
    for sample in sample_launches(dtype, size=size, device="cuda"):
        seconds = time_launch(sample.launch, repeats) / 1e3
        write(f"{sample.name:20} {seconds * 1e3:7.3f} {sample.flops / seconds / 1e12:9.1f} {sample.num_bytes / seconds / 1e9:7.0f}\n")


if __name__ == "__main__":
    main()
