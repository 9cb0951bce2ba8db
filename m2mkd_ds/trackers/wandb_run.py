"""Weights & Biases. Who it belongs to and where it goes is the package's own matter: `wandb login`, WANDB_MODE, WANDB_ENTITY, ...

Nothing of the command line or of the machine is sent, because both may hold secrets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from m2mkd_ds.config import ConfigError
from m2mkd_ds.trackers.tracker import TrackedRun

FLUSH_FIELD, FLUSH_S = "x_transaction_log_flush_interval", 1.0
"""Of its file on this disk; what is not written when a process is killed is lost to it."""


def check() -> None:
    """Raises ImportError without the package, ConfigError where it would ask for a key in the middle of a run."""
    import wandb

    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise ConfigError(
            "trackers has wandb, and there is no key for it here: run `wandb login`, or set WANDB_API_KEY, or set WANDB_MODE=offline to "
            "keep the runs on this disk (`wandb sync` sends them later)"
        )


class WandbRun:
    """One run; several may be open in a process. Offline files lie in `wandb/` in the trainee's folder."""

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        os.makedirs(run.folder, exist_ok=True)
        # Older releases write when a buffer is full, or at the end, and have no such setting.
        often = {FLUSH_FIELD: FLUSH_S} if FLUSH_FIELD in wandb.Settings.model_fields else {}
        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_meta=True, x_disable_machine_info=True,
            x_save_requirements=False, **often,
        )  # fmt: skip
        self._run = wandb.init(
            project=run.project, name=run.name, id=run.id, dir=str(run.folder), config=dict(run.config), resume="allow",
            reinit="create_new", settings=settings,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """As `Tracker`."""
        # With a step alone it would keep the line until the next one, and a kill in between would lose it.
        self._run.log(dict(metrics), step=step, commit=True)

    def finish(self) -> None:
        """As `Tracker`."""
        self._run.finish()
