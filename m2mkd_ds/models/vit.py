"""Any timm VisionTransformer, stage by stage: teacher modules, meta stages, and whole models with the same names.

    VitArch (a description) + StageSpan (which blocks) -> VitStage on the meta device (no memory)
        -> build_stage: fresh timm initialisation          -> load_stage: given tensors, exactly

A stage owns only its part of the model, under the names of the whole model: the first stage patch embedding, tokens and
positions, the last one norm, pooling and head, and each its blocks by their number in the whole model. The math is timm's
own code on these parts, so running all stages is timm's forward bit for bit. Shape letters: B images, C channels,
L tokens an image, D width, V classes.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from m2mkd_ds.models.spans import StageSpan
from m2mkd_ds.models.variants import EMBED_PARTS, TAIL_PARTS, TIMM_NAMES, VitArch, meta_device_model, timm_name

log = logging.getLogger("m2mkd_ds")


class _VitParts(VisionTransformer):
    """A timm VisionTransformer that holds some parts of `model`: the objects themselves, no copies.

    timm's methods run on it unchanged as long as they touch only these parts; parts that `model` has and this one does not
    are None.
    """

    def __init__(self, model: VisionTransformer, parts: Iterable[str], blocks: Iterable[int]) -> None:
        nn.Module.__init__(self)
        owned = set(parts)
        plain = {name: value for name, value in vars(model).items() if name not in vars(self)}
        for name, value in plain.items():
            setattr(self, name, value)
        by_number = dict(model.blocks.named_children())
        for name in (*model._parameters, *model._modules):
            if name == "blocks":
                self.blocks = nn.ModuleDict({str(i): by_number[str(i)] for i in blocks})
            else:
                setattr(self, name, getattr(model, name) if name in owned else None)
        self.train(model.training)

    def fix_init_weight(self) -> None:
        """As timm's, with the block's number in the whole model instead of its place in this one."""
        with torch.no_grad():
            for number, block in self.blocks.items():
                scale = math.sqrt(2.0 * (int(number) + 1))
                for name in ("attn.proj.weight", "mlp.fc2.weight"):
                    block.get_parameter(name).div_(scale)


class VitStage(_VitParts):
    """The blocks of `span`, with patch embedding, tokens and positions if first, norm and head if last.

    State-dict names are those of the whole timm model. Made from a whole model, whose parts it takes over; use
    `empty_stage`, `build_stage` or `load_stage` to get one. To look inside, use `enter`, `run_block` and `leave`: timm's
    methods for features and resizing expect all blocks.
    """

    def __init__(self, model: VisionTransformer, span: StageSpan) -> None:
        parts = (EMBED_PARTS if span.is_first else ()) + (TAIL_PARTS if span.is_last else ())
        super().__init__(model, parts, span.blocks)
        self.span = span

    def forward(self, x: Tensor) -> Tensor:
        """Image [B, C, H, W] if first, else hidden states [B, L, D] -> logits [B, V] if last, else hidden states [B, L, D].

        Raises ValueError for an input of the wrong rank or width.
        """
        x_BLD = self.enter(x)
        for number in self.span.blocks:
            x_BLD = self.run_block(number, x_BLD)
        return self.leave(x_BLD)

    def enter(self, x: Tensor) -> Tensor:
        """What comes before the first block: timm's patches, tokens and positions, or nothing after the first stage."""
        if self.span.is_first:
            return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if x.ndim != 3 or x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"the stage of blocks {self.span.first_block}..{self.span.last_block} takes hidden states [B, L, {self.embed_dim}] "
                f"and got {list(x.shape)}; feed it the output of the stage before it"
            )
        return x

    def run_block(self, number: int, x_BLD: Tensor) -> Tensor:
        """Block `number` (counted in the whole model); recomputed in the backward pass if gradient checkpointing is on."""
        block = self.blocks[str(number)]
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x_BLD, use_reentrant=False)
        return block(x_BLD)

    def leave(self, x_BLD: Tensor) -> Tensor:
        """What comes after the last block: timm's norm, pooling and head, or nothing before the last stage."""
        return self.forward_head(self.norm(x_BLD)) if self.span.is_last else x_BLD


def num_blocks(arch: VitArch) -> int:
    """Number of blocks of the whole model."""
    return len(meta_device_model(arch).blocks)


def width(arch: VitArch) -> int:
    """D, the width of the hidden states."""
    return int(meta_device_model(arch).embed_dim)


