"""Loading weights by rules: every source key is used or dropped by a named rule, every target key is filled or declared fresh.

    source names --rules--> target names --checked against--> target shapes --> tensors, MappingReport   (or MappingError)

A source key goes through the first rule that matches it; a key that no rule matches keeps its name. Patterns are regular
expressions over the whole key. PAPER: the authors' release loads with torch's non-strict switch everywhere, so that a sparse
module goes into a dense one, or nothing is loaded at all, without a word; here that is an error that lists the keys.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.mapping_error import MappingError, spell

__all__ = [
    "Alias", "Convert", "Drop", "Fresh", "MappingError", "MappingReport", "Rename", "Rule", "SourceRule", "Stack",
    "apply_rules", "check_target", "load_exact", "same_bits", "transform",
]  # fmt: skip

_log = logging.getLogger("m2mkd_ds")

_R = TypeVar("_R", bound="Rule")

NewName = str | Callable[[re.Match[str]], str]
"""A replacement as `re.Match.expand` reads it (`blocks.\\1.moe`), or a function of the match."""


@dataclass(frozen=True)
class Rename:
    """The tensor of every key that matches `pattern` goes to `replacement`, unchanged."""

    pattern: str
    replacement: NewName


@dataclass(frozen=True)
class Convert:
    """Like Rename, but `fn` makes the target's tensor out of the source's (a reshape, a transpose)."""

    pattern: str
    replacement: NewName
    fn: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Stack:
    """Keys that differ in the group named `index` (0, 1, 2, ... without a gap) become one tensor, joined along `dim` in that order."""

    pattern: str
    replacement: NewName
    dim: int = 0


@dataclass(frozen=True)
class Alias:
    """A further copy of the tensor that `replacement` names. Copies must agree bit for bit; a copy alone fills the target."""

    pattern: str
    replacement: NewName


@dataclass(frozen=True)
class Drop:
    """Matching source keys are not wanted, for a reason that is logged."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class Fresh:
    """Matching target keys keep the values they were initialised with, for a reason that is logged; no source key may fill them."""

    pattern: str
    reason: str


SourceRule = Rename | Convert | Stack | Alias | Drop
Rule = SourceRule | Fresh

_Claim = tuple[str, SourceRule | None, int]
"""A source key, the rule that took it, its place in a Stack."""


@dataclass(frozen=True)
class MappingReport:
    """What happened to every key."""

    origin: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Target key -> the source keys it came from (several for Stack and Alias)."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Source key -> reason."""
    fresh: dict[str, str] = field(default_factory=dict)
    """Target key -> reason."""

    def summary(self) -> str:
        """One line of counts."""
        sources = sum(len(keys) for keys in self.origin.values())
        parts = [f"{len(self.origin)} tensors filled from {sources} source keys"]
        for name, table in (("dropped", self.dropped), ("fresh", self.fresh)):
            for reason in sorted(set(table.values())):
                parts.append(f"{sum(r == reason for r in table.values())} {name} ({reason})")
        return ", ".join(parts)


def transform(source: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], MappingReport]:
    """Rename and convert `source` without a target. Returns tensors under new names (not copied) and the report.

    Raises MappingError when two source keys claim one name, or copies declared by Alias disagree.
    """
    report = MappingReport()
    claims: dict[str, list[_Claim]] = {}
    active: list[SourceRule] = [rule for rule in rules if not isinstance(rule, Fresh)]
    for key in sorted(source):
        rule, match = _first_match(active, key)
        if isinstance(rule, Drop):
            report.dropped[key] = rule.reason
            continue
        if rule is None or match is None:
            name = key
        else:
            name = rule.replacement(match) if callable(rule.replacement) else match.expand(rule.replacement)
        index = int(match["index"]) if isinstance(rule, Stack) and match is not None else 0
        claims.setdefault(name, []).append((key, rule, index))
    tensors, clashes = {}, []
    for name, claim in claims.items():
        tensor, clash = _settle(source, name, claim)
        if tensor is None:
            clashes.append(clash)
            continue
        tensors[name] = tensor
        report.origin[name] = tuple(key for key, _, _ in claim)
    if clashes:
        raise MappingError(clashes=clashes, num_used=len(tensors))
    return tensors, report


