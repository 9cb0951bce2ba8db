"""What a command line left behind."""

from collections.abc import Callable
from typing import NamedTuple


class Ended(NamedTuple):
    """Exit code, stdout, stderr."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]
