"""What `m2mkd bench experts` can be asked. Standard library only: the command line reads this file for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2mkd_ds.bench import spelled

Level = Literal["ffn", "layer", "a2a", "step"]
LEVELS: tuple[Level, ...] = ("layer", "ffn", "a2a", "step")
"""In the order in which they are measured: what matters most comes first, and gets its rounds."""

Routing = Literal["balanced", "zipf", "router", "run"]


@dataclass(frozen=True, kw_only=True)
class ExpertBench:
    """Sizes, distributions, peers and how long to measure."""

    level: Literal["ffn", "layer", "a2a", "step", "all"] = "all"
    """ffn: the experts on rows that are grouped already. layer: router, dispatch, experts, combine. a2a: the exchange of expert
    parallelism (two ranks or more). step: one distillation step of a teaching pair on synthetic images. all: these four; ffn then
    leaves routing `router` out, because it sees counts of rows only, and those lie between balanced and zipf."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is one."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of weights and activations. auto: bf16 on cuda, fp32 on cpu."""
    tokens: int = 3152
    """Tokens a rank (T); 3152 is 16 images of 224 pixels in patches of 16."""
    top_k: int = 2
    """Experts a token (K)."""
    experts: int = 8
    """Number of experts (E)."""
    dim: int = 768
    """Width (D)."""
    hidden: int = 3072
    """Hidden width of an expert (F)."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Of the experts; DeepSpeed's and Tutel's layers stand for gelu only."""
    routing: tuple[Routing, ...] = ("balanced", "zipf", "router")
    """balanced: equal load. zipf: expert n is wanted 1/n as much as the first. router: what a fresh router does with random tokens.
    run: experts wanted as often as in a trained student, see --load-from."""
    load_from: Path | None = None
    """For routing `run`: a run folder. Its evaluation says how many rows each expert of the final student got; the most uneven block
    is taken."""
    peers: tuple[str, ...] = ()
    """Names of peers to measure; default all but `reference`, which is slow and serves as the oracle in any case."""
    iters: int = 0
    """Rounds of `layer` and `a2a`; one round measures every peer once, in turn. `ffn` and `step` take a third, at least 3.
    0: 10 on cpu, 50 on cuda."""
    budget_s: float = 450.0
    """Seconds for the whole run. When they run short, a group of peers stops early, but has 3 rounds at least; every row says how
    many it had. 0: no limit."""
    step_blocks: int = 1
    """Blocks of teacher and student module in `step`."""
    seed: int = 0
    """Of weights and tokens."""
    out: Path | None = None
    """Folder for experts_DEVICE_DTYPE.json, .md and .png; without it, only the table is printed."""

    def check(self) -> None:
        """Raises ValueError for numbers that make no measurement."""
        for name in ("tokens", "top_k", "experts", "dim", "hidden", "step_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.iters < 0:
            raise ValueError(f"--iters is {self.iters}; give rounds, or 0 for the default")
        if self.top_k > self.experts:
            raise ValueError(f"--top-k is {self.top_k}; allowed is 1 to --experts, which is {self.experts}")
        if self.experts > self.dim:
            raise ValueError(
                f"--experts is {self.experts} and --dim {self.dim}; a wanted routing needs one direction an expert, so at most as many"
            )
        if not self.routing:
            raise ValueError("--routing is empty; give one or several of balanced, zipf, router, run")
        if ("run" in self.routing) != (self.load_from is not None):
            raise ValueError("--routing run and --load-from RUN belong together: give both or neither")
        if self.budget_s < 0:
            raise ValueError(f"--budget-s is {self.budget_s:g}; give seconds, or 0 for no limit")

    @property
    def levels(self) -> tuple[Level, ...]:
        """The levels asked for, in running order."""
        return LEVELS if self.level == "all" else (self.level,)

    def routings(self, level: Level) -> tuple[Routing, ...]:
        """The routings that a level is measured with; `step` has a fresh student's own."""
        if level == "step":
            return ("router",)
        skip = self.level == "all" and level == "ffn" and len(self.routing) > 1
        return tuple(routing for routing in self.routing if not (skip and routing == "router"))

    def rounds(self, level: Level, device_type: str) -> int:
        """Rounds that a level is measured for if the time suffices."""
        iters = self.iters or (50 if device_type == "cuda" else 10)
        return iters if level in ("layer", "a2a") else max(3, iters // 3)

    def command(self) -> str:
        """The command line that asks for this; defaults are left out."""
        return spelled.command("experts", self)
