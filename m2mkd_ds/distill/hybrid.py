"""Hybrids: a module of teacher or student run between frozen meta stages (arXiv 2402.16918 section 3.2).

    h_i      = M_{i-1}(...M_0(image))                       hidden_states
    t_logits = M_{N-1}(...M_{i+1}(T_i(h_i)))                teacher_logits
    s_logits = M_{N-1}(...M_{i+1}(post_i(S_i(pre_i(h_i))))) meta.suffix(pair, output of the student module)

The last pair has no suffix: teacher and student end in their own norm and head. Shape letters: B images, L tokens,
D width of teacher and meta, V classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from m2mkd_ds.distill.pairs import TeachingPair


def freeze(module: nn.Module) -> nn.Module:
    """Evaluation mode, and no parameter asks for a gradient (one may still flow *through* the module)."""
    return module.eval().requires_grad_(False)


class FrozenMeta:
    """The stages of the frozen meta model, by number; only those that the pairs at hand need must be present."""

    def __init__(self, stages: Mapping[int, nn.Module]) -> None:
        self.stages = {i: freeze(stage) for i, stage in stages.items()}

    @staticmethod
    def needed_stages(pairs: Iterable[TeachingPair]) -> set[int]:
        """Meta stages that prefix or suffix of any of the pairs runs through."""
        return {stage for pair in pairs for stage in (*pair.prefix_stages, *pair.suffix_stages)}

    @torch.no_grad()
    def hidden_states(self, images_BCHW: Tensor, pairs: Iterable[TeachingPair]) -> dict[int, Tensor]:
        """h_i of every pair by one walk along the prefix chain; h_0 is the image itself, h_i is [B, L, D]."""
        wanted = {pair.index for pair in pairs}
        hidden, x = {}, images_BCHW
        for stage in range(max(wanted) + 1):
            if stage in wanted:
                hidden[stage] = x
            if stage < max(wanted):
                x = self.stages[stage](x)
        return hidden

    def suffix(self, pair: TeachingPair, x: Tensor) -> Tensor:
        """Run the meta stages after the pair: hidden [B, L, D] -> logits [B, V]; the last pair's x are logits already.

        Not under no_grad: for a student the gradient flows through the frozen stages.
        """
        for stage in pair.suffix_stages:
            x = self.stages[stage](x)
        return x


@torch.no_grad()
def teacher_logits(meta: FrozenMeta, pair: TeachingPair, teacher_module: nn.Module, hidden: Tensor) -> Tensor:
    """Logits [B, V] of the teacher hybrid of `pair`, for its input h_i."""
    return meta.suffix(pair, teacher_module(hidden))
