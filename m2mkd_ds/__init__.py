"""m2mkd_ds: module-to-module distillation of a pretrained ViT into a sparse Vision-MoE, on DeepSpeed (arXiv 2402.16918)."""

from typing import Any

__version__ = "0.1.0"


def create_model(name_or_path: Any, **kwargs: Any) -> Any:
    """A student as a timm-style model; what `m2mkd_ds.timm_models.create_model` says, which is imported when this is called."""
    from m2mkd_ds.timm_models import create_model as create

    return create(name_or_path, **kwargs)
