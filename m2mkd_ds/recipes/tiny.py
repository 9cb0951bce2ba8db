"""The smallest complete runs: scikit-learn's digits, two CPU ranks, the whole DAG in about two minutes. The tests use them."""

from __future__ import annotations

from dataclasses import replace

from m2mkd_ds.config import (
    AugmentConfig,
    DataConfig,
    LaunchConfig,
    MetaConfig,
    MoEConfig,
    PhaseConfig,
    RouterConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)


def tiny() -> RunConfig:
    """1,797 digits of 8x8 pixels, a teacher of 4 blocks in 2 modules, a student of 4 MoE blocks with 4 experts.

    Command:   m2mkd pipeline --recipe tiny --run-dir runs/tiny
    Hardware:  2 CPU cores (2 ranks), about two minutes, most of it the start of the launcher for each phase.
    Expected:  about 90 % and more for every trained model; too small and too short to compare methods.
    """
    phase = PhaseConfig(
        epochs=8, micro_batch_size=16, lr=2e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=1.0, warmup_lr=1e-5, clip_grad=1.0,
        precision="fp32",
        eval_epochs=0.0, checkpoint_steps=100, log_steps=5,
    )  # fmt: skip
    return RunConfig(
        name="tiny",
        data=DataConfig(
            source="digits", num_classes=10, image_size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0,
            interpolation="bilinear", num_workers=0,
            augment=AugmentConfig(crop_scale=(0.9, 1.0), hflip=0.0, label_smoothing=0.1),
        ),
        teacher=TeacherConfig(
            arch="vit_tiny_patch16_224", arch_args={"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 2}, depths=(2, 2)
        ),
        meta=MetaConfig(depths=(1, 1)),
        student=StudentConfig(
            embed_dim=48, num_heads=2, patch_size=4, mlp_ratio=2.0, depths=(2, 2),
            moe=MoEConfig(num_experts=4, router=RouterConfig(top_k=2)),
        ),
        pretrain_meta=phase,
        modular_train=phase,
        assemble_finetune=replace(phase, epochs=4, warmup_epochs=0.0, lr=1e-3),
        m2mkd=phase,
        end_to_end=replace(phase, epochs=5, warmup_epochs=0.0, lr=1e-3),
        launch=LaunchConfig(num_gpus=2, one_job=True),
    )  # fmt: skip


def tiny_pretrained() -> RunConfig:
    """As `tiny`, but the teacher is a file: any timm VisionTransformer of this shape, trained elsewhere; only M is trained for it.

    Command:   m2mkd pipeline --recipe tiny_pretrained --run-dir runs/tp --set teacher.weights=TEACHER.safetensors
               (for example runs/tiny/assemble_finetune/weights.safetensors, or a file of timm's own train.py)
    Hardware:  2 CPU cores, about a minute and a half.
    Expected:  as `tiny`.
    """
    base = tiny()
    teacher = replace(base.teacher, source="pretrained", weights="teacher.safetensors")
    return replace(base, name="tiny_pretrained", teacher=teacher)
