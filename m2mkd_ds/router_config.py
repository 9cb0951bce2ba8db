"""RouterConfig: how a token chooses its experts, and the named presets of it. A branch of the tree in config.py, which re-exports it.

    --set student.moe.router=vmoe student.moe.router.top_k=1       a preset replaces the whole branch, later words refine it

The routers themselves are in moe/routers/; what each field does to them is in docs/moe.md. Letters: T tokens, K choices a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts."""

    kind: Literal["topk", "noisy_topk", "expert_choice", "balanced", "zipf"] = "topk"
    """topk: the K best experts of each token. noisy_topk: the same with V-MoE's noise in training. expert_choice: each expert takes
    its best tokens. balanced, zipf: a fixed choice that ignores the tokens, for benchmarks only."""
    top_k: int = 2
    """Experts a token. Not used by expert_choice, where the experts choose."""
    softmax: Literal["before", "after"] = "after"
    """before: softmax over all experts, then top-k (V-MoE). after: top-k of the logits, then softmax over them (the authors' NaiveGate).
    noisy_topk and expert_choice are defined with `before` only."""
    renormalize: bool = False
    """With softmax=before: divide the kept weights by their sum."""
    bias: bool = True
    """Whether the router's linear map has a bias (the authors' has)."""
    noise: float = 1.0
    """For noisy_topk: in training, Gaussian noise of standard deviation noise / E is added to the logits; 0 for none."""
    importance_weight: float = 0.0
    """Weight of the importance loss, CV^2 of the summed gate values (V-MoE appendix A)."""
    load_weight: float = 0.0
    """For noisy_topk: weight of the load loss, CV^2 of each expert's probability of being chosen (V-MoE appendix A)."""
    switch_weight: float = 0.01
    """Weight of the Switch load-balancing loss. PAPER: the authors' release trains with no balancing loss at all (0)."""
    z_weight: float = 0.0
    """Weight of the router z-loss."""
    capacity_factor: float = 0.0
    """Training: an expert takes at most C = ceil(T * K * this / E) of the T tokens of one forward pass on one rank, the rest are
    dropped; 0 drops nothing. expert_choice (which needs it): each expert takes C = ceil(T * this / E) tokens."""
    eval_capacity_factor: float = 0.0
    """The same in evaluation; 0 drops nothing (expert_choice: 0 means as in training). Where tokens are dropped, the result for an
    image depends on the other images of its batch."""
    capacity_multiple: int = 1
    """C is rounded up to a multiple of this."""
    capacity_priority: Literal["order", "batch"] = "order"
    """Who is served first. order: all first choices before all second ones, tokens in order. batch: tokens with the largest weight
    come first (V-MoE's Batch Prioritized Routing), then the same."""
    balance_rate: float = 0.0
    """Loss-free balancing: after each optimizer step, a bias that only the choice sees moves by this much, down for experts with
    more than their share and up for the others; 0 for none."""
    zipf_exponent: float = 1.0
    """For zipf: expert e is drawn with a probability proportional to 1 / (e + 1)^this."""


ROUTER_PRESETS: dict[str, RouterConfig] = {
    # FastMoE's NaiveGate, the router of the m2mKD authors' release: no balancing of any kind.
    "fastmoe": RouterConfig(top_k=2, softmax="after", bias=True, switch_weight=0.0),
    # V-MoE (arXiv 2106.05974): google-research/vmoe's settings for training on ImageNet.
    "vmoe": RouterConfig(
        kind="noisy_topk", top_k=2, softmax="before", bias=False, noise=1.0, importance_weight=0.005, load_weight=0.005,
        switch_weight=0.0, capacity_factor=1.05, eval_capacity_factor=4.0, capacity_multiple=4,
    ),
    # Switch Transformer (arXiv 2101.03961); the capacity factor of evaluation is that of its code in Mesh TensorFlow.
    "switch": RouterConfig(top_k=1, softmax="before", bias=False, switch_weight=0.01, capacity_factor=1.25, eval_capacity_factor=2.0),
    # Auxiliary-loss-free balancing (arXiv 2408.15664). PAPER: its gate is a sigmoid, ours the softmax.
    "loss_free": RouterConfig(top_k=2, softmax="before", bias=False, switch_weight=0.0, balance_rate=0.001),
    # Expert choice (arXiv 2202.09368), at the cost of two experts a token.
    "expert_choice": RouterConfig(kind="expert_choice", softmax="before", bias=False, switch_weight=0.0, capacity_factor=2.0),
}  # fmt: skip
"""Routers of the literature by name."""


