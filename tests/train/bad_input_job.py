"""What test_train_bad_input.py runs in one process without a launcher: phases that meet a full disk or a foreign checkpoint.

python bad_input_job.py OUT SHARDS      writes OUT/results.json
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from m2mkd_ds.checkpoint.saves.commit import commit_checkpoint
from m2mkd_ds.checkpoint.saves.manifest import FileRecord
from m2mkd_ds.config import RunConfig
from m2mkd_ds.data.atomic import only_writer
from m2mkd_ds.distributed.world import World
from m2mkd_ds.train.context import open_run
from m2mkd_ds.train.ending import guard
from m2mkd_ds.train.nodes import find_node, fingerprint
from m2mkd_ds.train.run_phase import run_phases
from tests.train.finished_run import tiny_config

PHASE = "pretrain_meta"


def config_for(run: Path, shards: Path) -> RunConfig:
    # No trackers: names of event files hold the time.
    return tiny_config(run, shards, f"{PHASE}.max_steps=2", f"{PHASE}.log_steps=1", "trackers=[]")


def attempt(config: RunConfig, phase: str) -> str:
    """The error of the phase, or an empty string."""
    try:
        run_phases(config, [phase])
    except (ValueError, OSError) as err:
        return str(err)
    return ""


def files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()}


@contextmanager
def small_disk(folder: Path, num_bytes: int) -> Iterator[bool]:
    """`folder` on a file system of that size where we may mount one (true), else a limit on the size of each file (false)."""
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if not mounted:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
    try:
        yield mounted
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full_disk(out: Path, shards: Path, sizes: dict[str, int]) -> dict[str, Any]:
    """The checkpoint of the last step fits on the disk, the weights behind it do not; then there is space again."""
    run = out / "full"
    weights = sizes["weights.safetensors"]
    room = sum(size + 4096 for name, size in sizes.items() if name.startswith("checkpoints")) + weights // 2
    with small_disk(run / PHASE, room) as mounted:
        error = attempt(config_for(run, shards), PHASE)
        left = files(run / PHASE)
        if mounted:
            remount = ["mount", "-o", f"remount,size={room + 4 * weights}", str(run / PHASE)]
            subprocess.run(remount, check=True)
        else:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        again = attempt(config_for(run, shards), PHASE)
        return {"mounted": mounted, "error": error, "left": left, "again": again, "then": files(run / PHASE)}


def foreign_checkpoints(out: Path, shards: Path) -> dict[str, str]:
    """What a phase says to checkpoints of step 1: of another batch, seed, order, data; with a wrong position; and of other settings."""
    seen = {}
    for name, batch, stream in (
        ("batch", 64, {}),
        ("seed", 16, {"seed": 5}),
        ("order", 16, {"order": "block/16"}),
        ("fingerprint", 16, {"fingerprint": "of other images"}),
        ("position", 16, {"position": 17}),
        ("settings", 16, {}),
        ("finished", 16, {"seed": 5}),
    ):
        config = config_for(out / f"foreign_{name}", shards)
        ctx = open_run(config, World(0, 1, 0, 1, torch.device("cpu")))
        print_ = fingerprint(config, find_node(config, PHASE), ctx.root, ctx.data_fingerprints) if name == "batch" else "of other settings"
        own = {"seed": 0, "fingerprint": ctx.train_index.fingerprint, "order": "global", "position": batch, "version": 1}
        record = {"step": 1, "fingerprint": print_, "global_batch_size": batch, "stream": own | stream}

        def write(folder: Path) -> dict[str, FileRecord]:
            (folder / "state.pt").write_bytes(b"never read")
            return {"state.pt": FileRecord(10, hashlib.sha256(b"never read").hexdigest())}

        commit_checkpoint(ctx.root / PHASE / "checkpoints", 1, write, record)
        if name == "finished":  # the phase of that seed came to its end
            (ctx.root / PHASE / "done.json").write_text(json.dumps({"fingerprint": print_, "files": {}}))
        seen[name] = attempt(config, PHASE)
    return seen


def main() -> None:
    out, shards = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    results["good"] = attempt(config_for(out / "good", shards), PHASE)
    results["files"] = files(out / "good" / PHASE)
    results["missing_input"] = attempt(config_for(out / "new", shards), "m2mkd")
    results["new"] = files(out / "new") if (out / "new").exists() else {}
    results["foreign"] = foreign_checkpoints(out, shards)
    results["aside"] = {name: files(out / f"foreign_{name}" / PHASE) for name in ("settings", "finished")}
    guard.LOCK_WAIT_S = 0.5
    with only_writer(out / "good" / PHASE, RuntimeError("taken already")):
        results["taken"] = attempt(config_for(out / "good", shards), PHASE)
    results["free"] = attempt(config_for(out / "good", shards), PHASE)
    results["full"] = full_disk(out, shards, results["files"])
    results["done"] = json.loads((out / "good" / PHASE / "done.json").read_text())
    (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
