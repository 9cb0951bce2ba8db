"""The search against memories with known answers; real steps in real children under a small limit; the overrides that it prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from m2mkd_ds.checkpoint.out_of_memory import ran_out_of_memory
from m2mkd_ds.config import AugmentConfig, ConfigError, RunConfig
from m2mkd_ds.recipes import get_recipe
from m2mkd_ds.train.probe_batch import Found, Try, _try, describe, largest_divisor, probe_batch, search
from tests.cli.conftest import m2mkd  # noqa: F401  (a fixture)
from tests.cli.ended import Run

MB = 1_000_000


def searched(base: int, per_image: float, limit: int, *, start: int = 16, unit: int = 1, most: int = 4096) -> tuple[list[Try], int]:
    """Tries against a memory that grows in a straight line, and the exact answer."""

    def measure(size: int) -> Try:
        assert size % unit == 0 and unit <= size <= most
        peak = base + int(per_image * size)
        return Try(size, peak <= limit, peak if peak <= limit else None)

    tries = search(measure, start=start, unit=unit, most=most, limit=limit)
    exact = max((n for n in range(unit, most + 1, unit) if base + int(per_image * n) <= limit), default=0)
    return tries, exact


@pytest.mark.parametrize("start", [1, 7, 64, 4096])
@pytest.mark.parametrize("per_image", [0.4 * MB, 3 * MB, 11 * MB, 90 * MB])
def test_the_largest_size_is_found_in_few_tries(start: int, per_image: float) -> None:
    tries, exact = searched(700 * MB, per_image, 1300 * MB, start=start)
    best = max(t.micro_batch_size for t in tries if t.fits)
    # 600 MB are left: 1500, 200, 54 and 6 images. Up to 32 exactly, above to 3 % (and the 1 % that a guess stays below the limit).
    assert exact == int(600 * MB / per_image)
    assert best <= exact and (best == exact if exact < 32 else best >= 0.93 * exact)
    assert len(tries) <= 13 and len({t.micro_batch_size for t in tries}) == len(tries)


def test_sizes_are_multiples_of_a_mixing_group() -> None:
    tries, exact = searched(100 * MB, 7 * MB, 300 * MB, unit=8)  # 28.6 images
    assert exact == 24 and max(t.micro_batch_size for t in tries if t.fits) == 24


def test_nothing_fits_and_everything_fits() -> None:
    tries, _ = searched(100 * MB, MB, 50 * MB)
    assert not any(t.fits for t in tries) and min(t.micro_batch_size for t in tries) == 1
    tries, _ = searched(100 * MB, 1.0, 200 * MB, most=100)
    assert max(t.micro_batch_size for t in tries if t.fits) == 100


def test_a_memory_with_noise_and_a_flat_beginning_ends_too() -> None:
    def measure(size: int) -> Try:
        peak = max(900 * MB, 500 * MB + size * MB) + (size * 7919 % 13) * MB  # imports cost more than the first 400 images
        return Try(size, peak <= 1200 * MB, peak if peak <= 1200 * MB else None)

    tries = search(measure, start=16, unit=1, most=4096, limit=1200 * MB)
    assert 640 <= max(t.micro_batch_size for t in tries if t.fits) <= 700 and len(tries) <= 14


def found(size: int) -> Found:
    return Found(size, 2 * 10**9, (Try(1, size >= 1, MB), *([Try(size, True, 10**9)] if size > 1 else [])))


def with_phase(**changes: int) -> RunConfig:
    config = get_recipe("tiny")
    return replace(config, end_to_end=replace(config.end_to_end, **changes))


def test_the_overrides_keep_the_images_a_step() -> None:
    config = with_phase(micro_batch_size=48, gradient_accumulation_steps=2)  # 96 images a rank and step
    text = describe(found(40), config, "end_to_end")
    assert "micro_batch_size 40 fits (1.00 of 2.00 GB a rank; 2 tries)" in text
    assert "--set end_to_end.micro_batch_size=32 end_to_end.gradient_accumulation_steps=3" in text  # 32 is the largest divisor below 40
    # The control trains with end_to_end's settings.
    assert "--set end_to_end.micro_batch_size=96 end_to_end.gradient_accumulation_steps=1" in describe(found(500), config, "baseline")
    assert "not even micro_batch_size 1 fits into 2.00 GB a rank" in describe(found(0), config, "end_to_end")
    mixed = replace(config, data=replace(config.data, augment=AugmentConfig(mixup=0.8, mix_group=0)))
    assert "another size means other images" in describe(found(40), mixed, "end_to_end")
    assert (largest_divisor(96, 40, 1), largest_divisor(96, 40, 12), largest_divisor(7, 3, 2)) == (32, 24, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--phase", "split"), "--phase split: only training has batches"),
        (("--phase", "m2mkd", "--headroom", "1"), "--headroom is 1.0"),
        (("--phase", "m2mkd", "--pair", "7"), "--pair 7: there are 2 pairs"),
        (("--phase", "m2mkd", "--most", "1", "--set", "data.augment.mixup=0.8"), "give at least 2: micro-batches"),
    ],
)
def test_questions_without_an_answer_are_refused(m2mkd: Run, words: tuple[str, ...], message: str) -> None:  # noqa: F811
    ended = m2mkd("probe-batch", "--recipe", "tiny", *words)
    assert ended.code == 2 and message in ended.err


def test_what_allocators_say_is_told_from_other_errors() -> None:
    assert ran_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert ran_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"))
    assert not ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_step_is_measured_in_a_child_and_a_small_limit_stops_it() -> None:
    config = get_recipe("tiny")
    measured = _try(config, "m2mkd", "1", 4, 10**10)
    assert measured.fits and measured.peak is not None and 2e8 < measured.peak < 3e9
    assert _try(config, "m2mkd", "1", 4, measured.peak // 2) == Try(4, False, None)


def test_a_step_that_fails_otherwise_says_why() -> None:
    config = get_recipe("tiny")
    config = replace(config, m2mkd=replace(config.m2mkd, ds_config="zero9"))
    with pytest.raises(RuntimeError, match=r"a step of m2mkd with micro_batch_size 4 failed \(exit 1\): (?s:.*)zero9"):
        _try(config, "m2mkd", "1", 4, 10**10)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain_meta", "modular_train", "assemble_finetune", "end_to_end", "baseline"])
def test_every_phase_can_be_tried(name: str) -> None:
    assert _try(get_recipe("tiny"), name, "all", 4, 10**10).fits


@pytest.mark.slow
def test_every_phase_of_a_pretrained_teacher_can_be_tried() -> None:
    config = get_recipe("tiny_pretrained")
    config = replace(config, m2mkd=replace(config.m2mkd, ema_decay=0.9, gradient_accumulation_steps=5))
    for name in ("pretrain_meta", "m2mkd"):
        assert _try(config, name, "all", 4, 10**10).fits


@pytest.mark.slow
def test_a_real_limit_is_kept(tmp_path: Path) -> None:
    """300 MB above what one image takes: many fit, not thousands; twice the answer does not fit."""
    config = get_recipe("tiny")
    alone = _try(config, "end_to_end", "all", 1, 10**10).peak
    assert alone is not None
    limit = alone + 300 * MB
    answer = probe_batch(config, "end_to_end", memory_bytes=limit, headroom=0.0, most=100_000)
    assert answer.limit == limit and 50 < answer.micro_batch_size < 100_000
    assert not _try(config, "end_to_end", "all", 2 * answer.micro_batch_size, limit).fits


def test_config_errors_are_config_errors() -> None:
    with pytest.raises(ConfigError, match="only training has batches"):
        probe_batch(get_recipe("tiny"), "evaluate", memory_bytes=None, headroom=0.1, most=8)


@pytest.mark.parametrize("phase", ["pretrain_meta", "assemble_finetune", "end_to_end", "baseline"])
def test_pairs_of_a_phase_without_pairs_are_refused(m2mkd: Run, phase: str) -> None:  # noqa: F811
    ended = m2mkd("probe-batch", "--recipe", "tiny", "--phase", phase, "--pair", "0", "--most", "1")
    text = f"m2mkd: --pair 0: {phase} has no pairs; leave --pair out, or give --phase modular_train or m2mkd\n"
    assert (ended.code, ended.err) == (2, text)


@pytest.mark.parametrize("number", ["-1", "nan", "inf"])
def test_memory_is_a_number_of_bytes(m2mkd: Run, number: str) -> None:  # noqa: F811
    ended = m2mkd("probe-batch", "--recipe", "tiny", "--phase", "m2mkd", "--memory-gb", number)
    assert ended.code == 2 and f"--memory-gb is {number}; give a number" in ended.err and ended.err.count("\n") == 1
