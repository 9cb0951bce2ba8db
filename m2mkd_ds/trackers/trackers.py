"""The trackers that `trackers` in the config asks for: checked before compute, opened on rank 0, and never a reason to stop training.

    metrics.jsonl --(a line)--> Trackers.log --(numbers, lists one by one)--> tensorboard, wandb, trackio

tracker.json in the trainee's folder holds the run's id and the last step that was handed on. A run that goes on from a checkpoint does
the steps behind it again; they are not handed on again, so no tracker has a step twice.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import logger
from m2mkd_ds.trackers import trackio_run, wandb_run
from m2mkd_ds.trackers.board import Board
from m2mkd_ds.trackers.tracker import TrackedRun, Tracker

FILE_NAME = "tracker.json"
FINISH_S = 60.0
"""How long a tracker may take to send what it has, at the end of a phase."""
OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": Board, "wandb": wandb_run.WandbRun, "trackio": trackio_run.TrackioRun,
}  # fmt: skip
"""By name in the config."""


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """What `trackers` means here: `auto` is tensorboard where that package is installed, and nothing elsewhere."""
    board = ("tensorboard",) if importlib.util.find_spec("tensorboard") else ()
    return tuple(dict.fromkeys(name for given in names for name in (board if given == "auto" else (given,))))


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is asked for by name and cannot be had here, with the line that installs it."""
    for name in chosen(names):
        try:
            if name == "tensorboard":
                importlib.import_module("tensorboard")
            elif name == "wandb":
                wandb_run.check()
            else:
                trackio_run.check()
        except ImportError as err:
            raise ConfigError(f"trackers has {name}, which is not here ({err}): pip install 'm2mkd_ds[{name}]', or take it off") from None


class Trackers:
    """All trackers of one trainee. What one of them raises is told once, and it gets nothing more."""

    def __init__(self, names: Sequence[str], run: TrackedRun, last_step: int = 0) -> None:
        """`last_step`: the last one that they were given before. Opens them."""
        self._run, self._last_step = run, last_step
        self._open: dict[str, Tracker] = {}
        for name in names:
            self._guarded(name, partial(self._begin, name))
        if self._open:
            logger.info("%s: metrics go to %s, too", run.name, ", ".join(self._open))

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl, which has `step`."""
        step = int(record["step"])
        if step <= self._last_step or not self._open:
            return
        # Before they are told: after a kill in between, a step is missing there rather than twice.
        self._last_step = step
        write_record(self._run.folder, self._run.id, step)
        numbers = scalars(record)
        for name, tracker in list(self._open.items()):
            self._guarded(name, partial(tracker.log, step, numbers))

    def finish(self) -> None:
        """Flush and close all of them, within FINISH_S each."""
        for name, tracker in list(self._open.items()):
            # In a thread: a tracker that cannot reach its server may try for hours, and the other ranks wait.
            thread = threading.Thread(target=self._guarded, args=(name, tracker.finish), name=f"finish {name}", daemon=True)
            thread.start()
            thread.join(FINISH_S)
            if thread.is_alive():
                logger.warning("%s: the tracker %s does not end within %g s and is left alone", self._run.name, name, FINISH_S)
        self._open.clear()

    def _begin(self, name: str) -> None:
        self._open[name] = OPENERS[name](self._run)

    def _guarded(self, name: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as err:  # noqa: BLE001  # other people's code and servers: no curve is worth the training
            self._open.pop(name, None)
            why = " ".join(f"{type(err).__name__}: {err}".split())[:300]
            logger.warning("%s: the tracker %s failed and gets nothing more (%s); metrics.jsonl has everything", self._run.name, name, why)


def open_trackers(
    names: Sequence[str], folder: Path, *, project: str, name: str, config: Mapping[str, Any], resume_step: int
) -> Trackers | None:
    """Trackers of the trainee in `folder`, under its id of before when it goes on from `resume_step` > 0; None without any."""
    known = chosen(names)
    if not known:
        return None
    run_id, last_step = read_record(folder) if resume_step else ("", 0)
    run_id = run_id or secrets.token_hex(4)
    write_record(folder, run_id, last_step)
    return Trackers(known, TrackedRun(project=project, name=name, id=run_id, folder=folder, config=config), last_step)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line but `step`; a list as name/0, name/1, ..."""
    flat: dict[str, float] = {}
    for key, value in record.items():
        named = {f"{key}/{i}": item for i, item in enumerate(value)} if isinstance(value, list) else {key: value}
        flat |= {name: number for name, number in named.items() if isinstance(number, (int, float)) and key != "step"}
    return flat


def read_record(folder: Path) -> tuple[str, int]:
    """Id and last step of the run before; ("", 0) where there was none."""
    try:
        record = json.loads((folder / FILE_NAME).read_text())
        return str(record["id"]), int(record["step"])
    except FileNotFoundError:
        return "", 0
    except (ValueError, KeyError, TypeError) as err:
        logger.warning("%s: cannot be read (%s); trackers begin a new run", folder / FILE_NAME, err)
        return "", 0


def write_record(folder: Path, run_id: str, step: int) -> None:
    """Whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{FILE_NAME}.tmp"
    temporary.write_text(json.dumps({"id": run_id, "step": step}))
    os.replace(temporary, folder / FILE_NAME)
