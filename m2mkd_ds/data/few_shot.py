"""Few-shot episodes: k classes, n support images of each to learn from, other images of the same classes to be asked about.

    shards (one set, or one for support and one for queries) + seed + episode number -> Episode -> images

An episode is a pure function of (seed, number, index contents): every model that is compared gets the same ones, on any number of ranks.
PAPER: the authors' "15 validation images a class" at 5 shots (and 3 at 1 shot) are three times the shots, so that is the default here.
PAPER: their CIFAR-100 code drew both sets from the training split by the same permutation, so all support images were asked about again,
and with seed 0 both sets had different classes. Here both sets have the same classes and share no image: neither by number nor by
content, because an image whose bytes occur several times is used in one place only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from m2mkd_ds.config import DataConfig
from m2mkd_ds.data.errors import SampleError, ShardError
from m2mkd_ds.data.index import ShardIndex
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.loader import decode
from m2mkd_ds.data.pil_transforms import ImageTransform, eval_transform, train_transform

QUERIES_PER_SHOT = 3
_STREAM = 1 << 32
"""Counter block of the first Philox stream of an episode, away from those that order training."""


@dataclass(frozen=True)
class EpisodeShape:
    """How large an episode is."""

    ways: int = 8
    """k, classes."""
    shots: int = 5
    """n, support images of each class."""
    queries: int = 0
    """Query images of each class; 0: three times the shots."""

    def __post_init__(self) -> None:
        if self.ways < 2 or self.shots < 1 or self.queries < 0:
            raise ValueError(
                f"ways is {self.ways}, shots is {self.shots}, queries is {self.queries}: an episode needs at least 2 ways and 1 shot, "
                "and queries 0 means three times the shots"
            )

    @property
    def num_queries(self) -> int:
        """Query images of each class."""
        return self.queries or QUERIES_PER_SHOT * self.shots


@dataclass(frozen=True)
class Episode:
    """One task. Images are listed class by class; an image's label in the episode is the place of its class in `classes`."""

    number: int
    classes: tuple[int, ...]
    """Class numbers of the shards; their order is the episode's labels."""
    support: tuple[int, ...]
    """Sample numbers in the support shards, `shots` of each class."""
    query: tuple[int, ...]
    """Sample numbers in the query shards, `num_queries` of each class."""

    @property
    def support_labels(self) -> tuple[int, ...]:
        """Episode label, 0 .. ways - 1, of every support image."""
        return _labels(len(self.classes), len(self.support))

    @property
    def query_labels(self) -> tuple[int, ...]:
        """Episode label of every query image."""
        return _labels(len(self.classes), len(self.query))


