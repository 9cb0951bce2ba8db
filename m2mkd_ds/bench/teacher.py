"""`m2mkd bench teacher`: how teacher outputs travel, ours beside the floors, in two processes and in turn. Returns text, writes files.

options -> the other process with every server -> every batch compared once -> rounds (each way once, order shuffled)
        -> rounds of training steps with each feed -> rows -> tables, JSON, plot
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.bench.environment import describe
from m2mkd_ds.bench.teacher_batches import STAND_IN, Batches, Shape
from m2mkd_ds.bench.teacher_certificates import make_certificates
from m2mkd_ds.bench.teacher_host import ENCRYPTED, Host, Task, open_client
from m2mkd_ds.bench.teacher_measure import Meter, Moved
from m2mkd_ds.bench.teacher_options import Feed, Peer, TeacherBench
from m2mkd_ds.bench.teacher_output import SCHEMA, render, write_files
from m2mkd_ds.bench.teacher_rows import StepRow, TransferRow, step_row, transfer_row, verdicts
from m2mkd_ds.bench.teacher_step import StepBench, Trained, step_shape
from m2mkd_ds.logs import Progress

PACKAGES = ("torch", "pyarrow", "xxhash", "numpy")
NOTES: dict[Peer, str] = {
    "tcp": "one loopback connection, requests sent ahead, recv_into reused buffers; no framing, no checksum",
    "ring": "slots of a memfd: the server copies in, the client copies out into reused buffers; no checksum",
    "gloo": "torch.distributed's ProcessGroupGloo, two ranks, send and recv into reused buffers",
    "flight": "pyarrow's DoGet of ready-made record batches of 3 MB, left where they came; no codec, no checksum",
    "flight_joined": "the same, and the pieces copied together into a reused buffer",
    "flight_mtls": "as flight, with certificates of both sides",
    "shm": f"ours: feed=shm with checksums and limits; {STAND_IN}",
    "remote": f"ours: feed=remote with codec, checksums and limits; {STAND_IN}",
    "remote_mtls": f"ours: as remote, with certificates of both sides; {STAND_IN}",
}


def run_teacher(options: TeacherBench) -> str:
    """Measure, write what `--out` asks for, and return the tables. Raises RuntimeError when a way brings other bytes than were sent."""
    options.check()
    command, options = options.command(), options.resolved()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="m2mkd-bench-") as folder, _one_thread():
        transfers, steps = _measure(options, Path(folder))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "command": command,
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "device": "cpu",
        "batch_bytes": next((row.batch_bytes for row in transfers if row.batch_bytes), 0),
        "cores": os.cpu_count(),
        "environment": describe(torch.device("cpu"), PACKAGES),
        "wall_s": round(time.perf_counter() - started, 1),
        "transfers": [row.to_json() for row in transfers],
        "steps": [row.to_json() for row in steps],
        "verdicts": [asdict(verdict) for verdict in verdicts(transfers, steps, options.headroom)],
    }
    text = render(result, transfers, steps)
    if options.out is not None:
        text += "\n" + "\n".join(f"wrote {path}" for path in write_files(result, transfers, steps, options.out))
    return text


def _measure(options: TeacherBench, folder: Path) -> tuple[list[TransferRow], list[StepRow]]:
    no_certificates = make_certificates(folder) if set(ENCRYPTED) & set(options.peers) else ""
    task = Task(options, folder, step_shape(options) if options.steps else None, no_certificates)
    with (
        ExitStack() as stack,
        Progress(options.rounds * (len(options.peers) + (len(options.feeds) if options.steps else 0)), "bench") as bar,
    ):
        host = Host(task)
        stack.callback(host.close)
        transfers = _transfers(options, folder, host, bar)
        steps = _steps(options, host, bar) if options.steps else []
    return transfers, steps


def _transfers(options: TeacherBench, folder: Path, host: Host, bar: Progress) -> list[TransferRow]:
    started, shuffler = host.started, random.Random(options.seed)
    shape = Shape.of_transfer(options)
    batches = Batches(shape)
    meters: dict[Peer, Meter] = {}
    passes: dict[Peer, list[Moved]] = defaultdict(list)
    with ExitStack() as stack:
        for peer in options.peers:
            if peer in started.addresses:
                client = open_client(peer, started.addresses[peer], shape, batches.sizes, folder)
                stack.callback(client.close)
                meters[peer] = Meter(client, host, batches, options)
        checked = {peer: meter.check() for peer, meter in meters.items()}
        for _ in range(options.rounds):
            for peer in shuffler.sample(list(meters), len(meters)):
                passes[peer].append(meters[peer].measure())
                bar.advance(note=peer)
    return [
        transfer_row(peer, NOTES[peer], checked[peer], passes[peer])
        if peer in meters
        else TransferRow(peer, available=False, reason=started.absent[peer])
        for peer in options.peers
    ]


def _steps(options: TeacherBench, host: Host, bar: Progress) -> list[StepRow]:
    passes: dict[Feed, list[Trained]] = defaultdict(list)
    shuffler = random.Random(options.seed)
    bench = StepBench(options, host)
    try:
        for feed in bench.feeds:
            if feed != "colocated":
                bench.check(feed)
        for _ in range(options.rounds):
            for feed in shuffler.sample(bench.feeds, len(bench.feeds)):
                passes[feed].append(bench.measure(feed))
                bar.advance(note=f"step with {feed}")
    finally:
        bench.close()
    asks = (
        f"prefetch {options.in_flight}, in its own process a stand-in for a teacher that answers from memory, one batch every `producer ms`"
    )
    notes = {
        "colocated": "prefix, teacher module and suffix run in the trainer, on images in memory",
        "shm": f"RemoteFeed over shared memory, {asks}",
        "remote": f"RemoteFeed over Arrow Flight, {asks}",
    }
    return [
        step_row(feed, notes[feed], passes[feed])
        if feed in bench.feeds
        else StepRow(feed, available=False, reason=host.started.absent_feeds[feed])
        for feed in options.feeds
    ]


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes with one thread: the other core is the transport's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