def router_preset(name: object, where: str) -> RouterConfig:
    """The preset `name`. Raises ValueError that lists the presets; `where` is the field that it was given for."""
    if not isinstance(name, str) or name not in ROUTER_PRESETS:
        raise ValueError(
            f"{where} is {name!r}; allowed is one of the presets {', '.join(ROUTER_PRESETS)}, or set a field of it such as {where}.top_k"
        )
    return ROUTER_PRESETS[name]


_LIMITS: dict[str, tuple[float, float]] = {
    "noise": (0, inf), "importance_weight": (0, inf), "load_weight": (0, inf), "switch_weight": (0, inf), "z_weight": (0, inf),
    "capacity_factor": (0, inf), "eval_capacity_factor": (0, inf), "capacity_multiple": (1, inf), "balance_rate": (0, inf),
    "zipf_exponent": (0, inf),
}  # fmt: skip

_ALLOWED: dict[str, tuple[str, ...]] = {
    "kind": ("topk", "noisy_topk", "expert_choice", "balanced", "zipf"),
    "softmax": ("before", "after"),
    "capacity_priority": ("order", "batch"),
}


def check_router(config: RouterConfig, num_experts: int, *, at: str = "") -> None:
    """Refuse what cannot work. `at` is the path of the fields in messages, for example `student.moe.`. Raises ValueError."""
    for name, allowed in _ALLOWED.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"{at}router.{name} is {getattr(config, name)!r}; allowed is {_one_of(allowed)}")
    for name, (low, high) in _LIMITS.items():
        if not low <= getattr(config, name) <= high:
            raise ValueError(f"{at}router.{name} is {getattr(config, name)}; it must be at least {low:g}")
    if config.kind != "expert_choice" and not 1 <= config.top_k <= num_experts:
        raise ValueError(f"{at}router.top_k is {config.top_k}; allowed is 1 to {at}num_experts = {num_experts}")
    for name, why in _senseless(config).items():
        raise ValueError(f"{at}router.{name} is {getattr(config, name)} with {at}router.kind={config.kind}: {why}")


def _one_of(allowed: tuple[str, ...]) -> str:
    return ", ".join(f"`{value}`" for value in allowed[:-1]) + f" or `{allowed[-1]}`"


def _senseless(config: RouterConfig) -> dict[str, str]:
    """Field -> why its value does not go with the kind of router, and what to do."""
    wrong: dict[str, str] = {}
    forced = config.kind in ("balanced", "zipf")
    if config.kind in ("noisy_topk", "expert_choice"):
        if config.softmax == "after":
            wrong["softmax"] = "this router's weights are those of a softmax over all experts; set it to before"
        if config.renormalize:
            wrong["renormalize"] = "this router's weights are not renormalised; set it to false"
    if config.load_weight and (config.kind != "noisy_topk" or not config.noise):
        wrong["load_weight"] = "the load loss is made of the noise of noisy_topk; set kind=noisy_topk and noise > 0, or the weight to 0"
    if config.balance_rate and (forced or config.kind == "expert_choice"):
        wrong["balance_rate"] = f"{'its choice is fixed' if forced else 'its experts are balanced by construction'}; set it to 0"
    elif config.balance_rate and config.load_weight:
        wrong["balance_rate"] = "the load loss does not see the bias that moves the choice; set load_weight or balance_rate to 0"
    if config.kind == "expert_choice":
        for name in ("switch_weight", "importance_weight"):
            if getattr(config, name):
                wrong[name] = "its experts are balanced by construction; set it to 0"
        if not config.capacity_factor:
            wrong["capacity_factor"] = "it says how many tokens an expert takes; set it above 0, for example to 2"
        if config.capacity_priority != "order":
            wrong["capacity_priority"] = "its experts take their best tokens, so there is no order to choose; leave it at order"
    return wrong
