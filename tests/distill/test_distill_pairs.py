"""All index arithmetic of the method, by hand-listed examples."""

import pytest

from m2mkd_ds.distill.pairs import even_depths, parse_pairs, stage_spans, stitch_specs, teaching_pairs
from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.vmoe import StitchSpec


def test_uneven_depths_give_consecutive_spans() -> None:
    assert stage_spans((2, 1, 3)) == (StageSpan(0, 1, 6), StageSpan(2, 2, 6), StageSpan(3, 5, 6))
    assert [list(span.blocks) for span in stage_spans((2, 1, 3))] == [[0, 1], [2], [3, 4, 5]]


def test_first_and_last_follow_from_the_blocks() -> None:
    first, middle, last = stage_spans((1, 1, 2))
    assert (first.is_first, first.is_last) == (True, False)
    assert (middle.is_first, middle.is_last) == (False, False)
    assert (last.is_first, last.is_last) == (False, True)
    assert StageSpan.whole(4).is_first and StageSpan.whole(4).is_last


def test_pairs_know_prefix_and_suffix_stages() -> None:
    pairs = teaching_pairs((6, 6, 6, 6), (1, 2, 1, 1), (3, 3, 3, 3))
    assert [list(p.prefix_stages) for p in pairs] == [[], [0], [0, 1], [0, 1, 2]]
    assert [list(p.suffix_stages) for p in pairs] == [[1, 2, 3], [2, 3], [3], []]
    assert pairs[1].teacher == StageSpan(6, 11, 24) and pairs[1].student == StageSpan(3, 5, 12)


def test_models_must_agree_on_the_number_of_stages() -> None:
    with pytest.raises(ValueError, match="teacher has 2 stages, meta 3, student 2"):
        teaching_pairs((1, 1), (1, 1, 1), (1, 1))


def test_stages_without_blocks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one block"):
        stage_spans((2, 0, 1))


def test_a_depth_that_does_not_divide_suggests_an_uneven_split() -> None:
    assert even_depths(12, 4) == (3, 3, 3, 3)
    with pytest.raises(ValueError, match=r"10 blocks do not divide into 4 .* \[3, 3, 2, 2\]"):
        even_depths(10, 4)


def test_stitches_stand_at_the_modules_edges_except_at_image_and_head() -> None:
    first, middle, last = teaching_pairs((1, 1, 1), (1, 1, 1), (2, 2, 2))
    assert stitch_specs(first, teacher_width=8, student_width=6) == (StitchSpec(0, "post", 1, 6, 8),)
    assert stitch_specs(middle, teacher_width=8, student_width=6) == (StitchSpec(1, "pre", 2, 8, 6), StitchSpec(1, "post", 3, 6, 8))
    assert stitch_specs(last, teacher_width=8, student_width=6) == (StitchSpec(2, "pre", 4, 8, 6),)


def test_pair_selection_by_text() -> None:
    assert parse_pairs("all", 3) == (0, 1, 2)
    assert parse_pairs("2,0", 3) == (0, 2)
    with pytest.raises(ValueError, match="numbered 0 to 2"):
        parse_pairs("3", 3)
    with pytest.raises(ValueError, match="expected `all`"):
        parse_pairs("last", 3)
