"""`m2mkd few-shot`: play many episodes with every model, and say how well each learns from a handful of images.

    FOLDER/settings.json            what the episodes below were played with; written first
    FOLDER/episodes.jsonl           a line an episode: classes, and the number of right answers of each model
    FOLDER/episodes.RANK.jsonl      lines of a job that is running or was stopped; the next start takes them over
    FOLDER/result.json              means, intervals, paired differences; written last

Episodes do not depend on one another: rank r plays every world-th one of those that are left. All models get the same images and the
same start of the head, so their differences are paired. Nothing depends on the number of ranks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from m2mkd_ds.checkpoint.atomic import file_sha256, read_json, replacing, write_json_atomic
from m2mkd_ds.config import ConfigError
from m2mkd_ds.data.few_shot import Episode, EpisodeImages, EpisodeSampler
from m2mkd_ds.distributed.world import World, barrier, broadcast_object, gather_object
from m2mkd_ds.logs import logger, progress, read_metrics
from m2mkd_ds.train.few_shot.config import FitConfig
from m2mkd_ds.train.few_shot.fit import finetune, fit_linear, num_correct, outputs
from m2mkd_ds.train.few_shot.models import Candidate
from m2mkd_ds.train.few_shot.stats import mean_interval

Record = dict[str, Any]
"""{"episode": number, "classes": [...], "queries": asked, "correct": {model: right}}."""


def run_few_shot(
    candidates: Sequence[Candidate], sampler: EpisodeSampler, fit: FitConfig, *, episodes: int, folder: Path, world: World
) -> dict[str, Any]:
    """Play episodes 0 .. episodes - 1 (those that `folder` holds already are kept) and return the content of result.json.

    Collective. Raises ConfigError when `folder` holds episodes of other settings, SampleError for a damaged image.
    """
    settings = broadcast_object(_settings(candidates, sampler, fit) if world.is_main else None)
    _check_settings(folder, settings)
    if sampler.repeated_images and world.is_main:
        logger.info("few-shot: %d images are not drawn, because the shards hold the same bytes elsewhere", sampler.repeated_images)
    barrier()
    kept = broadcast_object(_take_over(folder, settings) if world.is_main else None)
    todo = [number for number in range(episodes) if number not in kept]
    mine = todo[world.rank :: world.size]
    with (folder / f"episodes.{world.rank}.jsonl").open("a") as file:
        played = play(candidates, sampler, fit, mine, world.device)
        new = [_append(file, record) for record in progress(played, total=len(mine), what="few-shot", enabled=world.is_main)]
    records = {**kept, **{record["episode"]: record for records in gather_object(new) for record in records}}
    result = {**settings, **summarise([records[number] for number in range(episodes)], [c.name for c in candidates])}
    if world.is_main:
        _take_over(folder, settings)
        write_json_atomic(folder / "result.json", result)
    barrier()
    return result


def play(
    candidates: Sequence[Candidate], sampler: EpisodeSampler, fit: FitConfig, numbers: Iterable[int], device: torch.device
) -> Iterator[Record]:
    """Play the episodes `numbers` one after the other with all models. No collective."""
    images = {candidate.data: EpisodeImages(sampler, candidate.data) for candidate in candidates}
    for number in numbers:
        episode = sampler.episode(number)
        correct: dict[str, int] = {}
        for data, group in groupby(candidates, key=lambda candidate: candidate.data):
            correct |= _play_episode(list(group), images[data], episode, fit, sampler.seed, device)
        yield {"episode": number, "classes": list(episode.classes), "queries": len(episode.query), "correct": correct}


def _play_episode(
    candidates: Sequence[Candidate], images: EpisodeImages, episode: Episode, fit: FitConfig, seed: int, device: torch.device
) -> dict[str, int]:
    """Right answers by model, for models that see the same pixels."""
    ways, key = len(episode.classes), (seed, episode.number)
    decoded = images.support(episode)
    support_BCHW, query_BCHW = images.plain(decoded).to(device), images.plain(images.query(episode)).to(device)
    support_B, query_B = (torch.tensor(labels, device=device) for labels in (episode.support_labels, episode.query_labels))

    def inputs(step: int) -> Tensor:
        return images.augmented(decoded, episode, step).to(device) if fit.augment else support_BCHW

    correct = {}
    for candidate in candidates:
        if fit.protocol == "linear":
            # Apart, because a router with capacity lets images of one batch compete: the support must not know the queries.
            trunk = candidate.trunk()
            head = fit_linear(outputs(trunk, support_BCHW), support_B, ways, fit, *key)
            logits_BV = outputs(head, outputs(trunk, query_BCHW))
        else:
            logits_BV = outputs(finetune(candidate.model, inputs, support_B, ways, fit, *key), query_BCHW)
        correct[candidate.name] = num_correct(logits_BV, query_B)
    return correct


def summarise(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Mean accuracy and 95 % t interval of each model over the episodes; those of the first minus each other, episode by episode."""
    accuracy = {name: [record["correct"][name] / record["queries"] for record in records] for name in names}
    models = {}
    for name in names:
        mean, interval = mean_interval(accuracy[name])
        models[name] = {"accuracy": mean, "ci": interval, "lowest": min(accuracy[name]), "highest": max(accuracy[name])}
    differences = {}
    for other in names[1:]:
        pairs = zip(accuracy[names[0]], accuracy[other], strict=True)
        mean, interval = mean_interval([mine - theirs for mine, theirs in pairs])
        differences[f"{names[0]}_minus_{other}"] = {"accuracy": mean, "ci": interval}
    return {"episodes": len(records), "interval": "95 % Student's t over episodes", "models": models, "differences": differences}


