"""Fine-tuning an exported model: losses and gradients are the training code's, and transformers' Trainer works with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from tests.checkpoint.exported_models import ARCH, IMAGES, export, make_model

LABELS = torch.tensor([0, 4, 2])


class Poison(torch.autograd.Function):
    """Rows beyond the last offset hold NaN, forward and backward, as torch's grouped matmul may leave them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: Tensor) -> Tensor:
        ctx.end = int(end)
        return torch.cat([rows[: ctx.end], torch.full_like(rows[ctx.end :], float("nan"))])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grads[0][: ctx.end], torch.full_like(grads[0][ctx.end :], float("nan"))]), None


def test_gradients_of_a_tight_capacity_are_those_of_the_training_code(tmp_path: Path, auto: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = torch.nn.functional.grouped_mm

    def poisoned(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        return Poison.apply(plain(Poison.apply(rows, offs[-1]).nan_to_num(), weight, offs=offs), offs[-1])

    router = dataclasses.replace(ROUTER_PRESETS["switch"], capacity_factor=0.6)
    model = make_model(dataclasses.replace(ARCH, router=router, backend="reference")).train()
    out = model(IMAGES)
    assert all(0 < float(stats.drop_rate) < 1 for stats in out.stats.values())
    (torch.nn.functional.cross_entropy(out.output, LABELS) + sum(out.router_losses.values())).backward()
    for backend in ("loop", "dense", "grouped", "poisoned"):
        if backend == "poisoned":
            monkeypatch.setattr(torch.nn.functional, "grouped_mm", poisoned)
        exported = auto(export(model, tmp_path / backend), expert_backend="grouped" if backend == "poisoned" else backend).train()
        exported(IMAGES, labels=LABELS).loss.backward()
        theirs = dict(exported.named_parameters())
        for name, p in model.named_parameters():
            torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=f"{backend} {name}")


def test_loss_in_training_mode_has_the_router_losses(tmp_path: Path, auto: Any) -> None:
    router = RouterConfig(importance_weight=0.3, switch_weight=0.2, z_weight=0.1)
    model = make_model(dataclasses.replace(ARCH, router=router))
    exported = auto(export(model, tmp_path / "out"))
    out = model(IMAGES)
    task = torch.nn.functional.cross_entropy(out.output, LABELS)
    torch.testing.assert_close(exported(IMAGES, labels=LABELS).loss, task)
    loss = exported.train()(IMAGES, labels=LABELS).loss
    torch.testing.assert_close(loss, task + sum(out.router_losses.values()))
    (task + sum(out.router_losses.values())).backward()
    loss.backward()
    theirs = dict(exported.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(theirs[name].grad, p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_loss_of_vmoes_router_in_training_mode_has_noise_and_load_loss(tmp_path: Path, auto: Any) -> None:
    model = make_model(dataclasses.replace(ARCH, router=ROUTER_PRESETS["vmoe"], backend="reference")).train()
    exported = auto(export(model, tmp_path / "out")).train()
    torch.manual_seed(7)  # both draw the noise of block after block
    out = model(IMAGES)
    assert set(out.router_losses) == {"importance", "load"}
    task = torch.nn.functional.cross_entropy(out.output, LABELS)
    torch.manual_seed(7)
    torch.testing.assert_close(exported(IMAGES, labels=LABELS).loss, task + sum(out.router_losses.values()))


def gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one batch; noise drawn from the same seed each time."""
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(IMAGES, labels=LABELS).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("preset", ["vmoe", "switch"])
def test_gradient_checkpointing_changes_no_bit_and_keeps_fewer_activations(preset: str, tmp_path: Path, auto: Any) -> None:
    router = dataclasses.replace(ROUTER_PRESETS[preset], capacity_factor=0.8)
    exported = auto(export(make_model(dataclasses.replace(ARCH, router=router, backend="reference")), tmp_path / "out")).train()
    kept: dict[str, int] = {}

    def saved(how: str) -> Any:
        def pack(tensor: Tensor) -> Tensor:
            kept[how] = kept.get(how, 0) + tensor.nbytes
            return tensor

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    with saved("plain"):
        loss, plain = gradients(exported)
    exported.gradient_checkpointing_enable()
    assert all(block.gradient_checkpointing for block in exported.blocks)
    with saved("checkpointed"):
        again, checkpointed = gradients(exported)
    assert torch.equal(again, loss)
    assert all(torch.equal(checkpointed[name], grad) for name, grad in plain.items())
    assert kept["checkpointed"] < kept["plain"] / 4
    exported.gradient_checkpointing_disable()
    assert not any(block.gradient_checkpointing for block in exported.blocks)


class Digits(torch.utils.data.Dataset):
    """Twelve fixed images, the class of each being its number modulo 5."""

    def __init__(self) -> None:
        self.images = torch.randn(12, 3, 28, 28, generator=torch.Generator().manual_seed(5))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[i], "labels": torch.tensor(i % 5)}


def trainer_of(model: Any, out: Path, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "per_device_train_batch_size": 12, "max_steps": 6, "learning_rate": 3e-3, "logging_steps": 1, "report_to": [], "seed": 0,
        "disable_tqdm": True, "use_cpu": True, "save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return Trainer(model=model, args=TrainingArguments(output_dir=str(out), **(settings | changes)), train_dataset=Digits())


def test_trainer_learns_and_its_checkpoint_loads(tmp_path: Path, auto: Any) -> None:
    folder = export(make_model(), tmp_path / "out")
    trainer = trainer_of(auto(folder), tmp_path / "trained", gradient_checkpointing=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and losses[-1] < 0.7 * losses[0]
    saved = tmp_path / "trained" / "checkpoint-6"
    assert (saved / "modeling_vmoe.py").is_file()
    images = Digits().images
    with torch.no_grad():
        want = trainer.model.eval()(images).logits
        assert torch.equal(auto(saved)(images).logits, want)
        assert not torch.equal(auto(folder)(images).logits, want)
    evaluated = trainer.predict(Digits())
    assert evaluated.predictions.shape == (12, 5) and (evaluated.predictions.argmax(1) == evaluated.label_ids).mean() > 0.5


def test_trainers_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path: Path, auto: Any) -> None:
    folder = export(make_model(), tmp_path / "out")
    norms = []
    for micro, accumulation in ((12, 1), (4, 3)):
        changes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation, "max_steps": 1}
        trainer = trainer_of(auto(folder), tmp_path / str(micro), **changes)
        trainer.train()
        norms.append(next(entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry))
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


# What is compiled: (experts, dtype, router in evaluation). Only a tight capacity leaves rows that are nobody's.
COMPILED = {
    "bf16, grouped": ("grouped", torch.bfloat16, RouterConfig()),
    "fp32, dense": ("dense", torch.float32, dataclasses.replace(ROUTER_PRESETS["switch"], eval_capacity_factor=0.7)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_torch_compile_takes_the_whole_model_in_one_graph(name: str, tmp_path: Path, auto: Any) -> None:
    backend, dtype, router = COMPILED[name]
    arch = dataclasses.replace(ARCH, num_blocks=2, moe_blocks=(1,), router=router)
    exported = auto(export(make_model(arch), tmp_path / "out"), expert_backend=backend, dtype=dtype)
    compiled = torch.compile(exported, fullgraph=True)
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (0.05, 0.05)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IMAGES).logits, exported(IMAGES).logits, rtol=rtol, atol=atol)
    exported.train()
    loss, plain = gradients(exported)
    compiled_loss, compiled_gradients = gradients(compiled)
    torch.testing.assert_close(compiled_loss, loss, rtol=rtol, atol=atol)
    for key, grad in plain.items():
        worst = (compiled_gradients[f"_orig_mod.{key}"] - grad).norm() / grad.norm().clamp(min=1e-6)
        assert worst < (1e-4 if dtype == torch.float32 else 0.2), key


def test_torch_compile_in_fp32_takes_the_loop(tmp_path: Path, auto: Any) -> None:
    arch = dataclasses.replace(ARCH, num_blocks=1, moe_blocks=(0,))
    folder = export(make_model(arch), tmp_path / "out")
    exported = auto(folder)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(exported, backend="eager")(IMAGES).logits, exported(IMAGES).logits)
        torch._dynamo.reset()
        # torch's operator refuses to be traced with float32.
        with pytest.raises(Exception, match="expert_backend=grouped cannot run for torch.float32 on cpu .*, compiled; use loop or dense"):
            torch.compile(auto(folder, expert_backend="grouped"), backend="eager", fullgraph=True)(IMAGES)
    torch._dynamo.reset()
