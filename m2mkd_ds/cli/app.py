"""What every verb shares: the parser that verbs register with, where results go, the `--set` flag, and joining a job."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.extras import SubcommandApp

from m2mkd_ds.logs import setup_logging

if TYPE_CHECKING:
    from m2mkd_ds.distributed.world import World

VERBS = (
    "recipes", "shards", "pipeline", "train",
    "eval", "few-shot", "report",
    "inspect", "consolidate", "reshard", "import",
    "export", "export-timm", "export-teacher", "onnx",
    "teacher-server", "teacher-export",
    "plan", "probe-batch", "doctor", "bench",
)  # fmt: skip
"""The order of `m2mkd --help`, in which a user meets them: data and training, results, checkpoints, what leaves the house, a teacher
elsewhere, what it needs, measurements."""


def _reserved() -> None:
    """Registered by no file."""
    raise AssertionError("a verb of VERBS that no file registers")


app = SubcommandApp()
for _name in VERBS:
    # The parser lists verbs as they were first registered, and that would be the order of imports: a place is taken for each here, which
    # its own registration then fills.
    app.command(name=_name)(_reserved)
shards_app = SubcommandApp()
"""The actions of `m2mkd shards`."""
bench_app = SubcommandApp()
"""What `m2mkd bench` measures."""

NONE_GIVEN = "(default: none)"
"""Shown for an empty list, of which the parser would show nothing: `(default: )`."""

Overrides = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        name="set",
        metavar="KEY=VALUE",
        help="Override config fields, for example m2mkd.lr=1e-3 student.depths='[2,2]'.",
        help_behavior_hint=NONE_GIVEN,
    ),
]


def out(text: str) -> None:
    """Print a result (logs go to stderr)."""
    sys.stdout.write(text + "\n")


def in_world(work: Callable[[World], str]) -> None:
    """Join the job (one rank without a launcher), do the work on all ranks, print its text from rank 0."""
    from m2mkd_ds.distributed.world import init_world, shutdown

    world = init_world()
    setup_logging(world.rank)
    text = work(world)
    if world.is_main:
        out(text)
    shutdown()