def _settings(candidates: Sequence[Candidate], sampler: EpisodeSampler, fit: FitConfig) -> dict[str, Any]:
    """Everything that the episodes depend on, as plain data; equal settings give equal episodes."""
    shape = sampler.shape
    return {
        "ways": shape.ways,
        "shots": shape.shots,
        "queries": shape.num_queries,
        "seed": sampler.seed,
        "chance": 1 / shape.ways,
        "support": sampler.support.fingerprint,
        "query": sampler.query.fingerprint,
        "fit": {**asdict(fit), "lr": fit.peak},
        "weights": {c.name: [file_sha256(file) for file in c.files] for c in candidates},
        "preprocessing": {
            c.name: {key: asdict(c.data)[key] for key in ("image_size", "mean", "std", "interpolation", "crop_pct")}
            | ({"augment": asdict(c.data.augment)} if fit.augment else {})
            for c in candidates
        },
    }


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Every rank reads the same file, so all of them stop or none."""
    file = folder / "settings.json"
    if file.is_file():
        # Through JSON, so that tuples and lists are the same.
        found, wanted = read_json(file, if_damaged=f"give another --name, or delete {folder}"), json.loads(json.dumps(settings))
        wrong = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
        if wrong:
            told = ", ".join(f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in wrong)
            raise ConfigError(f"{folder} holds episodes of other settings ({told}); give another --name, or delete the folder")


def _take_over(folder: Path, settings: Mapping[str, Any]) -> dict[int, Record]:
    """Put the lines of all ranks into episodes.jsonl, in order, and remove their files. A line cut by a kill is played again."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.json").is_file():
        write_json_atomic(folder / "settings.json", settings)
    whole, parts = folder / "episodes.jsonl", sorted(folder.glob("episodes.*.jsonl"))
    records = {record["episode"]: record for file in (whole, *parts) for record in read_metrics(file)}
    if parts:
        with replacing(whole) as temporary:
            temporary.write_text("".join(json.dumps(records[number]) + "\n" for number in sorted(records)))
    for part in parts:
        part.unlink()
    return records


def _append(file: Any, record: Record) -> Record:
    """One line, on disk before the next episode begins."""
    file.write(json.dumps(record) + "\n")
    file.flush()
    os.fsync(file.fileno())
    return record
