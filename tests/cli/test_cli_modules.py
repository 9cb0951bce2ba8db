"""`pipeline --modules N`: equal stages for whatever teacher the run has."""

from pathlib import Path

import pytest

from m2mkd_ds.cli.resolve import cut_evenly
from m2mkd_ds.config import apply_overrides
from m2mkd_ds.recipes import get_recipe


def test_teacher_and_student_arecut_evenly_and_the_meta_model_gets_a_block_each(tmp_path: Path) -> None:
    config = apply_overrides(get_recipe("tiny"), ["teacher.arch=vit_small_patch16_224", "teacher.arch_args={}", "student.depths=[6,2]"])
    cut = cut_evenly(config, 4)
    assert cut.teacher.depths == (3, 3, 3, 3)  # timm's vit_small has 12 blocks
    assert cut.meta.depths == (1, 1, 1, 1)
    assert cut.student.depths == (2, 2, 2, 2)


def test_blocks_that_do_not_divide_are_named_with_a_cut_that_works() -> None:
    with pytest.raises(ValueError, match=r"4 blocks do not divide into 3 equal stages; give teacher\.depths .* \[2, 1, 1\]"):
        cut_evenly(get_recipe("tiny"), 3)
    uneven = apply_overrides(get_recipe("tiny"), ["student.depths=[1,2]"])
    with pytest.raises(ValueError, match=r"3 blocks do not divide into 2 equal stages; give student\.depths"):
        cut_evenly(uneven, 2)
