"""Whether a checkpoint may be gone on from, and going on from it. What its record says is made in `saving.py`.

Must agree: the node's fingerprint (else the checkpoint is set aside), the data stream, the global batch, the schedule and the rule of the
randomness. Only finished optimizer steps count, so images that workers had read ahead, or that were used in an unfinished step, come again.
The number of ranks, micro-batch size, accumulation and ZeRO stage are free; the global batch is not, because a step means its images.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from m2mkd_ds.checkpoint.finished import read_done
from m2mkd_ds.checkpoint.store import StoreError, latest_checkpoint
from m2mkd_ds.config import ConfigError
from m2mkd_ds.distributed.world import World, barrier, broadcast_object
from m2mkd_ds.logs import logger
from m2mkd_ds.train.job import Job, Trainee
from m2mkd_ds.train.nodes import versions
from m2mkd_ds.train.saving import rng_of, schedule_of


def resume(trainee: Trainee, job: Job) -> None:
    """Go on from the newest checkpoint that verifies and belongs to this very node; without one, stay at step 0. Collective.

    Checkpoints of another configuration are set aside. Raises ConfigError, on every rank, for those of a phase that was stopped midway
    on another data stream, or with another global batch; StoreError when all checkpoints are broken.
    """
    # Verifying reads every byte: once, on rank 0, and not by every rank.
    found, problem = broadcast_object(_find(trainee.folder) if job.world.is_main else (None, ""))
    if problem:
        raise StoreError(problem)
    if found is None:
        return
    folder, record, finished = found
    same_node = record["fingerprint"] == trainee.fingerprint
    # Records without a stream are older than this check, and of other nodes.
    if same_node or ("stream" in record and not finished):
        _check_stream(folder, record, job)
    if not same_node:
        aside = _set_aside(folder.parent, job.world)
        logger.warning(
            "%s: %s was made for another configuration or other inputs; starting from step 0; its checkpoints are now in %s",
            trainee.name, folder, aside,
        )  # fmt: skip
        return
    if record["global_batch_size"] != job.global_batch_size:
        raise ConfigError(_other_batch(folder, record["global_batch_size"], job))
    _check_rules(folder, record, trainee, job)
    trainee.engine.load(folder)
    trainee.step = int(record["step"])
    logger.info("%s: resumed from step %d", trainee.name, trainee.step)
    if job.world.is_main:
        _tell_versions(trainee.name, record)


def _find(folder: Path) -> tuple[tuple[Path, dict[str, Any], bool] | None, str]:
    """The newest good checkpoint, its record, and whether the phase that made it was finished: then nothing is lost by another one.

    And why there is none, if all are broken.
    """
    try:
        found = latest_checkpoint(folder / "checkpoints")
        done = read_done(folder)
    except (OSError, StoreError) as err:  # told to all ranks: they wait for the answer
        return None, str(err)
    if found is None:
        return None, ""
    return (*found, done is not None and done["fingerprint"] == found[1]["fingerprint"]), ""


def _check_stream(folder: Path, record: Mapping[str, Any], job: Job) -> None:
    """Other images, another seed or another order are never a reason to begin again in silence."""
    ours = replace(job.stream, position=int(record["step"]) * int(record["global_batch_size"]))
    try:
        ours.check(record.get("stream", {}), str(folder))
    except ValueError as err:
        raise ConfigError(str(err)) from None


def _check_rules(folder: Path, record: Mapping[str, Any], trainee: Trainee, job: Job) -> None:
    """The same settings could mean other learning rates or other randomness in another version of this package."""
    for part, ours in (("schedule", schedule_of(job)), ("rng", rng_of(trainee, job))):
        saved = record.get(part, {})
        for key, value in ours.items():
            if saved.get(key) != value:
                raise ConfigError(
                    f"{folder}: its {part} has {key} {saved.get(key)}, this run has {value}; go on with the version of this package that "
                    f"made it ({record.get('commit', 'unknown')}), or delete {folder.parent} to start the phase again"
                )


def _tell_versions(name: str, record: Mapping[str, Any]) -> None:
    """Other versions may go on; what they compute may differ in the last bits, and somebody may wonder why."""
    saved, ours = record.get("versions", {}), versions()
    changed = [f"{package} {saved.get(package)} -> {ours[package]}" for package in ours if saved.get(package) != ours[package]]
    if changed:
        logger.warning("%s: its checkpoint was made with other versions (%s)", name, ", ".join(changed))


def _other_batch(folder: Path, batch: int, job: Job) -> str:
    """What to do when the product of the three factors is another one than the checkpoint's."""
    # The control run has the batch of end_to_end.
    owner = "end_to_end" if job.phase_name == "baseline" else job.phase_name
    layout = job.layout
    a_step, a_rank = layout.micro_batch_size * layout.world, layout.micro_batch_size * layout.accumulation
    ways = [f"--set {owner}.gradient_accumulation_steps={batch // a_step}"] if batch % a_step == 0 else []
    ways += [f"launch with {batch // a_rank} ranks"] if batch % a_rank == 0 else []
    advice = f" ({' or '.join(ways)})" if ways else ""
    return (
        f"{folder} was made with a global batch of {batch} and this launch has {layout.global_batch} = {owner}.micro_batch_size "
        f"{layout.micro_batch_size} x {owner}.gradient_accumulation_steps {layout.accumulation} x {layout.world} ranks: make the "
        f"product {batch}{advice}, or delete {folder.parent} to start the phase again"
    )


def _set_aside(checkpoints: Path, world: World) -> Path:
    """Rename outdated checkpoints, so that nothing is lost and none of them is taken for one of this run. Returns their new folder.

    What was set aside before stays: whoever corrects a mistaken setting sets those of the mistake aside, and wants the others back.
    """
    barrier()  # every rank has read the record by now
    aside = checkpoints
    if world.is_main:
        name = f"{checkpoints.name}.outdated"
        names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        aside = next(path for path in map(checkpoints.with_name, names) if not path.exists())
        checkpoints.rename(aside)
    return Path(broadcast_object(str(aside), what="checkpoints set aside"))
