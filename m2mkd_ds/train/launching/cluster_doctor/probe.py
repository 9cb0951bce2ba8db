"""What one host of a cluster is like. Over ssh: `python -m m2mkd_ds.train.launching.cluster_doctor.probe REQUEST` prints one JSON line.

The request is JSON too: {master, run_dir, token, train, validation}, with empty texts for what is not asked. A thing that cannot be
found out comes back as `{"error": reason}`; judging is not done here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from m2mkd_ds import __version__

PACKAGES = ("torch", "deepspeed", "timm", "numpy")
MARK = "M2MKD_PROBE "
"""Stands in front of the answer: a login may print lines of its own."""


def token_file(run_dir: str, token: str) -> Path:
    """The file by which hosts see whether they look at the same folder."""
    return Path(run_dir) / f".doctor-{token}"


def examine(request: dict[str, str]) -> dict[str, Any]:
    """The facts of this host, as plain data."""
    return {
        "host": socket.gethostname(),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}",
        "versions": {"m2mkd_ds": __version__, **{name: version_of(name) for name in PACKAGES}},
        "own_name": _or_error(lambda: sorted({str(row[4][0]) for row in socket.getaddrinfo(socket.gethostname(), None)})),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": _or_error(_num_gpus),
        "route": _or_error(partial(_route, request["master"])),
        "run_dir": _or_error(partial(_folder, request["run_dir"], request["token"])) if request["run_dir"] else None,
        **{part: _or_error(partial(_shards, request[part])) if request[part] else None for part in ("train", "validation")},
    }


def _or_error(find_out: Callable[[], Any]) -> Any:
    """Its answer, or the reason why there is none: a host that lacks one thing can still tell the others."""
    try:
        return find_out()
    except (OSError, ValueError, ImportError, RuntimeError) as err:
        return {"error": str(err) or type(err).__name__}


def version_of(name: str) -> str:
    """The installed version of a package, or `absent`."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _num_gpus() -> int:
    import torch  # whether it imports is a fact, too

    return torch.cuda.device_count()


def _route(master: str) -> dict[str, str]:
    from m2mkd_ds.distributed.start.interface import interface_towards, local_address_towards

    return {"address": local_address_towards(master), "interface": interface_towards(master, spans_hosts=True) or "unknown"}


def _folder(run_dir: str, token: str) -> dict[str, Any]:
    """Whether the doctor's file is seen here, and whether this host can write beside it."""
    seen = token_file(run_dir, token).read_text()
    own = token_file(run_dir, f"{token}-{socket.gethostname()}")
    own.write_text(token)
    own.unlink()
    return {"seen": seen, "free_gib": shutil.disk_usage(run_dir).free / 2**30}


def _shards(address: str) -> str:
    from m2mkd_ds.data.index import ShardIndex

    return ShardIndex.load(address).fingerprint


if __name__ == "__main__":
    sys.stdout.write(f"{MARK}{json.dumps(examine(json.loads(sys.argv[1])))}\n")
