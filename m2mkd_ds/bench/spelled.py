"""The options of a benchmark as words of its command line, and --quick spelled out. Standard library only: `--help` reads this file."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from typing import Any, ClassVar, Protocol, TypeVar


class Options(Protocol):
    """A dataclass whose fields are the flags of a verb."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


SomeOptions = TypeVar("SomeOptions", bound=Options)


def command(verb: str, options: Options) -> str:
    """The command line of `m2mkd bench VERB` that asks for these options."""
    return shlex.join(["m2mkd", "bench", verb, *words(options)])


def words(options: Options) -> list[str]:
    """Flags and values; defaults are left out."""
    said: list[str] = []
    for field in fields(options):
        value, flag = getattr(options, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        said.append(flag)
        if not isinstance(value, bool):
            said += map(str, value) if isinstance(value, tuple) else [str(value)]
    return said


def with_quick(options: SomeOptions, small: dict[str, Any]) -> SomeOptions:
    """The options with the numbers of a first look, but for those that were given and are not the default."""
    defaults = {field.name: field.default for field in fields(options)}
    return replace(options, **{name: value for name, value in small.items() if getattr(options, name) == defaults[name]})
