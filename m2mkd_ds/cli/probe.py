"""`m2mkd probe-batch`: how many images fit into a step here."""

from __future__ import annotations

from math import inf
from pathlib import Path

from m2mkd_ds.cli.app import Overrides, app, out
from m2mkd_ds.cli.resolve import resolve
from m2mkd_ds.config import ConfigError
from m2mkd_ds.logs import setup_logging


@app.command(name="probe-batch", help="Find the largest micro-batch of a phase that fits into memory here.")
def probe_batch(
    *,
    phase: str,
    config: Path | None = None,
    recipe: str = "",
    run_dir: str = "",
    pair: str = "all",
    memory_gb: float = 0.0,
    headroom: float = 0.1,
    most: int = 4096,
    set: Overrides = (),
) -> None:
    """Find the largest micro-batch of a phase that fits into memory here, by running its real step with fresh weights on one rank.

    m2mkd probe-batch --recipe vmoe_base_in1k --phase m2mkd

    Needs neither data nor finished phases. Several ranks with ZeRO, or experts spread over ranks, need less than one rank does.

    Args:
        phase: pretrain_meta | modular_train | assemble_finetune | m2mkd | end_to_end | baseline.
        config: Resolved config of a run (RUN/config.yaml). This or --recipe.
        recipe: Name of a recipe (see `m2mkd recipes`).
        run_dir: Run folder; nothing is written to it.
        pair: For modular_train and m2mkd: `all` pairs in one job, or numbers such as 0,2.
        memory_gb: What a rank may use, in GB of 10^9 bytes; 0: what is free now (of the GPU, else of the host).
        headroom: Share of that memory that stays free.
        most: Largest micro-batch to try.
        set: Override config fields.
    """
    from m2mkd_ds.train.probe_batch import describe
    from m2mkd_ds.train.probe_batch import probe_batch as probe

    setup_logging()
    if not 0 <= memory_gb < inf:
        raise ConfigError(f"--memory-gb is {memory_gb:g}; give a number of 10^9 bytes above 0, or 0 for what is free now")
    resolved = resolve(config, recipe, run_dir, set)
    limit = int(memory_gb * 1e9) if memory_gb else None
    found = probe(resolved, phase, memory_bytes=limit, headroom=headroom, most=most, pairs=pair)
    out(describe(found, resolved, phase))
    if not found.micro_batch_size:
        raise SystemExit(1)
