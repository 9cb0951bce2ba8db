"""Ways to put a rank's state on the disk, behind one interface: our commit, torch.save, and torch.distributed.checkpoint.

Each `save` returns when training may go on, with a function that tells whether everything is on the disk and one that waits for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from m2mkd_ds.bench.checkpoint_options import Peer
from m2mkd_ds.checkpoint.saves.async_commit import Committer
from m2mkd_ds.checkpoint.saves.attempt import Ranks
from m2mkd_ds.checkpoint.saves.commit import Write
from m2mkd_ds.checkpoint_config import CheckpointConfig
from m2mkd_ds.distributed.engine import Engine, Snapshot
from m2mkd_ds.distributed.world import World, broadcast_object


class Saver(Protocol):
    """One way to save."""

    def save(self, number: int) -> Pending:
        """Save once more; returns when training may go on."""
        ...

    def close(self) -> None:
        """Let go of threads."""
        ...


@dataclass(frozen=True)
class Pending:
    """A save that may not be on the disk yet."""

    is_done: Callable[[], bool] = lambda: True
    wait: Callable[[], object] = lambda: None


class OurCommit:
    """What training does (train/saving.py), with a checkpoint kept."""

    def __init__(self, engine: Engine, world: World, root: Path, *, asynchronous: bool) -> None:
        config = CheckpointConfig(asynchronous=asynchronous, keep_last=1)
        self._engine = engine
        self._snapshot: Snapshot | None = None
        self._committer = Committer(root, Ranks(world.rank, world.size, broadcast_object), config)

    def save(self, number: int) -> Pending:
        def copy() -> Write:
            self._snapshot = self._engine.snapshot(reuse=self._snapshot)
            return self._snapshot.write

        self._committer.save(number, copy, {"step": number})
        return Pending(lambda: not self._committer.is_busy(), self._committer.wait)

    def close(self) -> None:
        self._committer.close()


class TorchSave:
    """torch.save, forced to the disk and renamed: the plainest way that is not damaged by a crash. A file a rank, no checksum."""

    def __init__(self, tensors: Mapping[str, Tensor], world: World, root: Path) -> None:
        self._tensors, self._file = dict(tensors), root / f"rank{world.rank}.pt"
        root.mkdir(parents=True, exist_ok=True)

    def save(self, number: int) -> Pending:
        temp = self._file.with_suffix(".tmp")
        with temp.open("wb") as file:
            torch.save(self._tensors, file)
            file.flush()
            os.fsync(file.fileno())
        temp.rename(self._file)
        return Pending()

    def close(self) -> None:
        """Nothing to let go of."""


class Dcp:
    """torch.distributed.checkpoint with its defaults: files forced to the disk, metadata last, no checksum."""

    def __init__(self, tensors: Mapping[str, Tensor], root: Path, *, asynchronous: bool) -> None:
        self._tensors, self._root, self._asynchronous = dict(tensors), root, asynchronous

    def save(self, number: int) -> Pending:
        import torch.distributed.checkpoint as dcp

        folder = self._root / str(number)
        if not self._asynchronous:
            dcp.save(self._tensors, checkpoint_id=folder)
            self._drop(number - 1)
            return Pending()
        future = dcp.async_save(self._tensors, checkpoint_id=folder)
        assert isinstance(future, Future)  # another type comes only where staging is asked to be asynchronous, too

        def wait() -> None:
            future.result()
            self._drop(number - 1)

        return Pending(future.done, wait)

    def _drop(self, number: int) -> None:
        """As our retention does: one checkpoint stays."""
        if number >= 0:
            shutil.rmtree(self._root / str(number))

    def close(self) -> None:
        """Nothing to let go of."""


def make_saver(peer: Peer, engine: Engine, tensors: Mapping[str, Tensor], world: World, root: Path) -> Saver:
    """The peer, writing below `root`. `tensors`: as many bytes as the engine's state, for those who save plain tensors."""
    if peer in ("ours", "ours_async"):
        return OurCommit(engine, world, root / peer, asynchronous=peer == "ours_async")
    if peer == "torch_save":
        return TorchSave(tensors, world, root / peer)
    return Dcp(tensors, root / peer, asynchronous=peer == "dcp_async")
