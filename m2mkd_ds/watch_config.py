"""WatchConfig: how long a rank may stay in one section before its watchdog ends it. A branch of the tree in config.py, which re-exports it.

A *section* is what the main thread does at the moment (`forward`, `wait for data`, collective `agree on losses`): see
distributed/watch/activity.py. Nothing here changes a bit of a result.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

WATCH_LIMITS: dict[str, tuple[float, float]] = {
    "heartbeat_s": (0.1, 60), "start_s": (0, inf), "step_s": (0, inf), "eval_s": (0, inf), "save_s": (0, inf),
}  # fmt: skip
"""Smallest and largest allowed value by field, below `watch.`."""

SHORTEST_COLLECTIVE_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Limits of sections, in seconds; 0 switches one off. Past its limit a rank says who hangs and where, and exits with code 76."""

    heartbeat_s: float = 5.0
    """Every rank writes RUN/<phase>/heartbeats/rank-<r>.json so often."""
    start_s: float = 300.0
    """Joining the job, reading data and checkpoints, making engines; also how long the ranks wait for one that never starts."""
    step_s: float = 600.0
    """A part of a training step; above teacher.patience_s. In the first step, which starts workers and compiles, the longer of this and
    `start_s`."""
    eval_s: float = 1800.0
    """A batch of an evaluation, or the wait at its end for a rank that has more images."""
    save_s: float = 1800.0
    """Writing a checkpoint or a result, reading a checkpoint back at the start, or the wait for the rank that does."""

    @property
    def first_step_s(self) -> float:
        """The limit in the first step of a start; 0 for none."""
        return max(self.start_s, self.step_s) if self.start_s and self.step_s else 0.0

    @property
    def stop_s(self) -> float:
        """What a job that was asked to stop may take: the step or the evaluation that it is in, and the save; 0 for no limit."""
        return max(self.step_s, self.eval_s) + self.save_s if self.step_s and self.eval_s and self.save_s else 0.0

    @property
    def collective_timeout_s(self) -> float:
        """Of the process group: a minute above the longest limit, so that the watchdog, which knows who is missing, speaks first."""
        return max(SHORTEST_COLLECTIVE_TIMEOUT_S, self.start_s, self.step_s, self.eval_s, self.save_s) + 60.0


def check_watch_config(watch: WatchConfig, *, patience_s: float, deadline_s: float) -> None:
    """Raises ValueError where a rank that waits for its teacher (`patience_s`), or for the parts of a checkpoint (twice `deadline_s`),
    would be taken for a hung one."""
    if 0 < watch.save_s <= 2 * deadline_s:
        raise ValueError(
            f"watch.save_s is {watch.save_s:g} and checkpoint.deadline_s is {deadline_s:g}: a rank may wait twice the second for a "
            "checkpoint and would be ended before it can say so; raise the first or lower the second"
        )
    if 0 < watch.step_s <= patience_s:
        raise ValueError(
            f"watch.step_s is {watch.step_s:g} and teacher.patience_s is {patience_s:g}: a rank that waits for its teacher would be "
            "ended before it can say so; raise the first or lower the second"
        )
