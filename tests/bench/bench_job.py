"""Two ranks: DeepSpeed's layer with its experts shared out, the exchange, then both levels measured; called by the launcher."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from m2mkd_ds.bench.cases import Case
from m2mkd_ds.bench.exchange import bytes_of, exchange_case
from m2mkd_ds.bench.experts import run_experts
from m2mkd_ds.bench.options import ExpertBench
from m2mkd_ds.bench.workload import make_workload
from m2mkd_ds.cli import main
from m2mkd_ds.distributed.external.canonical import LayerShape, matching_router
from m2mkd_ds.distributed.external.deepspeed_moe import DeepSpeedMoE
from m2mkd_ds.distributed.world import World, gather_object, init_world, shutdown
from m2mkd_ds.moe.layer import MoELayer

OPTIONS = ExpertBench(tokens=24, dim=16, hidden=16, experts=4, routing=("zipf",), iters=3)


def shared_out(world: World) -> dict[str, object]:
    """DeepSpeed's layer over two ranks against ours on each rank's own tokens."""
    shape = LayerShape(dim=16, hidden=8, num_experts=4, top_k=2)
    ours = MoELayer(16, 8, 4, matching_router(2), "reference", generator=torch.Generator().manual_seed(5))
    layer = DeepSpeedMoE(shape, ep_size=world.size)
    layer.load_canonical(ours.state_dict())
    back = layer.to_canonical()
    x_BLD = torch.randn(2, 5 + world.rank, 16, generator=torch.Generator().manual_seed(world.rank))
    with torch.no_grad():
        difference = float((layer(x_BLD)[0] - ours(x_BLD)[0]).abs().max())
    return {
        "local_experts": layer.moe.num_local_experts,
        "first_expert": layer.first_expert,
        "same": all(torch.equal(back[name], tensor) for name, tensor in ours.state_dict().items()),
        "difference": difference,
    }


def there_and_back(world: World) -> dict[str, object]:
    """What the exchange gives back, and its gradient."""
    work = make_workload(OPTIONS, "zipf", rank=world.rank, device=world.device, dtype=torch.float32)
    case = exchange_case(work, world)
    assert isinstance(case, Case)
    output = case.forward().output
    case.backward(output)
    return {
        "load": work.load,
        "rows_return": torch.equal(output, work.rows_RD),
        "gradients_return": torch.equal(case.leaves[0].grad, work.grad_RD),
        "bytes": bytes_of(work, world),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[-1])  # the launcher puts --local_rank before it
    job = init_world()
    facts = gather_object({"deepspeed": shared_out(job), "exchange": there_and_back(job)})
    if job.is_main:
        (folder / "facts.json").write_text(json.dumps(facts))
    run_experts(replace(OPTIONS, level="layer", out=folder / "layer"), job)
    shutdown()
    # The second time as users do it: the command line joins the job, measures, and leaves.
    sizes = "--tokens 24 --dim 16 --hidden 16 --experts 4 --iters 3 --routing zipf"
    main(["bench", "experts", "--level", "a2a", *sizes.split(), "--out", str(folder / "a2a")])
