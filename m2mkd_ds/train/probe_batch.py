"""`m2mkd probe-batch`: the largest micro-batch whose step fits into memory, found by running steps.

    a guess -> a child process runs the step (probe_work.py) -> its peak, or that it did not fit -> a better guess

Every try has a process of its own, because a CPU's allocator does not say that memory is short: the child is watched, and stopped when
it passes the limit. On a GPU torch's allocator gets the limit, and the error that it raises is the answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from m2mkd_ds.config import PHASES, ConfigError, RunConfig, dump
from m2mkd_ds.distill.pairs import check_pairs
from m2mkd_ds.logs import logger
from m2mkd_ds.train.batch import layout_of_images
from m2mkd_ds.train.probe_work import owner_of

POLL_S = 0.02
TRY_TIMEOUT_S = 1800.0
_PARTS = 32
"""The answer is exact up to so many images, and to one part in so many above."""
_LEAP = 8
"""A promise is trusted up to so many times the largest size that was seen to fit."""
_CLOSE = 0.99
"""Peaks vary a little from run to run: a guess aims just below the limit."""


@dataclass(frozen=True)
class Try:
    """One size, and what came of it."""

    micro_batch_size: int
    fits: bool
    peak: int | None
    """Bytes; None where it did not get so far."""


@dataclass(frozen=True)
class Found:
    """The answer and the way to it."""

    micro_batch_size: int
    """0: nothing fits."""
    limit: int
    """Bytes that a step may take (headroom already off)."""
    tries: tuple[Try, ...]


def probe_batch(config: RunConfig, name: str, *, memory_bytes: int | None, headroom: float, most: int, pairs: str = "all") -> Found:
    """Probe phase `name` on this machine.

    `memory_bytes`: what one rank may use; None: what is free now (of the GPU, else of the host). `headroom`: share of it that stays free.
    Raises ConfigError for a phase that there is not and for pairs of one without, ValueError for a pair that there is not, RuntimeError
    with the child's words when a step fails.
    """
    if name not in PHASES:
        raise ConfigError(f"--phase {name}: only training has batches; allowed are {', '.join(PHASES)}")
    check_pairs(pairs, config.num_stages, [name])
    if not 0.0 <= headroom < 1.0:
        raise ConfigError(f"--headroom is {headroom}; it is the share of the memory that stays free, from 0 to less than 1")
    unit = _unit(config)
    if most < unit:
        raise ConfigError(f"--most is {most}; give at least {unit}: micro-batches of this run are multiples of it (data.augment.mix_group)")
    limit = int((memory_bytes or _free_bytes()) * (1.0 - headroom))
    start = min(getattr(config, owner_of(name)).micro_batch_size, most)

    def measure(size: int) -> Try:
        result = _try(config, name, pairs, size, limit)
        peak = "" if result.peak is None else f", peak {result.peak / 1e9:.2f} GB"
        logger.info("%s: micro_batch_size %d %s%s", name, size, "fits" if result.fits else "does not fit", peak)
        return result

    tries = search(measure, start=start, unit=unit, most=most, limit=limit)
    return Found(max((t.micro_batch_size for t in tries if t.fits), default=0), limit, tuple(tries))


def search(measure: Callable[[int], Try], *, start: int, unit: int, most: int, limit: int) -> list[Try]:
    """Try sizes that are multiples of `unit` and at most `most` until the largest one that fits is known."""
    most = most // unit * unit
    tries: list[Try] = []
    size: int | None = min(max(start // unit, 1) * unit, most)
    while size is not None:
        tries.append(measure(size))
        size = _next_size(tries, unit, most, limit)
    return tries


def _next_size(tries: list[Try], unit: int, most: int, limit: int) -> int | None:
    """Until something does not fit: twice as many, or as many as a straight line through the peaks promises. Then between the two."""
    low = max((t.micro_batch_size for t in tries if t.fits), default=0)
    high = min((t.micro_batch_size for t in tries if not t.fits), default=most + unit)
    line = _meets_limit(tries, limit)
    if high - low <= max(unit, low // _PARTS) or (line is not None and line < low + low // _PARTS):
        return None
    if high > most:
        guess = 2 * low if line is None else min(line, _LEAP * low)
    elif line is None or line >= high or len(tries) % 2:  # halving alone is slow, a line alone may creep
        guess = (low + high) // 2
    else:
        guess = line
    return min(max(guess // unit * unit, low + unit), high - unit)


def _meets_limit(tries: list[Try], limit: int) -> int | None:
    """The size at which a line through two measured peaks comes close to the limit; None without two that say something.

    The largest size, and the largest one that is clearly smaller: between neighbours there is nothing but noise.
    """
    known = sorted((t.micro_batch_size, t.peak) for t in tries if t.peak is not None)
    if not known:
        return None
    n1, p1 = known[-1]
    below = [(n, p) for n, p in known if 4 * n <= 3 * n1]
    if not below or below[-1][1] >= p1:
        return None
    n0, p0 = below[-1]
    return int(n1 + (_CLOSE * limit - p1) * (n1 - n0) / (p1 - p0))


def _try(config: RunConfig, name: str, pairs: str, size: int, limit: int) -> Try:
    """Run the step in a child; stop it when its resident set passes the limit (a GPU's limit is kept by torch)."""
    owner = owner_of(name)
    sized = replace(config, **{owner: replace(getattr(config, owner), micro_batch_size=size)})
    with tempfile.TemporaryDirectory(prefix="m2mkd_probe_") as scratch:
        file, errors = Path(scratch) / "config.yaml", Path(scratch) / "stderr"
        file.write_text(dump(sized), encoding="utf-8")
        command = [sys.executable, "-m", "m2mkd_ds.train.probe_work", str(file), name, pairs, str(limit)]
        with open(errors, "wb") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as child:
            watched = not torch.cuda.is_available()
            passed = _watch(child, limit if watched else None)
            output = child.stdout.read().decode() if child.stdout is not None else ""
        if passed or child.returncode == -9:  # stopped here, or by the host's own guard of memory
            return Try(size, False, None)
        if child.returncode:
            last = errors.read_text(errors="replace").strip()[-1500:]
            raise RuntimeError(f"probe-batch: a step of {name} with micro_batch_size {size} failed (exit {child.returncode}): {last}")
    answer = json.loads(output.splitlines()[-1])
    peak = answer.get("peak")
    return Try(size, peak is not None and peak <= limit, peak)


def _watch(child: subprocess.Popen[bytes], limit: int | None) -> bool:
    """Wait for the child's end. Returns whether it was stopped because it passed the limit; raises RuntimeError past the time-out."""
    deadline = time.monotonic() + TRY_TIMEOUT_S
    while child.poll() is None:
        if limit is not None and _resident_bytes(child.pid) > limit:
            child.kill()
            child.wait()
            return True
        if time.monotonic() > deadline:
            child.kill()
            child.wait()
            raise RuntimeError(f"probe-batch: two steps took more than {TRY_TIMEOUT_S:g} s")
        time.sleep(POLL_S)
    return False


def _resident_bytes(pid: int) -> int:
    """0 for a process that has just ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return 0
    return pages * 4096


def _free_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise ConfigError("this system does not say how much memory is free; give --memory-gb")


def _unit(config: RunConfig) -> int:
    """Micro-batches must be multiples of a mixing group."""
    augment = config.data.augment
    return max(augment.mix_group, 1) if augment.mixes else 1


def describe(found: Found, config: RunConfig, name: str) -> str:
    """The answer as text, with the overrides that keep the global batch."""
    owner = owner_of(name)
    phase = getattr(config, owner)
    share = phase.micro_batch_size * phase.gradient_accumulation_steps
    gb = found.limit / 1e9
    if not found.micro_batch_size:
        return (
            f"{name}: not even micro_batch_size {min(t.micro_batch_size for t in found.tries)} fits into {gb:.2f} GB a rank; "
            "use ranks with more memory, more of them with a higher ZeRO stage or ep_size (`m2mkd plan` compares them), or a smaller model"
        )
    peak = next(t.peak for t in found.tries if t.micro_batch_size == found.micro_batch_size)
    size = largest_divisor(share, found.micro_batch_size, _unit(config))
    used = f"{(peak or 0) / 1e9:.2f} of {gb:.2f} GB a rank"
    lines = [f"{name}: micro_batch_size {found.micro_batch_size} fits ({used}; {len(found.tries)} tries)"]
    if size is None:
        lines.append(f"no divisor of the {share} images a rank and step is so small: change the global batch")
        return "\n".join(lines)
    lines.append(f"the same {share} images a rank and step:")
    lines.append(f"--set {owner}.micro_batch_size={size} {owner}.gradient_accumulation_steps={share // size}")
    if "micro_batch_size" in layout_of_images(config.data.augment):
        lines.append("data.augment ties mixing or repeats to the micro-batch: another size means other images, and a phase anew")
    return "\n".join(lines)


def largest_divisor(total: int, at_most: int, unit: int) -> int | None:
    """The largest multiple of `unit` that divides `total` and is not above `at_most`."""
    return max((size for size in range(unit, min(at_most, total) + 1, unit) if total % size == 0), default=None)
