"""The kernels become machine code of Hopper, on a machine without a GPU: no register spills, shared memory fits, tensor cores used."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SHARED_KIB = 227


@pytest.mark.parametrize(("size", "num_launches"), [pytest.param("large", 19, marks=pytest.mark.slow), ("small", 13)])
def test_bf16_kernels_build_for_sm_90_without_spills(size: str, num_launches: int) -> None:
    # A process of its own: where triton interprets, it cannot compile.
    command = [sys.executable, "-m", "m2mkd_kernels.build_report", "--dtype", "bfloat16", "--size", size]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit(maxsplit=8) for line in done.stdout.splitlines()[1:]]
    assert len(rows) == num_launches
    for name, _tile, _warps, _stages, registers, spilled, shared, wgmma, num_fma in rows:
        assert int(registers) <= 255 and int(spilled) == 0, name
        assert float(shared) <= SHARED_KIB, name
        assert (wgmma == "True") == name.startswith(("up", "down", "rows", "act", "weight")), name
        assert name != "combine" or num_fma == "0", "the sum over choices rounds products and sums apart, as plain code does"


SCRIPT = """
import torch
from m2mkd_kernels.build_report import compile_launch, specialise
from m2mkd_kernels.sample_layer import LayerSize, sample_launches
sizes = [LayerSize(num_tokens) for num_tokens in (25201, 25088, 24832)]
samples = zip(*(sample_launches(torch.bfloat16, size=size) for size in sizes), strict=True)
print([a.name for a, *others in samples if any(specialise(a.launch) != specialise(other.launch) for other in others)])
build = compile_launch(next(s.launch for s in sample_launches(torch.float16) if s.name == "up gelu"))
print(build.registers, build.spilled_bytes)
"""


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What SCRIPT prints, in a process that compiles: the launches that change with the number of tokens; registers and spills."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_another_number_of_tokens_needs_no_other_program(answers: list[str]) -> None:
    # Triton would make programs of their own for numbers divisible by 16. Tokens: 25201 is not, the others are. Row tiles, 2 rows a
    # token and 8 groups: of 128 rows 394 + 8, 392 + 8 = 25 * 16 and 388 + 8; of 64 rows 788 + 8, 784 + 8 and 776 + 8 = 49 * 16.
    assert answers[0] == "[]"


def test_two_programs_of_the_gelu_gemm_share_a_multiprocessor_in_fp16_too(answers: list[str]) -> None:
    # 65536 registers / (2 programs * 256 threads) = 128 a thread; left to itself the compiler takes more, in some of its versions.
    registers, spilled = map(int, answers[1].split())
    assert registers <= 128 and spilled == 0
