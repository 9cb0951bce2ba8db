"""What `m2mkd bench checkpoint` can be asked. Standard library only: the command line reads this file for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2mkd_ds.bench import spelled

Peer = Literal["ours", "ours_async", "torch_save", "dcp", "dcp_async"]
PEERS: tuple[Peer, ...] = ("ours", "ours_async", "torch_save", "dcp", "dcp_async")


@dataclass(frozen=True, kw_only=True)
class CheckpointBench:
    """How large the state is, who saves it, where, and how often."""

    mib: int = 200
    """Size of a rank's state in MiB: fp32 weights and AdamW's two moments."""
    batch: int = 256
    """Rows of a training step; with them grows the time of a step."""
    repeats: int = 5
    """Rounds; a round measures every peer once, in turn."""
    peers: tuple[Peer, ...] = PEERS
    """ours, ours_async: a commit with checksums, in line and with checkpoint.asynchronous=true. torch_save: torch.save of the same bytes,
    then fsync and rename. dcp, dcp_async: save and async_save of torch.distributed.checkpoint. Only ours keep checksums."""
    quick: bool = False
    """A first look: 48 MiB, 64 rows, two rounds. The result says so."""
    folder: Path | None = None
    """Where to write; what is measured is this disk. Without it, a temporary folder."""
    out: Path | None = None
    """Folder for checkpoint_DEVICE.json and .md; without it, only the table is printed."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no measurement."""
        for name in ("mib", "batch", "repeats"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not self.peers:
            raise ValueError(f"--peers is empty; give one or several of {', '.join(PEERS)}")
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"--folder {self.folder}: no such folder; make it first, on the disk that is to be measured")

    def resolved(self) -> CheckpointBench:
        """With `quick` spelled out."""
        if not self.quick:
            return self
        return spelled.with_quick(self, {"mib": 48, "batch": 64, "repeats": 2})

    def command(self) -> str:
        """The command line that asks for this; defaults are left out."""
        return spelled.command("checkpoint", self)
