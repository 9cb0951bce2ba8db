"""`m2mkd bench checkpoint`: how long saving holds training up, in line and asynchronous, against torch.save and torch's own checkpoints.

options -> an engine with as large a state as asked for -> rounds (each peer once): a few steps, a save, steps until all is on the disk
"""

from __future__ import annotations

import io
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from m2mkd_ds.bench.checkpoint_options import CheckpointBench
from m2mkd_ds.bench.checkpoint_peers import Saver, make_saver
from m2mkd_ds.bench.environment import describe
from m2mkd_ds.bench.measure import Spread
from m2mkd_ds.bench.result_files import markdown_head, markdown_table, write_result
from m2mkd_ds.config import PhaseConfig
from m2mkd_ds.distributed.ds_config import resolve_ds_config
from m2mkd_ds.distributed.engine import DeepSpeedEngine
from m2mkd_ds.distributed.world import World
from m2mkd_ds.logs import Progress
from m2mkd_ds.train.optim import build_adamw

SCHEMA = "m2mkd bench checkpoint 1"
"""Stands in every result; a change of the fields' meaning is a new number."""
BLOCKED_SHARE = 0.10
"""Target: an asynchronous save holds training up for less than this share of one in line."""
BYTES_A_WEIGHT = 12
"""fp32, and AdamW's two moments."""
WIDTH = 1024
_IDLE_STEPS = 3


@dataclass(frozen=True)
class Sample:
    """One save."""

    blocked_ms: float
    """From the call of save until training may go on."""
    on_disk_ms: float
    """From the call until everything is on the disk."""
    lost_ms: float
    """`blocked_ms`, and by how much the steps behind it were slower than those before the save."""


@dataclass(frozen=True)
class CheckpointRow:
    """One peer: median and spread over the rounds."""

    peer: str
    blocked_ms: Spread
    on_disk_ms: Spread
    lost_ms: Spread
    samples: list[Sample]


def run_checkpoint(options: CheckpointBench, world: World) -> str:
    """Measure in a job of one rank, write what `--out` asks for, and return the table.

    Raises ValueError for more ranks: how many steps fit behind a save is each rank's own, and steps are collective.
    """
    options.check()
    command, options = options.command(), options.resolved()
    if world.size > 1:
        raise ValueError(f"bench checkpoint measures one rank and was launched with {world.size}; start it without the launcher")
    torch.set_num_threads(1)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="m2mkd-bench-", dir=options.folder) as folder:
        rows, step_ms, state_bytes = _measure(options, world, Path(folder))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "device": world.device.type,
        "state_bytes": state_bytes,
        "step_ms": asdict(step_ms),
        "environment": describe(world.device, ("torch", "deepspeed")),
        "wall_s": round(time.perf_counter() - started, 1),
        "rows": [asdict(row) for row in rows],
        "verdicts": verdicts(rows),
    }
    text = render(result, rows)
    if options.out is not None:
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, rows, options.out))
    return text


def verdicts(rows: list[CheckpointRow]) -> list[dict[str, Any]]:
    """What the target says, where both of our rows are there."""
    blocked = {row.peer: row.blocked_ms.median for row in rows}
    if not {"ours", "ours_async"} <= blocked.keys():
        return []
    value = blocked["ours_async"] / blocked["ours"]
    return [{"what": "ours_async / ours, time blocked", "value": value, "target": BLOCKED_SHARE, "met": value < BLOCKED_SHARE}]


class _Training:
    """An engine over square layers, and its step."""

    def __init__(self, options: CheckpointBench, world: World) -> None:
        layers = max(1, round(options.mib * 2**20 / (BYTES_A_WEIGHT * WIDTH * WIDTH)))
        torch.manual_seed(0)
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        phase = PhaseConfig(micro_batch_size=options.batch, precision="fp32")
        settings = resolve_ds_config("zero1", phase, world_size=world.size, precision="fp32")
        self.engine = DeepSpeedEngine(net, build_adamw(net, phase), settings, world)
        self._x = torch.randn(options.batch, WIDTH, device=world.device)
        self.state = {f"{kind}.{name}": torch.randn_like(p) for name, p in net.named_parameters() for kind in ("master", "m", "v")}

    def step(self) -> float:
        """One step; its milliseconds."""
        began = time.perf_counter()
        self.engine.backward(self.engine(self._x).square().mean())
        self.engine.step(1e-5)
        return 1e3 * (time.perf_counter() - began)


