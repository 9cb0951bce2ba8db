"""Modules -> one model, and one model -> modules: a union of disjoint dicts and a filter, with every key accounted for.

Names are canonical and blocks carry their number in the whole model, so assembling renames nothing. What can go wrong
(a swapped pair, a missing module, a sparse stage for a dense model) shows as keys that are left over or not filled, and
the error names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from m2mkd_ds.checkpoint.mapping import Drop, MappingError, apply_rules
from m2mkd_ds.distill.pairs import TeachingPair, stitch_specs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec, VMoEArch, parameter_shapes

DROP_STITCHES = Drop(r"stitches\..*", "the assembled student has no stitch layers")


def pair_stitches(pairs: Sequence[TeachingPair], arch: VMoEArch, teacher_width: int) -> tuple[StitchSpec, ...]:
    """Stitch layers of all the given pairs, in running order."""
    return tuple(spec for pair in pairs for spec in stitch_specs(pair, teacher_width=teacher_width, student_width=arch.embed_dim))


def assemble_student(
    modules: Mapping[int, Mapping[str, Tensor]],
    pairs: Sequence[TeachingPair],
    arch: VMoEArch,
    *,
    teacher_width: int,
    keep_stitches: bool,
) -> dict[str, Tensor]:
    """Weights of the whole V-MoE from the modules of all pairs (their state dicts by pair number).

    Every key of every module is used exactly once; stitch layers are kept or dropped as asked. Raises MappingError or
    ValueError naming the pair and the keys.
    """
    missing = [pair.index for pair in pairs if pair.index not in modules]
    if missing:
        names = [f"blocks.{pair.student.first_block}..{pair.student.last_block}" for pair in pairs if pair.index in missing]
        raise ValueError(f"module of pair {missing} is missing: nothing fills {', '.join(names)}")
    parts = {}
    for pair in pairs:
        stitches = stitch_specs(pair, teacher_width=teacher_width, student_width=arch.embed_dim) if keep_stitches else ()
        target = parameter_shapes(arch, pair.student, stitches=stitches)
        try:
            parts[f"pair {pair.index}"], _ = apply_rules(modules[pair.index], target, () if keep_stitches else (DROP_STITCHES,))
        except MappingError as err:
            raise ValueError(f"module of pair {pair.index} does not fit the student: {err}") from err
    kept = pair_stitches(pairs, arch, teacher_width) if keep_stitches else ()
    whole = parameter_shapes(arch, StageSpan.whole(arch.num_blocks), stitches=kept)
    return apply_rules(union(parts), whole, ())[0]


def union(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Merge state dicts that must not share a key. Raises ValueError naming the key and both parts."""
    merged: dict[str, Tensor] = {}
    owner: dict[str, str] = {}
    for part, tensors in parts.items():
        for key, tensor in tensors.items():
            if key in merged:
                raise ValueError(f"{key} comes from {owner[key]} and from {part}: every key may come from one module only")
            merged[key], owner[key] = tensor, part
    return merged


def select(tensors: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """The named tensors of a whole model. Raises ValueError listing those that are not there."""
    absent = [name for name in names if name not in tensors]
    if absent:
        raise ValueError(f"the model lacks {absent[:5]} ({len(absent)} of {len(names)} names of the stage)")
    return {name: tensors[name] for name in names}


def split_exact(tensors: Mapping[str, Tensor], stages: Sequence[Sequence[str]]) -> list[dict[str, Tensor]]:
    """Cut a whole model's tensors into stages; every tensor must land in exactly one. Raises ValueError otherwise."""
    cut = [select(tensors, names) for names in stages]
    merged = union({f"stage {i}": part for i, part in enumerate(cut)})
    left = sorted(set(tensors) - set(merged))
    if left:
        raise ValueError(f"no stage takes {left[:5]} ({len(left)} tensors are left over)")
    return cut
