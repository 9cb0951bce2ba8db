"""The training engine: what the loops call, and its implementation on DeepSpeed ZeRO-1, -2 and -3, with or without expert parallelism.

One engine trains one module (one teaching pair, or a whole model). Several engines may live in one process and share every
batch; each has its own clipping, norm, learning rate and checkpoint. The order of calls for each micro-batch is

    outputs = engine(inputs)      loss = f(outputs)      engine.backward(loss)      norm = engine.step(lr)

and every `gradient_accumulation_steps`-th `step` updates the weights. Checkpoints hold fp32 weights and optimizer state as
plain tensors (`checkpoint/state/rank_files.py`), not DeepSpeed's own files: those are pickles that only the same number of ranks can load.

    layout.py       which elements lie on which rank           zero_shards.py         where DeepSpeed keeps them, by stage
    flat_state.py   this rank's share of a checkpoint          expert_parallel.py     experts spread over ranks
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed
from torch import Tensor, nn

from m2mkd_ds.checkpoint.state.rank_files import Description, FileRecord, RankFiles
from m2mkd_ds.distributed.expert_parallel import ParallelExperts, gather_experts, parallel_layers
from m2mkd_ds.distributed.flat_state import RankSnapshot, check_same_model, fill_part, optimizer_state
from m2mkd_ds.distributed.layout import expert_groups_of, fill_master, gather
from m2mkd_ds.distributed.parameters import check_stage_3, describe_parameters, expert_groups_of_optimizer, named_groups_of
from m2mkd_ds.distributed.world import World
from m2mkd_ds.distributed.zero_shards import PartitionedModule, PartitionedOptimizer, ZeroShards, forget_module

logger = logging.getLogger("m2mkd_ds")


class Snapshot(Protocol):
    """One rank's share of everything needed to go on, in CPU memory of its own. It knows no engine: any thread may write it."""

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Write this rank's files into the existing `folder`, forced to disk. Returns {file name: (bytes, SHA-256)}."""
        ...


class Engine(Protocol):
    """What a training loop may rely on."""

    module: nn.Module
    """The module as the caller made it, on the device, in the precision of the run."""

    is_collective: bool
    """Whether a forward pass of `module` talks to other ranks: then all of them must make equally many."""

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass; floating-point inputs are cast to the precision of the run."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss` (the mean over this micro-batch) to the accumulated ones."""
        ...

    def step(self, lr: float) -> float | None:
        """End a micro-batch. At the last one of a step: update with learning rate `lr`, return the global gradient norm."""
        ...

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """Copy this rank's share of everything needed to go on, between two steps. `reuse` is an earlier snapshot of this engine, whose
        memory is taken over; it must not be written any more, nor be in the middle of it."""
        ...

    def save(self, folder: Path) -> dict[str, FileRecord]:
        """`snapshot().write(folder)`."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what all ranks of a job of any shape wrote."""
        ...

    def full_state_dict(self, *, ema: bool = False) -> dict[str, Tensor]:
        """The weights (`ema`: their moving average) as fp32 CPU tensors under the module's own names, the same on every rank."""
        ...

    def close(self) -> None:
        """Let go of the module and of all buffers."""
        ...


class _Outputs(nn.Module):
    """Calls the module and lists every tensor in its output, however nested.

    DeepSpeed prepares its buffers in hooks on the outputs' gradients and finds tensors in tuples, lists and dicts only; one
    hidden in a dataclass would leave the backward pass unprepared. It also carries DeepSpeed's sign that there are spread experts.
    """

    def __init__(self, module: nn.Module, experts_sign: nn.Module | None) -> None:
        super().__init__()
        self.module = module
        self.experts_sign = experts_sign

    def forward(self, *inputs: Any) -> tuple[Any, list[Tensor]]:
        outputs = self.module(*inputs)
        return outputs, list(_tensors(outputs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name))
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


