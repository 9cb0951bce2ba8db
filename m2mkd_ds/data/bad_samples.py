"""Damaged samples of a run: one record each, from the worker that met it to the list beside the run's metrics."""

from __future__ import annotations

from dataclasses import dataclass

from m2mkd_ds.data.errors import SampleFault


@dataclass(frozen=True)
class BadSample:
    """One use of a damaged sample, and what took its place."""

    kind: SampleFault
    shard: str
    """Name of the shard."""
    key: str
    sample: int
    """Number in the index."""
    position: int
    """Stream position that it was meant for."""
    substitute: int
    """Number of the sample that took its place; -1: none, the run stops."""
    message: str
    """What was wrong, in a sentence."""
