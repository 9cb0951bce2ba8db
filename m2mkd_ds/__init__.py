"""m2mkd_ds: module-to-module distillation of a pretrained ViT into a sparse Vision-MoE, on DeepSpeed (arXiv 2402.16918)."""

__version__ = "0.1.0"