def empty_stage(arch: VitArch, span: StageSpan, *, drop_path: float = 0.0) -> VitStage:
    """The stage on the meta device: names, shapes and math, no memory for weights.

    `drop_path` is the rate of the last block of the whole model; block i gets its place on the ramp over all blocks.
    Raises ValueError if timm cannot build `arch`, if it cannot be cut into stages, or if `span` belongs to another depth.
    """
    model = meta_device_model(arch, drop_path=drop_path)
    if span.num_blocks != len(model.blocks):
        raise ValueError(f"the span is one of {span.num_blocks} blocks and {arch.arch} has {len(model.blocks)}; cut the depth that it has")
    return VitStage(model, span)


def build_stage(arch: VitArch, span: StageSpan, *, seed: int, drop_path: float = 0.0) -> VitStage:
    """The stage with timm's fresh initialisation, fp32 on the CPU; only the stage is allocated.

    Embeddings, every block and the head draw from generators of their own, seeded by (seed, part): a block has the same
    weights in whatever span it is built, and torch's global generator is left as it was. Raises ValueError if timm's
    initialisation leaves a value unset, or for a convolutional stem, which timm cannot initialise once it is built.
    """
    stage = empty_stage(arch, span, drop_path=drop_path).to_empty(device="cpu")
    if span.is_first and type(stage.patch_embed) is not PatchEmbed:
        raise ValueError(
            f"teacher.arch {arch.arch} has the stem {type(stage.patch_embed).__name__}, for which no fresh weights can be made stage by "
            "stage; use teacher.source=pretrained, or choose an architecture with plain patches"
        )
    _poison([*stage.parameters(), *stage.buffers()])
    parts: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [(f"block {i}", (), (i,)) for i in span.blocks]
    parts += [("embed", EMBED_PARTS, ())] if span.is_first else []
    parts += [("tail", TAIL_PARTS, ())] if span.is_last else []
    with torch.random.fork_rng(devices=[]):
        for name, owned, blocks in parts:
            torch.manual_seed(_part_seed(seed, name))
            _VitParts(stage, owned, blocks).init_weights(needs_reset=True)
    _remove_outliers(stage)
    _restore_buffers(stage)
    unset = _poisoned([*stage.named_parameters(), *stage.named_buffers()])
    if unset:
        raise ValueError(f"timm's initialisation of {arch.arch} leaves {', '.join(unset)} unset; load weights instead (teacher.weights)")
    return stage


def load_stage(arch: VitArch, span: StageSpan, tensors: Mapping[str, Tensor], *, drop_path: float = 0.0) -> VitStage:
    """The stage with the given weights, copied to fp32 on the CPU; only the stage is allocated.

    `tensors` must hold the names of `stage_names(arch, span)` and no others; each is asked for once, so a mapping that
    reads on access keeps the peak at the stage plus one tensor. Raises ValueError listing missing and unused names and
    wrong shapes.
    """
    stage = empty_stage(arch, span, drop_path=drop_path)
    names = stage.state_dict().keys()
    _refuse_other_names(f"blocks {span.first_block}..{span.last_block} of {arch.arch}", names, tensors.keys())
    stage.to_empty(device="cpu")
    wrong = []
    with torch.no_grad():
        for name, target in stage.state_dict().items():
            source = tensors[name]
            if source.shape != target.shape:
                wrong.append(f"{name} {list(source.shape)} instead of {list(target.shape)}")
            else:
                target.copy_(source)
    if wrong:
        raise ValueError(f"weights for {arch.arch} have other shapes: {'; '.join(wrong)}; check teacher.arch, arch_args and image_size")
    _restore_buffers(stage)
    return stage


def stage_names(arch: VitArch, span: StageSpan) -> tuple[str, ...]:
    """State-dict names of the stage: all that has to be read from a file of the whole model."""
    return tuple(empty_stage(arch, span).state_dict())


def pretrained_weights(arch: VitArch, *, head_seed: int | None = None) -> dict[str, Tensor]:
    """The weights that timm's hub entry of `arch` names: fp32, canonical names, the whole model. Downloads, or reads the cache.

    timm fits patch embedding and positions to arch.image_size. The entry's head must have arch.num_classes classes, because
    an untrained head teaches nothing; who trains it first gives `head_seed` and gets a fresh one, which the log says. Raises
    ValueError when there are no such weights, they cannot be reached, or they do not fill the model exactly.
    """
    if arch.arch in TIMM_NAMES:
        raise ValueError(f"timm has no weights for {arch.arch}; set teacher.weights to a file, or teacher.arch to {TIMM_NAMES[arch.arch]}")
    return _through_timm(arch, {}, int(meta_device_model(arch).pretrained_cfg["num_classes"]), head_seed)


