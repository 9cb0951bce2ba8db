"""The quickstart: Fashion-MNIST on two CPU cores, from images to a Hugging Face folder in a quarter of an hour."""

from __future__ import annotations

from dataclasses import replace

from m2mkd_ds.config import (
    AugmentConfig,
    DataConfig,
    DistillConfig,
    ExportConfig,
    LaunchConfig,
    MetaConfig,
    MoEConfig,
    PhaseConfig,
    RouterConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
)


def fashion() -> RunConfig:
    """Fashion-MNIST (60,000 + 10,000 images, 28x28), a teacher of 6 blocks in 3 modules, a V-MoE of 6 blocks with 4 experts.

    Command:   ./scripts/quickstart.sh      or      m2mkd pipeline --recipe fashion --run-dir runs/fashion
    Hardware:  2 CPU cores (2 ranks), about ten minutes.
    Expected:  top-1 of the teacher 83.4 %, of the final student 82.2 %, of the baseline from scratch 82.9 % (seed 0): a run this
               short does not show the method's gain (docs/log.md).
    """
    phase = PhaseConfig(
        epochs=1, micro_batch_size=64, lr=1.5e-3, lr_batch=0, min_lr=1e-5, warmup_epochs=0.1, warmup_lr=1e-5, clip_grad=1.0,
        precision="fp32", eval_epochs=0.5, checkpoint_steps=250, log_steps=20,
    )  # fmt: skip
    return RunConfig(
        name="fashion",
        data=DataConfig(
            source="fashion_mnist", num_classes=10, image_size=28, mean=(0.286, 0.286, 0.286), std=(0.353, 0.353, 0.353),
            crop_pct=1.0, interpolation="bilinear", num_workers=0,
            augment=AugmentConfig(crop_scale=(0.9, 1.0), hflip=0.5, label_smoothing=0.1),
        ),
        teacher=TeacherConfig(
            arch="vit_tiny_patch16_224", arch_args={"patch_size": 7, "embed_dim": 96, "depth": 6, "num_heads": 3}, depths=(2, 2, 2)
        ),
        meta=MetaConfig(depths=(1, 1, 1)),
        student=StudentConfig(
            embed_dim=64, num_heads=2, patch_size=7, mlp_ratio=2.0, depths=(2, 2, 2), keep_stitches=True,
            moe=MoEConfig(num_experts=4, router=RouterConfig(top_k=2)),
        ),
        distill=DistillConfig(kd_weight=0.5, temperature=1.0),
        pretrain_meta=phase,
        modular_train=phase,
        assemble_finetune=replace(phase, warmup_epochs=0.0, lr=1e-3),
        m2mkd=phase,
        end_to_end=replace(phase, warmup_epochs=0.0, lr=1e-3),
        launch=LaunchConfig(num_gpus=2, one_job=True),
        export=ExportConfig(license="mit"),
    )  # fmt: skip


def fashion_pretrained() -> RunConfig:
    """As `fashion`, with a teacher from a file (same shape), for which only the meta model is trained.

    Command:   m2mkd pipeline --recipe fashion_pretrained --set teacher.weights=TEACHER.safetensors
    Hardware:  2 CPU cores, about eight minutes.
    Expected:  as `fashion`, with the teacher's own accuracy.
    """
    base = fashion()
    teacher = replace(base.teacher, source="pretrained", weights="teacher.safetensors")
    return replace(base, name="fashion_pretrained", teacher=teacher)
