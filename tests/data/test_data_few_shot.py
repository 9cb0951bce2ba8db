"""Episodes: the same classes on both sides, no image on both sides, a pure function of (seed, number, index)."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m2mkd_ds.data.errors import ShardError
from m2mkd_ds.data.few_shot import EpisodeImages, EpisodeSampler, EpisodeShape
from m2mkd_ds.data.index import ShardIndex, table_dtype
from m2mkd_ds.data.shard_files import Access
from m2mkd_ds.recipes.tiny import tiny


def index_of(labels: Sequence[int], contents: Sequence[int], *, fingerprint: str = "a", num_classes: int = 0) -> ShardIndex:
    """An index whose image i has the label labels[i]; equal numbers in `contents` stand for equal bytes."""
    table = np.zeros(len(labels), dtype=table_dtype(8))
    table["label"], table["crc32"], table["size"] = labels, contents, 100
    classes = [f"class {i}" for i in range(num_classes or max(labels, default=-1) + 1)]
    tree = {"shards": [], "class_names": classes, "fingerprint": fingerprint, "source": "", "license": "", "request": {}}
    return ShardIndex(Path("made/up"), tree, table, Access())


@st.composite
def cases(draw: st.DrawFn) -> tuple[ShardIndex, ShardIndex | None, EpisodeShape, int]:
    """Shards with enough different images, in random order, some of them several times, also across the two sets."""
    shape = EpisodeShape(draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 4)))
    two_sets = draw(st.booleans())
    num_classes = draw(st.integers(shape.ways, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    sides: list[list[tuple[int, int]]] = [[], []]
    content = 0
    for label in range(num_classes):
        for side, needed in enumerate((shape.shots, shape.num_queries)):
            for _ in range(needed + draw(st.integers(0, 3))):
                sides[side if two_sets else 0].append((label, content))
                content += 1
    for _ in range(draw(st.integers(0, 6))):  # repeated bytes; a copy among the queries makes none of them scarce
        copied = sides[0][rng.integers(len(sides[0]))]
        sides[rng.integers(2) if two_sets else 0].append(copied)
    indices = []
    for side, rows in enumerate(sides[: 1 + two_sets]):
        order = rng.permutation(len(rows))
        labels, contents = zip(*(rows[i] for i in order), strict=True)
        indices.append(index_of(labels, contents, fingerprint=str(side), num_classes=num_classes))
    return indices[0], indices[1] if two_sets else None, shape, draw(st.integers(0, 2**70))


@settings(max_examples=150, deadline=None)
@given(cases(), st.integers(0, 10**6))
def test_an_episode_has_what_it_says_and_shares_no_image(
    case: tuple[ShardIndex, ShardIndex | None, EpisodeShape, int], number: int
) -> None:
    support, query, shape, seed = case
    asked = support if query is None else query
    episode = EpisodeSampler(support, query, shape, seed).episode(number)
    assert len(set(episode.classes)) == shape.ways
    # Counted from the table, class by class: n support and q query images of each of the k classes, of no other.
    assert Counter(support.labels_N[list(episode.support)].tolist()) == {c: shape.shots for c in episode.classes}
    assert Counter(asked.labels_N[list(episode.query)].tolist()) == {c: shape.num_queries for c in episode.classes}
    for label, sample in zip(episode.support_labels, episode.support, strict=True):
        assert support.labels_N[sample] == episode.classes[label]
    for label, sample in zip(episode.query_labels, episode.query, strict=True):
        assert asked.labels_N[sample] == episode.classes[label]
    learnt = [int(support.table["crc32"][i]) for i in episode.support]
    questions = [int(asked.table["crc32"][i]) for i in episode.query]
    assert len(set(learnt + questions)) == len(learnt) + len(questions)  # by content, so by number too
    # Pure: another sampler, with other episodes drawn before, gives the same.
    again = EpisodeSampler(support, query, shape, seed)
    again.episode(number + 1)
    assert again.episode(number) == episode


def test_queries_are_three_times_the_shots() -> None:
    # The paper: 15 images a class at 5 shots, 3 at 1 shot.
    assert [EpisodeShape(8, shots).num_queries for shots in (5, 1)] == [15, 3]
    assert EpisodeShape(8, 5, 7).num_queries == 7


def test_seeds_and_numbers_give_other_episodes() -> None:
    index = index_of([i % 4 for i in range(80)], range(80))
    sampler = EpisodeSampler(index, None, EpisodeShape(3, 2), 0)
    drawn = {sampler.episode(number) for number in range(50)}
    assert len({(episode.classes, episode.support) for episode in drawn}) == 50
    assert EpisodeSampler(index, None, EpisodeShape(3, 2), 1).episode(0).support != sampler.episode(0).support


def test_every_class_and_image_is_drawn_equally_often() -> None:
    index = index_of([i % 5 for i in range(50)], range(50))
    sampler = EpisodeSampler(index, None, EpisodeShape(2, 1, 1), 7)
    episodes = [sampler.episode(number) for number in range(3000)]
    classes = Counter(c for e in episodes for c in e.classes)
    images = Counter(i for e in episodes for i in e.support)
    # Class: 2 of 5, so 1200 of 3000, sigma = sqrt(3000 * .4 * .6) = 26.8. Support image: .4 / 10, so 120, sigma 10.7.
    assert all(abs(classes[c] - 1200) < 5 * 26.8 for c in range(5))
    assert all(abs(images[i] - 120) < 5 * 10.7 for i in range(50))


def test_the_same_shards_twice_are_shared_out_and_not_asked_again() -> None:
    index = index_of([0] * 4 + [1] * 4, range(8))
    episode = EpisodeSampler(index, index, EpisodeShape(2, 1, 3), 0).episode(0)
    assert sorted(episode.support + episode.query) == list(range(8))


def test_images_that_repeat_are_drawn_once_and_counted() -> None:
    # Class 0 holds contents 0 0 1, class 1 holds 2 3 3; the query shards repeat content 0 and 3 and bring 4 and 5.
    support = index_of([0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 3, 3])
    query = index_of([0, 0, 1, 1], [0, 4, 3, 5], fingerprint="b")
    sampler = EpisodeSampler(support, query, EpisodeShape(2, 2, 1), 0)
    assert sampler.repeated_images == 4  # one 0 and one 3 of the support shards, 0 and 3 of the query shards
    episode = sampler.episode(0)
    assert set(episode.query) == {1, 3}
    assert set(episode.support) == {0, 2, 3, 4}


def test_classes_without_any_image_are_not_drawn() -> None:
    index = index_of([1] * 4 + [3] * 4, range(8), num_classes=6)
    assert EpisodeSampler(index, None, EpisodeShape(2, 1, 1), 0).classes == (1, 3)


def test_too_few_images_name_the_class_and_the_need() -> None:
    # Class 1 has 5 rows and 4 different images; 2 + 3 = 5 are needed.
    one = index_of([0] * 5 + [1] * 5, [0, 1, 2, 3, 4, 5, 6, 7, 8, 8])
    with pytest.raises(ShardError, match=r"class 1 \(class 1\) has 4 different images, and an episode needs 2 support \+ 3 query = 5"):
        EpisodeSampler(one, None, EpisodeShape(2, 2, 3), 0)
    EpisodeSampler(one, None, EpisodeShape(2, 2, 2), 0)  # exactly enough
    few = index_of([0, 1], [90, 91], fingerprint="b")
    with pytest.raises(ShardError, match=r"class 0 .* has 1 different images, .* needs 2 query images of a class \(1 more classes"):
        EpisodeSampler(one, few, EpisodeShape(2, 2, 2), 0)
    with pytest.raises(ShardError, match="2 classes have images, and 3 ways need as many"):
        EpisodeSampler(one, None, EpisodeShape(3, 1, 1), 0)


def test_other_class_lists_and_impossible_shapes_are_refused() -> None:
    one, other = index_of([0, 1], [0, 1]), index_of([0, 1, 2], [2, 3, 4], fingerprint="b")
    with pytest.raises(ShardError, match="has 2 classes and .* has 3"):
        EpisodeSampler(one, other, EpisodeShape(2, 1, 1), 0)
    renamed = index_of([0, 1], [2, 3], fingerprint="b")
    renamed.class_names = ("class 0", "dog")
    with pytest.raises(ShardError, match="class 1 is 'class 1' in .* and 'dog' in"):
        EpisodeSampler(one, renamed, EpisodeShape(2, 1, 1), 0)
    with pytest.raises(ValueError, match="seed is -1"):
        EpisodeSampler(one, None, EpisodeShape(2, 1, 0), -1)
    for shape in ((1, 1, 0), (2, 0, 0), (2, 1, -1)):
        with pytest.raises(ValueError, match="at least 2 ways and 1 shot"):
            EpisodeShape(*shape)


@pytest.mark.parametrize("two_sets", [False, True])
def test_real_bytes_of_queries_never_lie_in_the_support(digits_train: ShardIndex, digits_validation: ShardIndex, two_sets: bool) -> None:
    query = digits_validation if two_sets else None
    sampler = EpisodeSampler(digits_train, query, EpisodeShape(8, 5), 1)
    for number in range(20):
        episode = sampler.episode(number)
        learnt = {hashlib.sha256(digits_train.read(i)[0]).digest() for i in episode.support}
        asked = {hashlib.sha256(sampler.query.read(i)[0]).digest() for i in episode.query}
        assert (len(learnt), len(asked)) == (40, 120)
        assert not learnt & asked


def test_pixels_are_those_of_the_transforms(digits_train: ShardIndex) -> None:
    sampler = EpisodeSampler(digits_train, None, EpisodeShape(3, 2), 0)
    images, episode = EpisodeImages(sampler, tiny().data), sampler.episode(4)
    decoded = images.support(episode)
    plain = images.plain(decoded)
    assert plain.shape == (6, 3, 16, 16)
    state = torch.random.get_rng_state()
    first, again, later = (images.augmented(decoded, episode, step) for step in (0, 0, 1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert not torch.equal(first, plain)
    # One place's pixels do not depend on the company.
    assert torch.equal(images.augmented(decoded[:2], episode, 0), first[:2])
