"""The table of accuracies: numbers as the evaluation wrote them, dashes where it wrote none."""

from __future__ import annotations

from typing import Any

import pytest

from m2mkd_ds.report import format_table
from m2mkd_ds.report.table import COLUMNS, count, difference_line, interval, label, ordered_models, percent, rows


def test_models_stand_in_the_order_of_the_method(run_results: dict[str, Any]) -> None:
    # results.json lists them otherwise: see conftest.TOP1.
    assert ordered_models(run_results) == [
        "meta", "teacher", "teacher_hybrid_0", "teacher_hybrid_1", "teacher_hybrid_2",
        "student_hybrid_0", "student_hybrid_1", "student_hybrid_2", "student_cold", "student", "baseline",
    ]  # fmt: skip


def test_eleven_hybrids_stand_by_number_not_by_letter() -> None:
    names = {f"student_hybrid_{i}": {} for i in range(12)}
    assert ordered_models({"models": names}) == [f"student_hybrid_{i}" for i in range(12)]


def test_a_row_holds_the_numbers_of_its_model(run_results: dict[str, Any]) -> None:
    row = next(row for row in rows(run_results) if row[0] == label("student"))
    # top1 0.8841, interval 0.8781..0.8901, top5 0.9741, loss -ln 0.8841 = 0.1232, agreement 0.8741, 1,234,567 and 456,789 parameters
    assert row == ("student, final", "88.41", "87.81 to 89.01", "97.41", "0.123", "87.4", "1.23 M", "457 k")
    assert len(row) == len(COLUMNS)


def test_the_text_table_has_one_aligned_line_a_model(run_results: dict[str, Any]) -> None:
    text = format_table(run_results).splitlines()
    head, rule, *body = text
    assert set(rule) == {"-"}
    lines = body[: body.index(rule)]
    assert len(lines) == len(run_results["models"])
    assert {len(line) for line in [head, *lines]} == {len(rule)}
    assert "10,000 validation images, each counted once." in text[-2]


@pytest.mark.parametrize("scores", [{}, {"top1": None}, {"top1": float("nan"), "top1_ci": [0.1], "loss": "x", "parameters": True}])
def test_what_was_not_measured_is_a_dash_and_never_a_zero(scores: dict[str, Any]) -> None:
    assert rows({"models": {"student": scores}}) == [("student, final", *["-"] * 7)]


@pytest.mark.parametrize("results", [{}, {"models": {}}, {"models": None}])
def test_without_models_the_table_says_so(results: dict[str, Any]) -> None:
    assert "No model was evaluated" in format_table(results)


def test_an_unknown_model_keeps_its_name_and_comes_last() -> None:
    assert [row[0] for row in rows({"models": {"mine": {}, "baseline": {}}})] == ["V-MoE from scratch", "mine"]


@pytest.mark.parametrize(
    ("difference", "ci", "expected"),
    [
        (
            0.0307,
            [0.0251, 0.0363],
            "3.07 points above the baseline trained from scratch (95 % CI of the difference +2.51 to +3.63), a difference",
        ),
        (
            -0.02,
            [-0.03, -0.01],
            "2.00 points below the baseline trained from scratch (95 % CI of the difference -3.00 to -1.00), a difference",
        ),
        (0.001, [-0.004, 0.006], "chance alone could explain"),
        (0.001, None, "0.10 points above the baseline trained from scratch."),
    ],
)
def test_the_finding_says_direction_and_certainty(difference: float, ci: Any, expected: str) -> None:
    assert expected in difference_line({"student_minus_baseline": {"top1": difference, "ci": ci}})


def test_without_a_baseline_there_is_no_finding() -> None:
    assert "was not compared" in difference_line({})


@pytest.mark.parametrize(
    ("value", "expected"), [(483_300_000, "483 M"), (1_000, "1 k"), (999, "999"), (12_345, "12.3 k"), (None, "-"), (2.5e9, "2.5 G")]
)
def test_counts_are_short(value: Any, expected: str) -> None:
    assert count(value) == expected


def test_percent_and_interval_refuse_what_is_no_number() -> None:
    assert percent(0.8123) == "81.23"
    assert percent("0.8") == percent(True) == percent(float("inf")) == "-"
    assert interval([0.8, 0.82]) == "80.00 to 82.00"
    assert interval([0.8]) == interval(None) == interval([None, 1]) == "-"
