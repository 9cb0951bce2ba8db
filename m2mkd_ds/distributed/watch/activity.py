"""What the main thread of this process does at the moment, said in sections; heartbeats and the watchdog read it from other threads.

    with section("forward", step=12, pair=0): ...            what it is, and facts that an error or a diagnosis should name
    with collective("agree on losses"): ...                  waits for other ranks; an error in it names it
    with section("save", limit="save", step=12): ...         another time limit (watchdog.py) for this section and those inside it

Steps count from 1, as in metrics.jsonl. Entering and leaving costs about four microseconds.

There is one record a process, in this module, as there is one process group and one main thread: collectives are called from everywhere,
and a watchdog has to see all of them. That is the exception to "no current anything".
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Limit = Literal["", "start", "first", "step", "eval", "save"]
"""Which time limit holds for a section; the empty one: that of the section around it."""


class CollectiveError(RuntimeError):
    """A collective failed on this rank, mostly because another one has gone; the message names the collective."""


@dataclass(frozen=True)
class Section:
    """One section that the main thread is in."""

    name: str
    is_collective: bool
    may_wait: bool
    """Whether other ranks can hold it up: a collective, or one that has unnamed collectives (DeepSpeed's own) inside."""
    limit: Limit
    facts: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The sections of the main thread, outermost first, and since when nothing was entered or left."""

    sections: tuple[Section, ...]
    changed: float
    """time.monotonic() of the last entry or exit."""
    step: int = 0
    """The last step that a section named; 0 before the first of a phase."""

    @property
    def name(self) -> str:
        """Of the innermost section."""
        return self.sections[-1].name if self.sections else "nothing named"

    @property
    def is_collective(self) -> bool:
        """Whether the innermost section waits for other ranks."""
        return bool(self.sections) and self.sections[-1].is_collective

    @property
    def may_wait(self) -> bool:
        """Whether other ranks can hold the innermost section up."""
        return bool(self.sections) and self.sections[-1].may_wait

    @property
    def limit(self) -> Limit:
        """The innermost limit that is named."""
        return next((section.limit for section in reversed(self.sections) if section.limit), "")

    @property
    def facts(self) -> dict[str, Any]:
        """Facts of all sections; inner ones win."""
        return {name: value for section in self.sections for name, value in section.facts.items()}

    def describe(self) -> str:
        """`forward` of step 12, pair 0; collective `barrier` in `save` of step 12."""
        inside = [section for section in self.sections[:-1] if section.limit in ("eval", "save")]
        where = f" in `{inside[-1].name}`" if inside else ""
        facts = {name: value for name, value in self.facts.items() if name != "slots"}
        step = f" of step {facts.pop('step')}" if "step" in facts else ""
        rest = "".join(f", {name} {value}" for name, value in facts.items())
        return f"{'collective ' if self.is_collective else ''}`{self.name}`{where}{step}{rest}"


NOWHERE = Snapshot((), 0.0)


@dataclass
class _Record:
    """Replaced whole at every change, so that other threads read it without a lock."""

    now: Snapshot = NOWHERE


_HERE = _Record()

_RAISED_IN = "m2mkd_section"
"""Attribute of an error: it travels with the error, so that nothing here keeps alive what an error refers to."""


def snapshot() -> Snapshot:
    """What the main thread does now. From any thread."""
    return _HERE.now


def where_raised(error: BaseException) -> Snapshot:
    """The sections that `error` was raised in; those of now for one that passed through none."""
    found = getattr(error, _RAISED_IN, None)
    return found if isinstance(found, Snapshot) else _HERE.now


@contextmanager
def section(name: str, *, limit: Limit = "", is_collective: bool = False, may_wait: bool = False, **facts: Any) -> Iterator[None]:
    """The main thread does `name` now. `may_wait`: inside are collectives that are not named, above all DeepSpeed's own.

    In other threads nothing is recorded: they do not hold the ranks up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer = _HERE.now.sections
    step = int(facts.get("step", 0 if limit == "start" else _HERE.now.step))
    _HERE.now = Snapshot((*outer, Section(name, is_collective, is_collective or may_wait, limit, facts)), time.monotonic(), step)
    try:
        yield
    except BaseException as error:
        if not hasattr(error, _RAISED_IN):  # the innermost section tells
            setattr(error, _RAISED_IN, _HERE.now)
        raise
    finally:
        _HERE.now = Snapshot(outer, time.monotonic(), _HERE.now.step)


@contextmanager
def collective(name: str) -> Iterator[None]:
    """A section that waits for other ranks. Raises CollectiveError, with the collective's name, for what the backend raises."""
    with section(name, is_collective=True):
        try:
            yield
        except RuntimeError as err:
            raise CollectiveError(f"collective `{name}` failed: {first_line(err)}") from err


def first_line(error: BaseException) -> str:
    """An error's text without what backends add: source file and line in front, advice and pages of C++ frames behind."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"^\[[^\]]*:\d+\] ", "", line).partition(" This is typically caused by")[0]