def check_target(
    tensors: Mapping[str, Tensor], target_shapes: Mapping[str, Sequence[int]], report: MappingReport, rules: Sequence[Rule] = ()
) -> MappingReport:
    """Check renamed tensors against the target's shapes; returns `report` with the fresh keys filled in.

    Raises MappingError with the unused, unfilled and mismatched keys. A key that a Fresh rule names and the source fills is
    a clash, because it is not clear which is meant.
    """
    fresh_rules = [rule for rule in rules if isinstance(rule, Fresh)]
    unused: list[str] = []
    unfilled, mismatched, clashes = [], [], []
    for name, tensor in tensors.items():
        if name not in target_shapes:
            unused += report.origin.get(name, (name,))
        elif tuple(tensor.shape) != tuple(target_shapes[name]):
            mismatched.append(f"{name} source {list(tensor.shape)} target {list(target_shapes[name])}")
    for name in target_shapes:
        rule, _ = _first_match(fresh_rules, name)
        if isinstance(rule, Fresh) and name in tensors:
            clashes.append(f"{name} (declared fresh: {rule.reason}; the source fills it too, drop it there)")
        elif isinstance(rule, Fresh):
            report.fresh[name] = rule.reason
        elif name not in tensors:
            unfilled.append(name)
    if unused or unfilled or mismatched or clashes:
        num_used = sum(name in target_shapes for name in tensors) - len(mismatched)
        raise MappingError(unused=unused, unfilled=unfilled, mismatched=mismatched, clashes=clashes, num_used=num_used)
    return report


def apply_rules(
    source: Mapping[str, Tensor], target_shapes: Mapping[str, Sequence[int]], rules: Sequence[Rule] = ()
) -> tuple[dict[str, Tensor], MappingReport]:
    """Make the target's tensors out of `source`.

    Returns a tensor (not copied) for every key of `target_shapes` that is not fresh, and the report, whose counts are logged.
    Raises MappingError.
    """
    tensors, report = transform(source, rules)
    report = check_target(tensors, target_shapes, report, rules)
    _log.info("weights: %s", report.summary())
    return tensors, report


def load_exact(module: nn.Module, tensors: Mapping[str, Tensor], *, fresh: Sequence[Fresh] = ()) -> MappingReport:
    """Copy `tensors` into `module`: every key used, every state-dict key filled or named by a Fresh rule.

    The module's values keep their dtype and device; a module on the meta device gets its own copies in the source's dtype.
    Raises MappingError; ValueError when something of a meta module would be left without values.
    """
    state = module.state_dict()
    named, report = apply_rules(tensors, {name: tensor.shape for name, tensor in state.items()}, fresh)
    on_meta = [name for name, tensor in state.items() if tensor.is_meta]
    empty = sorted(set(on_meta) & set(report.fresh))
    if empty:
        raise ValueError(f"{spell(empty)} cannot stay fresh in a module on the meta device: build it on the CPU, or give the weights")
    if on_meta:
        # Assigned tensors would be shared with the caller's mapping (and with other modules loaded from it), hence the clones.
        named = {name: tensor.detach().clone() for name, tensor in named.items()}
    module.load_state_dict({**state, **named}, assign=bool(on_meta))
    left = [name for name, buffer in module.named_buffers() if buffer.is_meta]
    if left:
        raise ValueError(f"{spell(left)}: buffers that no state dict holds are still on the meta device; build the module on the CPU")
    return report


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same dtype, shape and bits (so NaN equals NaN and -0 differs from 0)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def _first_match(rules: Sequence[_R], key: str) -> tuple[_R | None, re.Match[str] | None]:
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match:
            return rule, match
    return None, None


def _settle(source: Mapping[str, Tensor], name: str, claim: list[_Claim]) -> tuple[Tensor | None, str]:
    """The one tensor that the claiming source keys make for `name`, or None and the reason why there is none."""
    keys = [key for key, _, _ in claim]
    main = [(key, rule, index) for key, rule, index in claim if not isinstance(rule, Alias)]
    if main and all(isinstance(rule, Stack) for _, rule, _ in main) and len(main) == len(claim):
        main.sort(key=lambda item: item[2])
        ids = [index for _, _, index in main]
        rule = main[0][1]
        if ids != list(range(len(ids))) or not isinstance(rule, Stack):
            return None, f"{name} (parts are numbered {ids}, expected 0 to {len(ids) - 1})"
        parts = [source[key] for key, _, _ in main]
        if len({part.shape for part in parts}) > 1:
            return None, f"{name} (parts have shapes {sorted({tuple(part.shape) for part in parts})})"
        return torch.cat(parts, dim=rule.dim), ""
    if len(main) > 1:
        return None, f"{name} (from {' and '.join(key for key, _, _ in main)})"
    first = main[0] if main else claim[0]
    differing = [key for key in keys if not same_bits(source[key], source[first[0]])]
    if differing:
        return None, f"{name} ({first[0]} and {', '.join(differing)} should be copies but differ)"
    tensor = source[first[0]]
    return (first[1].fn(tensor) if isinstance(first[1], Convert) else tensor), ""