def _measure(options: CheckpointBench, world: World, folder: Path) -> tuple[list[CheckpointRow], Spread, int]:
    training = _Training(options, world)
    for _ in range(_IDLE_STEPS):  # the first step makes the moments
        training.step()
    savers = {peer: make_saver(peer, training.engine, training.state, world, folder) for peer in options.peers}
    samples: dict[str, list[Sample]] = {peer: [] for peer in options.peers}
    idle: list[float] = []
    with Progress((options.repeats + 1) * len(savers), "bench checkpoint") as bar:
        for number in range(options.repeats + 1):
            for peer, saver in savers.items():
                before = [training.step() for _ in range(_IDLE_STEPS)]
                sample = _save_once(saver, training, number, median(before))
                if number:  # the first round makes buffers, folders and threads
                    samples[peer].append(sample)
                    idle += before
                bar.advance(note=f"{peer} {sample.blocked_ms:.0f} ms")
    for saver in savers.values():
        saver.close()
    training.engine.close()
    return [_row(peer, taken) for peer, taken in samples.items()], Spread.of(idle), _bytes(training.state)


def _row(peer: str, taken: list[Sample]) -> CheckpointRow:
    blocked, on_disk, lost = (Spread.of([getattr(one, key) for one in taken]) for key in ("blocked_ms", "on_disk_ms", "lost_ms"))
    return CheckpointRow(peer, blocked, on_disk, lost, taken)


def _save_once(saver: Saver, training: _Training, number: int, step_ms: float) -> Sample:
    began = time.perf_counter()
    pending = saver.save(number)
    blocked_ms = 1e3 * (time.perf_counter() - began)
    slower_ms = 0.0
    while not pending.is_done():
        slower_ms += training.step() - step_ms
    pending.wait()
    return Sample(blocked_ms, 1e3 * (time.perf_counter() - began), blocked_ms + max(0.0, slower_ms))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


HEADINGS = ("peer", "blocked ms", "on disk ms", "lost ms", "MB/s to disk")


def _cells(result: dict[str, Any], row: CheckpointRow) -> list[str]:
    spreads = [f"{s.median:.0f} ({s.p10:.0f}-{s.p90:.0f})" for s in (row.blocked_ms, row.on_disk_ms, row.lost_ms)]
    return [row.peer, *spreads, f"{result['state_bytes'] / 1e3 / row.on_disk_ms.median:.0f}"]


def headline(result: dict[str, Any]) -> str:
    """Size and place in one line; a quick look is named as such, because its numbers are not to be compared with others."""
    quick = "A FIRST LOOK (--quick): " if result["options"]["quick"] else ""
    size, step = result["state_bytes"] / 2**20, result["step_ms"]["median"]
    return f"{quick}state of {size:.0f} MiB, a step of {step:.0f} ms; {result['environment']['device']}; {result['wall_s']:.0f} s"


def render(result: dict[str, Any], rows: list[CheckpointRow]) -> str:
    """A table for a terminal, and the verdict."""
    box = io.StringIO()
    console = Console(file=box, width=160, force_terminal=False, highlight=False)
    table = Table(title=headline(result), title_justify="left")
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(result, row))
    console.print(table)
    for verdict in result["verdicts"]:
        console.print(f"  {_verdict_line(verdict)}", markup=False)
    return box.getvalue().rstrip()


def _verdict_line(verdict: dict[str, Any]) -> str:
    return f"{'met' if verdict['met'] else 'MISSED'}: {verdict['what']}: {verdict['value']:.3f}, target below {verdict['target']}"


def write_files(result: dict[str, Any], rows: list[CheckpointRow], folder: Path) -> list[Path]:
    """checkpoint_DEVICE.json and .md; their paths."""
    lines = markdown_head(f"Saving: {result['environment']['device']}", result, headline(result))
    lines += markdown_table(HEADINGS, (_cells(result, row) for row in rows))
    lines += ["", *(f"- {_verdict_line(verdict)}" for verdict in result["verdicts"]), ""]
    return write_result(folder, f"checkpoint_{result['device']}", result, "\n".join(lines))