class DeepSpeedEngine:
    """`Engine` on DeepSpeed.

    `module` holds fp32 parameters; those without `requires_grad` stay as they are. `optimizer` is a torch optimizer over all
    others, each exactly once; the engine takes both over. `ds_config` comes from `resolve_ds_config`. Rank 0's weights and
    buffers are the ones that every rank starts from. With `ema_decay` > 0 the engine also keeps an exponential moving average
    of the fp32 weights, updated after every step and sharded like them.

    Experts may have been spread over ranks by `shard_experts_` (before the optimizer was made).

    Raises ValueError for parameters that are not fp32, for trainable ones that the optimizer lacks or has twice, and for what ZeRO-3
    cannot do.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, ds_config: Mapping[str, Any], world: World, *, ema_decay: float = 0.0
    ) -> None:
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay is {ema_decay}; allowed is 0 (no average) up to, not including, 1")
        self.module = module
        self.world = world
        self.precision = "bf16" if ds_config["bf16"]["enabled"] else "fp32"
        self.stage = int(ds_config["zero_optimization"]["stage"])
        self._spread = parallel_layers(module)
        self.is_collective = bool(self._spread) or self.stage == 3
        self._optimizer = optimizer
        self._ema_decay = ema_decay
        named_groups = named_groups_of(module, optimizer)
        if self.stage == 3:
            check_stage_3(module, self._spread)
        # Taken before DeepSpeed casts and cuts the module: bf16 keeps 8 bits of the 24 that a weight file brings.
        # On the CPU: whole fp32 weights on the device would be the peak of its memory, above all under ZeRO-3.
        originals = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()}
        experts = [expert_groups_of_optimizer(group) for group in optimizer.param_groups]
        self._parameters = describe_parameters(module, named_groups, optimizer, experts)

        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # DeepSpeed's bf16 optimizer prints memory tables that no log level stops
            wrapped = _Outputs(module, _experts_sign(self._spread))
            self._engine, *_ = _import_deepspeed().initialize(model=wrapped, optimizer=optimizer, config=dict(ds_config))
        logger.debug("deepspeed.initialize printed: %s", printed.getvalue())

        self._shards: ZeroShards
        if self.stage == 3:
            self._shards = PartitionedModule(module, self._engine.optimizer, {k: v.shape for k, v in originals.items()}, world)
        else:
            self._shards = PartitionedOptimizer(module, optimizer, named_groups, world, experts)
        for layout, master_P in zip(self._shards.layouts, self._masters(), strict=True):
            fill_master(layout, master_P, originals, torch.bfloat16 if self.precision == "bf16" else torch.float32)
        self._frozen = {name: originals[name].to(world.device) for name, p in module.named_parameters() if not p.requires_grad}
        for tensor in [*self._frozen.values(), *module.buffers()]:
            torch.distributed.broadcast(tensor, src=0)
        self._ema = [master_P.detach().clone() for master_P in self._masters()] if ema_decay else []

    def _masters(self) -> list[Tensor]:
        """This rank's fp32 parts, one a layout."""
        return self._shards.masters()

    @property
    def at_boundary(self) -> bool:
        """Whether no micro-batch of an unfinished step is accumulated."""
        return self._engine.micro_steps % self._engine.gradient_accumulation_steps() == 0

    def __call__(self, *inputs: Any) -> Any:
        """Forward pass on the rank's device. Floating-point tensors among `inputs` are cast to the run's precision; outputs
        come as the module gives them (in bf16: compute the loss in fp32)."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        outputs, _ = self._engine(*(_place(x, self.world.device, dtype) if isinstance(x, Tensor) else x for x in inputs))
        return outputs

    def backward(self, loss: Tensor) -> None:
        """Gradients of `loss` / gradient_accumulation_steps, summed over micro-batches and averaged over ranks.

        `loss` is a scalar that depends on an output of the last call; frozen modules may lie between.
        """
        self._engine.backward(loss)

    def step(self, lr: float) -> float | None:
        """End a micro-batch; None unless it was the last one of a step.

        At the last: clip, update all groups with learning rate `lr`, and return the 2-norm of the averaged gradient over all
        ranks and groups *before* clipping. `inf` says that some gradient was not finite; every rank then skipped the update.
        """
        boundary = self._engine.is_gradient_accumulation_boundary()
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        if not boundary:
            return None
        norm = float(self._engine.get_global_grad_norm())
        if self._ema and norm != float("inf"):
            for ema_P, master_P in zip(self._ema, self._masters(), strict=True):
                ema_P.lerp_(master_P.detach(), 1.0 - self._ema_decay)
        return norm

    def full_state_dict(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Collective: fp32 master weights (`ema`: their moving average) and buffers, on the CPU, equal on every rank.

        Names and order are those of `module.state_dict()`; integer buffers keep their type. Raises ValueError for `ema`
        when the engine keeps no average.
        """
        if ema and not self._ema:
            raise ValueError("this engine keeps no moving average: make it with ema_decay > 0")
        weights = {name: value.float().cpu().clone() for name, value in self._frozen.items()}
        for layout, part_P in zip(self._shards.layouts, self._ema if ema else self._masters(), strict=True):
            experts = expert_groups_of(layout)
            for name, piece in layout.split(gather(layout, part_P)).items():
                whole = piece if experts is None else gather_experts(piece, experts)
                weights[name] = whole.cpu().clone()  # cloned one by one: views would share, and keep, the whole row
        name_of = {id(p): name for name, p in self.module.named_parameters()}
        result = {}
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            if id(tensor) in name_of:
                result[name] = weights[name_of[id(tensor)]]
                continue
            torch.distributed.broadcast(tensor, src=0)  # a buffer: batch statistics, if any, are a rank's own
            result[name] = tensor.detach().to("cpu", torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        return result

    def snapshot(self, reuse: Snapshot | None = None) -> RankSnapshot:
        """Copy this rank's share to CPU memory (from a GPU: pinned), into that of `reuse` where given; every rank calls it, between steps.

        Raises RuntimeError inside a step, because accumulated gradients are not saved.
        """
        if not self.at_boundary:
            raise RuntimeError("a save inside a step: call it after the micro-batch whose step() returned a norm")
        assert reuse is None or isinstance(reuse, RankSnapshot)
        tensors: dict[str, Tensor] = {}
        kinds: tuple[str, ...] = ()
        for index, master_P in enumerate(self._masters()):
            tensors_P, scalars = optimizer_state(self._optimizer.state.get(master_P, {}), master_P)
            tensors_P = {"master": master_P, **tensors_P} | ({"ema": self._ema[index]} if self._ema else {})
            kinds = kinds or tuple(tensors_P)
            tensors |= {f"group{index}.{kind}": tensors_P[kind] for kind in kinds}
            if index == 0 and self.world.is_main:  # all groups make every step together
                tensors |= {f"scalar.{kind}": value for kind, value in scalars.items()}
        if self.world.is_main:
            tensors |= {f"shared.{name}": value for name, value in (self._frozen | dict(self.module.named_buffers())).items()}
        groups = tuple(layout.at(0) for layout in self._shards.layouts)
        return RankSnapshot(Description(self.world.size, self.stage, kinds, self._parameters, groups), self.world.rank, tensors, reuse)

    def save(self, folder: Path) -> dict[str, FileRecord]:
        """Write `engine_rank_<r>.safetensors` into the existing `folder`; every rank calls it, between two steps."""
        return self.snapshot().write(folder)

    def load(self, folder: Path) -> None:
        """Restore weights, optimizer state, average and buffers; every rank calls it, on an engine of the same module.

        With the shape that saved (ranks, ep_size, ZeRO stage), a rank reads its own file and rank 0's, and going on is bit for bit the
        uninterrupted run; with any other, the values are the same and only the order of sums differs. Each rank reads no more than its
        own share. Raises ValueError for files that are missing or of another model; the engine is as it was then.
        """
        if not self.at_boundary:
            raise RuntimeError("load() inside a step: call it before the first micro-batch of a step")
        files = RankFiles(folder)
        shared, parameters = self._frozen | dict(self.module.named_buffers()), dict(self.module.named_parameters())
        # All checks before the first change.
        check_same_model(files, self._shards.layouts)
        if {name: value.shape for name, value in shared.items()} != {name: info.shape for name, info in files.shared.items()}:
            raise ValueError(f"{folder}: other buffers or frozen parameters: {sorted(set(shared) ^ set(files.shared))[:5]}")
        if bool(self._ema) != ("ema" in files.description.kinds):
            raise ValueError(f"{folder}: ema_decay is {self._ema_decay}, but the checkpoint has {'no' if self._ema else 'an'} average")
        for layout in self._shards.layouts:
            files.check_held(layout)
        kinds = [kind for kind in files.description.kinds if kind not in ("master", "ema")]
        for index, (layout, master_P) in enumerate(zip(self._shards.layouts, self._masters(), strict=True)):
            with torch.no_grad():
                fill_part(files, "master", layout, master_P)
                if self._ema:
                    fill_part(files, "ema", layout, self._ema[index])
            state = {kind: torch.zeros_like(master_P, requires_grad=False) for kind in kinds}
            for kind, part_P in state.items():
                fill_part(files, kind, layout, part_P)
            scalars = {k: v.to(_state_device(k, master_P, self._optimizer), copy=True) for k, v in files.scalars.items()}
            self._optimizer.state[master_P] = state | scalars
        self._shards.publish()
        for name, value in shared.items():
            value.copy_(files.read_shared(name))
        for name, value in self._frozen.items():
            parameters[name].data.copy_(value)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the module, free its buffers and let go of both; the engine is of no use afterwards."""
        root = self._engine.module
        self._engine.destroy()
        if self.stage == 3:
            forget_module(root)
        # Whoever still holds this object must hold neither memory nor, through DeepSpeed's engine, the job's process groups.
        del self.module, self._engine, self._optimizer, self._shards, self._spread, self._frozen, self._ema


def _place(x: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def _import_deepspeed() -> Any:
    """DeepSpeed, with its Muon optimizer left uncompiled.

    ZeRO imports Muon, which nothing here uses, on the first reduced gradient; its `torch.compile` decorators load torch's
    whole compiler, more than a second of every rank's start.
    """
    import deepspeed
    from deepspeed.runtime import compiler

    decorator = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = decorator
    return deepspeed


def _experts_sign(spread: Mapping[str, ParallelExperts]) -> nn.Module | None:
    """What DeepSpeed looks for: it reduces expert gradients over their own ranks only if some module is of its class MoE.

    Ours only bears the name: no parameters, no forward. DeepSpeed's own MoE is not used.
    """
    if not spread:
        return None
    from deepspeed.moe.layer import MoE

    class SpreadExperts(MoE):
        def __init__(self, layer: ParallelExperts) -> None:
            nn.Module.__init__(self)
            self.num_experts = layer.num_experts
            self.ep_size = layer.groups.size
            self.expert_group_name = layer.groups.name

        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups are there: `shard_experts_` made them."""

    return SpreadExperts(next(iter(spread.values())))


def _state_device(kind: str, master_P: Tensor, optimizer: torch.optim.Optimizer) -> torch.device:
    """torch keeps Adam's `step` on the CPU unless the optimizer is fused or capturable."""
    group = optimizer.param_groups[0]
    on_cpu = kind == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.device("cpu") if on_cpu else master_P.device