def adapt_weights(arch: VitArch, tensors: Mapping[str, Tensor], *, head_seed: int | None = None) -> dict[str, Tensor]:
    """`tensors` of a whole model as published (any layout that timm reads), treated like `pretrained_weights`.

    For files that are not in timm's names (DeiT-3's and DINOv2's originals) or were trained at another image size; what
    fits already comes back as it is. Raises ValueError when they do not fill the model exactly.
    """
    if not tensors:
        raise ValueError(f"teacher.weights holds no tensors; it must hold those of {arch.arch}")
    model = meta_device_model(arch)
    if {name: tensor.shape for name, tensor in tensors.items()} == {name: tensor.shape for name, tensor in model.state_dict().items()}:
        return {name: tensor.float() for name, tensor in tensors.items()}
    classes = tensors["head.weight"].shape[0] if "head.weight" in tensors else 0
    return _through_timm(arch, {"source": "", "state_dict": dict(tensors), "num_classes": classes}, classes, head_seed)


def _through_timm(arch: VitArch, overlay: dict[str, Any], classes: int, head_seed: int | None) -> dict[str, Tensor]:
    """Let timm convert and resize, in the two circumstances in which its loading is strict.

    The model must have the classes of the weights; and a SigLIP entry must keep its attention pool, which is dropped
    afterwards if `arch` pools otherwise.
    """
    if classes != arch.num_classes and head_seed is None:
        raise ValueError(
            f"the weights of {arch.arch} have a head of {classes} classes and data.num_classes is {arch.num_classes}: an untrained head "
            "cannot teach; use the data that the weights were trained for, or fine-tune them and set teacher.weights to that file"
        )
    args = {**arch.arch_args, "num_classes": classes, "img_size": arch.image_size}
    if "siglip" in arch.arch:
        args["global_pool"] = "map"
    try:
        model = timm.create_model(timm_name(arch.arch), pretrained=True, pretrained_cfg_overlay=overlay, **args)
    except (OSError, RuntimeError) as err:
        raise ValueError(
            f"the pretrained weights of {arch.arch} cannot be used ({type(err).__name__}: {err}); check teacher.arch and the network, "
            "or set teacher.weights to a file of this architecture"
        ) from err
    tensors = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    wanted = meta_device_model(arch)
    if wanted.attn_pool is None:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("attn_pool.")}
    if classes != arch.num_classes and head_seed is not None:
        log.warning("%s: the weights have %d classes, this run %d: the head is fresh", arch.arch, classes, arch.num_classes)
        last = len(wanted.blocks) - 1
        fresh = build_stage(arch, StageSpan(last, last, last + 1), seed=head_seed).state_dict()
        tensors.update({name: tensor for name, tensor in fresh.items() if name.startswith("head.")})
    _refuse_other_names(f"the pretrained {arch.arch}", wanted.state_dict(), tensors.keys())
    return tensors


def _refuse_other_names(what: str, wanted: Iterable[str], given: Iterable[str]) -> None:
    missing, unused = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or unused:
        raise ValueError(
            f"weights for {what}: missing {missing or 'none'}, unused {unused or 'none'}; give all names of stage_names() and no others"
        )


def _part_seed(seed: int, part: str) -> int:
    """Independent of Python's hash seed and of which other parts are built."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{part}".encode()).digest()[:8], "little")


def _remove_outliers(stage: VitStage) -> None:
    """Set to 0 the weights of exactly -2: timm's trunc_normal_ sends one draw in 2^24 to its lower bound, 100 standard deviations off."""
    with torch.no_grad():
        for parameter in stage.parameters():
            if parameter.ndim > 1:
                parameter.masked_fill_(parameter == -2.0, 0.0)


def _poison(tensors: Iterable[Tensor]) -> None:
    """Overwrite with a value that no initialisation gives, so that what stays unset is seen."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)


def _poisoned(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    return [name for name, t in named if bool((t.isnan() if t.is_floating_point() else t == torch.iinfo(t.dtype).min).any())]


def _restore_buffers(stage: VitStage) -> None:
    """Recompute the buffers that no file holds; timm's modules with such buffers know how."""
    saved = stage.state_dict().keys()
    buffers = {name: buffer for name, buffer in stage.named_buffers() if name not in saved}
    _poison(buffers.values())
    for module in stage.modules():
        if hasattr(module, "init_non_persistent_buffers"):  # timm's convention, from 1.0.23 on
            module.init_non_persistent_buffers()
    unset = _poisoned((name, buffer) for name, buffer in stage.named_buffers() if name in buffers)
    if unset:
        raise ValueError(f"no file holds the buffers {', '.join(unset)}; their modules need a method init_non_persistent_buffers()")
