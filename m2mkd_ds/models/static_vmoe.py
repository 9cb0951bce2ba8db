"""A trained student as a graph of plain operations: routing and experts without sorting by expert, for ONNX and its kin.

`MoELayer` sorts the choices of all tokens by expert, which no exchange format has a kernel for. Here every expert is a piece of the
graph (they are a fixed number), and there are two ways to give it its tokens:

    GatheredExperts   each expert computes the tokens that chose it: the student's own cost, but tensors whose length depends on the data
    DenseExperts      every expert computes all tokens, and those that did not choose it count zero: E / K times the cost, fixed shapes

Evaluation only. Shape letters: B images, L tokens an image, T = B*L, D width, E experts, K choices a token, V classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from m2mkd_ds.config import RouterConfig
from m2mkd_ds.models.vmoe import Block, VisionMoE
from m2mkd_ds.moe.backends import Activation
from m2mkd_ds.moe.backends.contract import activate
from m2mkd_ds.moe.experts import Experts
from m2mkd_ds.moe.layer import MoELayer
from m2mkd_ds.moe.routers.topk import TopKRouter


def why_not_static(router: RouterConfig, num_experts: int) -> str:
    """Why a student with this router cannot be a static graph, or an empty string.

    A graph must treat an image the same whatever stands beside it in the batch. A capacity that no batch can reach does not matter.
    """
    if router.kind == "expert_choice":
        return "with student.moe.router.kind=expert_choice experts choose among all tokens of a batch: logits depend on the other images"
    if router.kind not in ("topk", "noisy_topk"):
        return f"student.moe.router.kind={router.kind} is a benchmark's router that ignores its tokens"
    factor = router.eval_capacity_factor
    if factor and factor * router.top_k < num_experts:
        return (
            f"student.moe.router.eval_capacity_factor={factor:g} drops tokens in full batches (an expert takes at most {factor:g} * "
            f"{router.top_k} / {num_experts} of them), so logits depend on the other images; "
            "export it with eval_capacity_factor=0 if it may be evaluated so"
        )
    return ""


class Expert(nn.Module):
    """One expert; its matrices are views of the stacked ones."""

    def __init__(self, experts: Experts, number: int) -> None:
        super().__init__()
        self.activation: Activation = experts.activation
        self.up = _linear(experts.up_proj[number], experts.up_proj_bias[number])
        self.down = _linear(experts.down_proj[number], experts.down_proj_bias[number])

    def forward(self, rows_RD: Tensor) -> Tensor:
        return self.down(activate(self.up(rows_RD), self.activation))


class StaticExperts(nn.Module, ABC):
    """All experts of a layer, and the router whose choice they follow."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        assert isinstance(layer.router, TopKRouter)
        self.router = layer.router
        self.experts = nn.ModuleList(Expert(layer.experts, i) for i in range(layer.num_experts))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Tokens [B, L, D] -> [B, L, D]."""
        x_TD = x_BLD.reshape(-1, x_BLD.shape[-1])
        expert_ids_TK, weights_TK = self.router.choose(self.router.logits(x_TD))
        chosen_TKE = expert_ids_TK[..., None] == torch.arange(len(self.experts), device=x_TD.device)
        weights_TE = (chosen_TKE * weights_TK[..., None]).sum(dim=1).to(x_TD.dtype)
        return self.compute(x_TD, chosen_TKE.any(dim=1), weights_TE).reshape(x_BLD.shape)

    @abstractmethod
    def compute(self, x_TD: Tensor, chosen_TE: Tensor, weights_TE: Tensor) -> Tensor:
        """The weighted sum of each token's experts."""


class GatheredExperts(StaticExperts):
    """Each expert computes the tokens that chose it."""

    def compute(self, x_TD: Tensor, chosen_TE: Tensor, weights_TE: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for i, expert in enumerate(self.experts):
            rows_R = torch.nonzero(chosen_TE[:, i])[:, 0]
            out_RD = expert(x_TD.index_select(0, rows_R)) * weights_TE[:, i].index_select(0, rows_R)[:, None]
            y_TD = y_TD.index_add(0, rows_R, out_RD)  # a row occurs once, so the order of additions is that of the experts
        return y_TD


class DenseExperts(StaticExperts):
    """Every expert computes all tokens."""

    def compute(self, x_TD: Tensor, chosen_TE: Tensor, weights_TE: Tensor) -> Tensor:
        y_TD = torch.zeros_like(x_TD)
        for i, expert in enumerate(self.experts):
            y_TD = y_TD + weights_TE[:, i, None] * expert(x_TD)
        return y_TD


class StaticVMoE(nn.Module):
    """images [B, 3, S, S] -> logits [B, V] of a whole VisionMoE, whose parameters it shares.

    `experts` is GatheredExperts or DenseExperts. Raises ValueError for a router whose choice depends on the batch.
    """

    def __init__(self, model: VisionMoE, experts: Callable[[MoELayer], StaticExperts]) -> None:
        super().__init__()
        if not (model.span.is_first and model.span.is_last):
            raise ValueError(
                f"blocks {model.span.first_block}..{model.span.last_block} are a module; a static graph is made of a whole student"
            )
        reason = why_not_static(model.arch.router, model.arch.num_experts) if model.arch.moe_blocks else ""
        if reason:
            raise ValueError(f"no static graph for this student: {reason}")
        self.model = model
        self.ffn = nn.ModuleList(_ffn(block, experts) for block in model.blocks.values())  # type: ignore[arg-type]
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        """As VisionMoE.forward, block by block, with the other feed-forward networks."""
        model = self.model
        x = model._embed(images)
        for i, ffn in enumerate(self.ffn):
            block = model.blocks[str(i)]
            x = model._stitch("pre", i, x)
            x = x + block.attn(block.norm1(x))  # type: ignore[operator]
            x = x + ffn(block.norm2(x))  # type: ignore[operator]
            x = model._stitch("post", i, x)
        return model.head(model.norm(x[:, 0]))


@torch.no_grad()
def smallest_gaps(model: VisionMoE, images_BCHW: Tensor) -> Tensor:
    """How nearly each image's routing is undecided: the smallest distance, over its tokens and all blocks, between the last expert
    that is chosen and the first that is not; fp32 [B], infinite without a choice to make.

    Where it is as small as rounding, another order of sums may choose another expert, and the logits differ visibly.
    """
    gaps_B = torch.full((images_BCHW.shape[0],), torch.inf)

    def look(router: TopKRouter, inputs: tuple[Tensor], output: object) -> None:
        logits_TE = router.logits(inputs[0])
        bias_E, k = router.balance_bias, router.config.top_k
        scores_TE = logits_TE if bias_E is None else logits_TE.softmax(dim=-1) + bias_E
        if k < router.num_experts:
            best_TE = scores_TE.sort(dim=-1, descending=True).values
            gaps_B.copy_(torch.minimum(gaps_B, (best_TE[:, k - 1] - best_TE[:, k]).view(len(gaps_B), -1).amin(dim=1)))

    routers = [module for module in model.modules() if isinstance(module, TopKRouter)]
    handles = [router.register_forward_hook(look) for router in routers]
    model(images_BCHW)
    for handle in handles:
        handle.remove()
    return gaps_B


def _ffn(block: Block, experts: Callable[[MoELayer], StaticExperts]) -> nn.Module:
    return experts(block.moe) if block.is_moe else block.mlp


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return layer
