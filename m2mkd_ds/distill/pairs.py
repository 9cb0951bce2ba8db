"""All stage and block arithmetic: which blocks of teacher, meta and student make teaching pair i.

Stages and pairs are numbered 0..N-1, blocks by their number in the whole model. Nothing outside this file slices by
depth or says -1 (the authors' release confuses stage numbers with block numbers and breaks for deeper meta models).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from m2mkd_ds.config import PAIR_PHASES, ConfigError
from m2mkd_ds.models.spans import StageSpan, stage_spans
from m2mkd_ds.models.vmoe import StitchSpec


def even_depths(num_blocks: int, num_stages: int, field: str = "teacher.depths") -> tuple[int, ...]:
    """Equal stages; raises ValueError when the blocks do not divide, because an uneven split must be asked for (by `field`)."""
    if num_stages < 1 or num_blocks % num_stages:
        raise ValueError(
            f"{num_blocks} blocks do not divide into {num_stages} equal stages; give {field} explicitly, for example "
            f"{[num_blocks // max(num_stages, 1) + (i < num_blocks % max(num_stages, 1)) for i in range(num_stages)]}"
        )
    return (num_blocks // num_stages,) * num_stages


@dataclass(frozen=True)
class TeachingPair:
    """Pair `index` of `count`: the teacher span that teaches, the student span that learns, and the meta stages around them."""

    index: int
    count: int
    teacher: StageSpan
    student: StageSpan

    @property
    def is_first(self) -> bool:
        """The pair whose input is the image."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """The pair whose modules own norm and head."""
        return self.index == self.count - 1

    @property
    def prefix_stages(self) -> range:
        """Meta stages before the pair: 0..index-1, in running order."""
        return range(0, self.index)

    @property
    def suffix_stages(self) -> range:
        """Meta stages after the pair: index+1..N-1, in running order (empty for the last pair)."""
        return range(self.index + 1, self.count)


def teaching_pairs(teacher_depths: Sequence[int], meta_depths: Sequence[int], student_depths: Sequence[int]) -> tuple[TeachingPair, ...]:
    """The N pairs. Raises ValueError when the three models disagree about N."""
    teacher, meta, student = stage_spans(teacher_depths), stage_spans(meta_depths), stage_spans(student_depths)
    if not len(teacher) == len(meta) == len(student):
        raise ValueError(f"teacher has {len(teacher)} stages, meta {len(meta)}, student {len(student)}: they must agree")
    return tuple(TeachingPair(i, len(teacher), t, s) for i, (t, s) in enumerate(zip(teacher, student, strict=True)))


def parse_pairs(text: str, count: int) -> tuple[int, ...]:
    """`all`, `2`, `0,2` -> pair numbers in ascending order. Raises ValueError for a pair that does not exist."""
    if text == "all":
        return tuple(range(count))
    try:
        chosen = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"--pair {text!r}: expected `all` or pair numbers such as 0,2") from None
    for index in chosen:
        if not 0 <= index < count:
            raise ValueError(f"--pair {index}: there are {count} pairs, numbered 0 to {count - 1}")
    return tuple(chosen)


def check_pairs(text: str, count: int, phases: Sequence[str]) -> None:
    """Raises ValueError for a pair that does not exist, ConfigError where pairs are chosen and none of `phases` has any."""
    parse_pairs(text, count)
    if text != "all" and not set(phases) & set(PAIR_PHASES):
        raise ConfigError(f"--pair {text}: {', '.join(phases)} has no pairs; leave --pair out, or give --phase {' or '.join(PAIR_PHASES)}")


def stitch_specs(pair: TeachingPair, *, teacher_width: int, student_width: int) -> tuple[StitchSpec, ...]:
    """The stitch layers of one pair: the first needs no `pre` (its input is the image), the last no `post` (it owns the head)."""
    pre = StitchSpec(pair.index, "pre", pair.student.first_block, teacher_width, student_width)
    post = StitchSpec(pair.index, "post", pair.student.last_block, student_width, teacher_width)
    return (*(() if pair.is_first else (pre,)), *(() if pair.is_last else (post,)))
