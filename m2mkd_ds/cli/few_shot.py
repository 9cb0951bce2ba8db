"""`m2mkd few-shot`: how well models learn new tasks from a handful of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from m2mkd_ds.cli.app import app, in_world
from m2mkd_ds.config import ConfigError, load
from m2mkd_ds.logs import setup_logging
from m2mkd_ds.train.few_shot.config import FitConfig

if TYPE_CHECKING:
    from m2mkd_ds.distributed.world import World

Models = Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(name="model", metavar="NAME")]


# `help` is what `m2mkd --help` lists; `main` sends the verb's own words past it, so that its --help says everything.
@app.command(name="few-shot", help="Measure how well models learn new classes from a few images of each.")
def few_shot(
    path: tyro.conf.Positional[Path],
    /,
    *,
    support: str = "",
    query: str = "",
    model: Models = (),
    ways: int = 8,
    shots: int = 5,
    queries: int = 0,
    episodes: int = 100,
    seed: int = 0,
    name: str = "",
    out_dir: Annotated[Path | None, tyro.conf.arg(name="out")] = None,
    fit: tyro.conf.OmitArgPrefixes[FitConfig],
) -> None:
    """Few-shot learning: in each of many episodes, learn some classes from a few images of each, then name other images of them.

    The final student against the same model from scratch, on the run's own shards: m2mkd few-shot RUN

    Classes that the run has not seen: m2mkd few-shot RUN --support data/cub/train --query data/cub/validation

    The whole model instead of a new head: m2mkd few-shot RUN --protocol finetune --ways 5 --shots 1

    An exported folder, shared out over two ranks: deepspeed --num_gpus 2 --module m2mkd_ds few-shot EXPORT --support SHARDS

    All models get the same episodes, so differences between them are paired. Support and query images have the same classes and are never
    the same image. Episodes depend on --seed and the shards only; a stopped job goes on by the same command, with any number of ranks.

    Args:
        path: Run folder (holds config.yaml), or an exported Hugging Face folder (holds config.json).
        support: Shards to draw support images from; by default the run's own: support from its training images, queries from its
            validation images. Then they are images of classes that the trunk knows. Needed for an exported folder.
        query: Shards to draw query images from; without it, they are other images of --support.
        model: student, baseline (the student from scratch), student_cold (just assembled) or teacher; repeat it for several. Differences
            are those of the first minus each other. By default student and, where the run has one, baseline.
        ways: Classes of an episode.
        shots: Support images of each class.
        queries: Query images of each class; 0: three times the shots, as in the paper.
        episodes: How many; more than a finished job's adds to them.
        seed: Which episodes are drawn, and where heads start.
        name: Subfolder for the results; by default made of protocol, ways and shots, such as linear_8way_5shot.
        out_dir: Folder that holds the subfolder; by default RUN/few_shot, or EXPORT_few_shot beside an exported folder.
        fit: How an episode is learnt.
    """
    from m2mkd_ds.data.few_shot import EpisodeShape

    setup_logging()
    fit.check()
    if episodes < 1:
        raise ConfigError(f"--episodes is {episodes}; it must be at least 1")
    shape = EpisodeShape(ways, shots, queries)
    is_run = (path / "config.yaml").is_file()
    if query and not support:
        raise ConfigError("--query needs --support: give both folders, or none for the run's own shards")
    if not is_run and not support:
        raise ConfigError(f"{path}: few-shot on an exported folder needs --support SHARDS (a folder or URL with index.json)")
    if is_run and not support:
        data = load(path / "config.yaml").data
        support, query = data.train, data.validation
    home = out_dir or (path / "few_shot" if is_run else path.resolve().with_name(f"{path.resolve().name}_few_shot"))
    folder = home / (name or f"{fit.protocol}_{ways}way_{shots}shot")

    def work(world: World) -> str:
        from m2mkd_ds.data.few_shot import EpisodeSampler
        from m2mkd_ds.data.index import ShardIndex
        from m2mkd_ds.data.shard_files import Access
        from m2mkd_ds.report.few_shot import format_few_shot
        from m2mkd_ds.train.few_shot.models import check_names, open_candidates
        from m2mkd_ds.train.few_shot.run import run_few_shot

        check_names(model)
        access = Access.from_config(load(path / "config.yaml").data) if is_run else Access()
        indices = [ShardIndex.load(address, access) for address in (support, query) if address]
        # Draws nothing yet, but refuses shards with too few images before weights are read.
        sampler = EpisodeSampler(indices[0], indices[1] if query else None, shape, seed)
        candidates = open_candidates(path, model, ways, fit.drop_path, world.device)
        result = run_few_shot(candidates, sampler, fit, episodes=episodes, folder=folder, world=world)
        return f"{format_few_shot(result)}\n{folder / 'result.json'}"

    in_world(work)
