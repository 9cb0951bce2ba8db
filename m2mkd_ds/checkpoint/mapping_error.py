"""The error of `mapping.py`: which keys do not fit, grouped so that a swapped module is seen at a glance."""

from __future__ import annotations

import re
from collections.abc import Sequence

_MAX_GROUPS = 12
"""Groups of alike keys that an error spells out; the exception's attributes hold all of them."""


class MappingError(ValueError):
    """Source and target do not fit; the message lists keys by kind, the attributes hold all of them."""

    def __init__(
        self,
        *,
        unused: Sequence[str] = (),
        unfilled: Sequence[str] = (),
        mismatched: Sequence[str] = (),
        clashes: Sequence[str] = (),
        num_used: int = 0,
        where: str = "",
    ) -> None:
        self.unused, self.unfilled = tuple(unused), tuple(unfilled)
        """Source keys that no target key takes; target keys that no source key fills."""
        self.mismatched, self.clashes = tuple(mismatched), tuple(clashes)
        """`key: source shape, target shape`; keys that two sources claim, or whose copies disagree."""
        lists = (
            ("source keys that the target does not have", self.unused),
            ("target keys that the source does not fill", self.unfilled),
            ("shapes that differ", self.mismatched),
            ("keys claimed twice", self.clashes),
        )
        text = "; ".join(f"{len(keys)} {title}: {spell(keys)}" for title, keys in lists if keys)
        hint = _block_hint(self.unused, self.unfilled)
        self._num_used = num_used
        start = f"{where}: " if where else ""
        super().__init__(
            f"{start}weights do not fit ({num_used} keys did): {text}{hint}. Drop or declare fresh by a rule what is meant to differ"
        )

    def at(self, where: str) -> MappingError:
        """The same error, with the file or module it is about in front."""
        lists = {"unused": self.unused, "unfilled": self.unfilled, "mismatched": self.mismatched, "clashes": self.clashes}
        return MappingError(**lists, num_used=self._num_used, where=where)


def spell(keys: Sequence[str]) -> str:
    """Keys grouped by kind (same but for indices): the first one in full, the others counted with their first numbers."""
    groups: dict[str, list[str]] = {}
    for key in sorted(keys, key=_natural):
        groups.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "#", key), []).append(key)
    shown = []
    for members in list(groups.values())[:_MAX_GROUPS]:
        more = f" and {len(members) - 1} alike up to {members[-1]}" if len(members) > 2 else ""
        shown.append(", ".join(members) if len(members) <= 2 else members[0] + more)
    hidden = sum(len(members) for members in list(groups.values())[_MAX_GROUPS:])
    return ", ".join(shown) + (f", and {hidden} more" if hidden else "")


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", key)]


def _block_hint(unused: Sequence[str], unfilled: Sequence[str]) -> str:
    """Say it in blocks when the two sides hold different blocks: that is a swapped or a missing module."""

    def blocks(keys: Sequence[str]) -> list[int]:
        return sorted({int(match[1]) for match in (re.match(r"blocks\.(\d+)\.", key) for key in keys) if match})

    extra, lacking = blocks(unused), blocks(unfilled)
    return f"; only in the source: blocks {extra}, only in the target: blocks {lacking}" if extra != lacking else ""