def _labels(ways: int, count: int) -> tuple[int, ...]:
    return tuple(i // (count // ways) for i in range(count))


class EpisodeSampler:
    """Draws episodes from one set of shards, or support from one and queries from another (train and validation, say).

    Raises ShardError when classes differ or are too few, or when a class has too few images; classes of which the shards hold no
    image at all are not drawn. ValueError for a negative seed.
    """

    def __init__(self, support: ShardIndex, query: ShardIndex | None, shape: EpisodeShape, seed: int) -> None:
        if seed < 0:
            raise ValueError(f"seed is {seed}; it must not be negative")
        self.shape, self.seed, self.support = shape, seed, support
        # The same shards twice are one set: then the images of a class are shared out between support and queries.
        self.one_set = query is None or query.fingerprint == support.fingerprint
        self.query = support if query is None or self.one_set else query
        _check_same_classes(self.support, self.query)
        self._support_keys, self._query_keys = _content_keys(self.support), _content_keys(self.query)
        support_ids = _first_occurrences(self._support_keys)
        query_ids = support_ids
        if not self.one_set:
            query_ids = _first_occurrences(self._query_keys)
            query_ids = query_ids[~np.isin(self._query_keys[query_ids], self._support_keys)]
        self.repeated_images = len(self.support) - len(support_ids) + (0 if self.one_set else len(self.query) - len(query_ids))
        """Images that are never drawn, because the same bytes lie elsewhere in the shards."""
        self._support_pools = _pools(self.support, support_ids)
        self._query_pools = _pools(self.query, query_ids)
        present = set(self.support.labels_N.tolist()) | set(self.query.labels_N.tolist())
        self.classes = tuple(sorted(present))
        """Classes that an episode may have."""
        self._check_enough()

    def _check_enough(self) -> None:
        shape = self.shape
        if len(self.classes) < shape.ways:
            raise ShardError(
                f"{self.support.folder}: {len(self.classes)} classes have images, and {shape.ways} ways need as many; lower ways"
            )
        needs = [(self.support, self._support_pools, shape.shots, f"{shape.shots} support")]
        if self.one_set:
            total = shape.shots + shape.num_queries
            needs = [(self.support, self._support_pools, total, f"{shape.shots} support + {shape.num_queries} query = {total}")]
        else:
            needs.append((self.query, self._query_pools, shape.num_queries, f"{shape.num_queries} query"))
        for index, pools, needed, spelt in needs:
            short = [number for number in self.classes if len(pools[number]) < needed]
            if short:
                number = short[0]
                others = f" ({len(short) - 1} more classes have too few)" if len(short) > 1 else ""
                raise ShardError(
                    f"{index.folder}: class {number} ({index.class_names[number]}) has {len(pools[number])} different images, and an "
                    f"episode needs {spelt} images of a class{others}; lower shots or queries, or give shards with more images"
                )

    def episode(self, number: int) -> Episode:
        """Episode `number`, counted from 0."""
        shape = self.shape
        order = self._shuffled(number, 0, np.asarray(self.classes))
        classes = tuple(int(c) for c in order[: shape.ways])
        support: list[int] = []
        query: list[int] = []
        for label in classes:
            mine = self._shuffled(number, 1 + 2 * label, self._support_pools[label])
            support += mine[: shape.shots].tolist()
            rest = mine[shape.shots :] if self.one_set else self._shuffled(number, 2 + 2 * label, self._query_pools[label])
            query += rest[: shape.num_queries].tolist()
        # Stands in front of every evaluation: no query image is one that was learnt from.
        assert not np.isin(self._query_keys[query], self._support_keys[support]).any(), (
            f"episode {number}: a support image is also asked about"
        )
        return Episode(number, classes, tuple(support), tuple(query))

    def _shuffled(self, number: int, stream: int, values: np.ndarray) -> np.ndarray:
        """`values` in the order of raw Philox words: numpy promises those for ever, and makes no such promise for `shuffle`."""
        key = np.array([self.seed % 2**64, number], dtype=np.uint64)
        words = np.random.Philox(key=key, counter=[0, 0, 0, _STREAM + stream]).random_raw(len(values))
        return values[np.argsort(words, kind="stable")]


def _check_same_classes(support: ShardIndex, query: ShardIndex) -> None:
    ours, theirs = support.class_names, query.class_names
    if len(ours) != len(theirs):
        raise ShardError(
            f"{support.folder} has {len(ours)} classes and {query.folder} has {len(theirs)}; both need the same list of classes"
        )
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine != other:
            raise ShardError(
                f"class {number} is {mine!r} in {support.folder} and {other!r} in {query.folder}; both need the same list of classes"
            )


def _content_keys(index: ShardIndex) -> np.ndarray:
    """uint64 [N]: size and crc32 of every image. Equal images have equal keys; an unlucky pair of others is merely not drawn."""
    return (index.table["size"].astype(np.uint64) << np.uint64(32)) | index.table["crc32"].astype(np.uint64)


def _first_occurrences(keys_N: np.ndarray) -> np.ndarray:
    """Ascending sample numbers, one for each content."""
    return np.sort(np.unique(keys_N, return_index=True)[1])


def _pools(index: ShardIndex, ids: np.ndarray) -> dict[int, np.ndarray]:
    """Sample numbers by class, ascending."""
    labels = index.labels_N[ids]
    return {number: ids[labels == number] for number in range(index.num_classes)}


class EpisodeImages:
    """Pixels of an episode under one model's preprocessing; images are decoded once, by timm's own transform."""

    def __init__(self, sampler: EpisodeSampler, data: DataConfig) -> None:
        self._sampler = sampler
        data = replace(data, decode="pil")
        self._eval: ImageTransform = eval_transform(data)
        self._train: ImageTransform = train_transform(data)

    def decode(self, index: ShardIndex, episode: Episode, samples: Sequence[int]) -> list[Image.Image]:
        """The images. Raises SampleError for a damaged one, or for one whose label is not that of the episode."""
        images = []
        for sample, label in zip(samples, _labels(len(episode.classes), len(samples)), strict=True):
            image, found = decode(index, sample)
            if found != episode.classes[label]:
                raise SampleError(f"{index.describe(sample)}: label {found}, expected {episode.classes[label]}", "bad_label")
            images.append(image)
        return images

    def support(self, episode: Episode) -> list[Image.Image]:
        """Decoded support images, for `plain` or `augmented`."""
        return self.decode(self._sampler.support, episode, episode.support)

    def query(self, episode: Episode) -> list[Image.Image]:
        """Decoded query images, for `plain`."""
        return self.decode(self._sampler.query, episode, episode.query)

    def plain(self, images: Sequence[Image.Image]) -> Tensor:
        """float32 [B, 3, S, S] by the evaluation transform."""
        return torch.stack([self._eval(image) for image in images])

    def augmented(self, images: Sequence[Image.Image], episode: Episode, step: int) -> Tensor:
        """float32 [B, 3, S, S] by the training transform, a function of (seed, episode, step, place)."""
        pixels = []
        with KeyedRandom() as keyed:
            for place, image in enumerate(images):
                keyed.seed("few_shot", self._sampler.seed, episode.number, step, place)
                pixels.append(self._train(image))
        return torch.stack(pixels)
