"""What `m2mkd bench teacher` can be asked. Standard library only: the command line reads this file for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2mkd_ds.bench import spelled

Peer = Literal["tcp", "ring", "gloo", "flight", "flight_joined", "flight_mtls", "shm", "remote", "remote_mtls"]
PEERS: tuple[Peer, ...] = ("tcp", "ring", "gloo", "flight", "flight_joined", "flight_mtls", "shm", "remote", "remote_mtls")
OURS: tuple[Peer, ...] = ("shm", "remote", "remote_mtls")
Feed = Literal["colocated", "shm", "remote"]
FEEDS: tuple[Feed, ...] = ("colocated", "shm", "remote")


@dataclass(frozen=True, kw_only=True)
class TeacherBench:
    """The batch that travels, ways for it to travel, and how often to measure."""

    images: int = 128
    """Images a batch."""
    tokens: int = 197
    """Tokens an image; with the width, the hidden states of one teaching pair, in bf16."""
    width: int = 1024
    """Width of the teacher: ViT-L's."""
    classes: int = 1000
    """Numbers of an image's logits (bf16) and targets (fp32)."""
    in_flight: int = 3
    """Requests that are under way at a time while throughput is measured."""
    batches: int = 10
    """Batches a round with that many requests under way."""
    singles: int = 8
    """Batches a round that are asked for one at a time, for the latency."""
    rounds: int = 5
    """A round measures every row once, in another order each time."""
    peers: tuple[Peer, ...] = PEERS
    """tcp: raw socket, reused buffers. ring: memfd, copied in and out. gloo: torch.distributed. flight: Arrow Flight's DoGet, no codec, no
    checksum, pieces left where they came; flight_joined: and copied together; flight_mtls: as flight, encrypted. shm, remote, remote_mtls:
    what feed=shm and feed=remote use."""
    feeds: tuple[Feed, ...] = FEEDS
    """Ways of the training step to its teacher: colocated, shm, remote."""
    steps: int = 8
    """Training steps a round with each feed; 0 leaves them out."""
    step_images: int = 4
    """Images of a training step."""
    step_width: int = 192
    """Width of the small ViT of the training step, a multiple of 64."""
    headroom: float = 1.2
    """How much faster than the trainer the paced producer of the training step is."""
    seed: int = 0
    """Of contents and of the order of measurements."""
    quick: bool = False
    """A first look: 16 images, two rounds, fewer of everything."""
    out: Path | None = None
    """Folder for teacher_cpu.json, .md and .svg; without it, only the table is printed."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no measurement."""
        positive = ("images", "tokens", "width", "classes", "in_flight", "batches", "singles", "rounds", "step_images", "step_width")
        for name, least in ((name, 1) for name in positive):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least {least}")
        if self.in_flight > 16:
            raise ValueError(f"--in-flight is {self.in_flight}; at most 16 requests are held open")
        if self.steps < 0:
            raise ValueError(f"--steps is {self.steps}; give 0 (no training steps) or more")
        if self.step_width % 64:
            raise ValueError(f"--step-width is {self.step_width}; give a multiple of 64, one attention head each")
        if self.headroom <= 0:
            raise ValueError(f"--headroom is {self.headroom:g}; give how many times as fast as the trainer its producer is, such as 1.2")
        for name, known in (("peers", PEERS), ("feeds", FEEDS)):
            given = getattr(self, name)
            if not given or len(set(given)) != len(given):
                raise ValueError(f"--{name} is {' '.join(given) or 'empty'}; give one or several of {', '.join(known)}, each once")

    def resolved(self) -> TeacherBench:
        """With `quick` spelled out."""
        if not self.quick:
            return self
        return spelled.with_quick(self, {"images": 16, "batches": 6, "singles": 5, "rounds": 2, "steps": 6, "step_width": 64})

    def command(self) -> str:
        """The command line that asks for this; defaults are left out."""
        return spelled.command("teacher", self)
