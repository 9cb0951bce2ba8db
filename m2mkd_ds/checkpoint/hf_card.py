"""The model card (README.md) of an exported folder: YAML header that the Hub reads, then text for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from m2mkd_ds.models.vmoe import VMoEArch, count_parameters

PAPER = "2402.16918"
CITATION = """@article{lo2024m2mkd,
  title   = {m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers},
  author  = {Ka Man Lo and Yiming Liang and Wenyu Du and Yuantao Fan and Zili Wang and Wenhao Huang and Lei Ma and Jie Fu},
  journal = {arXiv preprint arXiv:2402.16918},
  year    = {2024}
}"""
_KNOWN_KEYS = ("name", "dataset", "metrics", "recipe", "lineage")
_USAGE = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH_OR_REPOSITORY", trust_remote_code=True)
classify("image.png")
```

The folder carries its own model code (two files, torch and transformers only), therefore `trust_remote_code=True`; read them first, and pin
`revision=` when you load from a hub. `AutoModelForImageClassification.from_pretrained(..., expert_backend="loop")` picks how
experts are computed (`auto`, `grouped`, `loop`). `AutoImageProcessor.from_pretrained(..., backend="pil")` resizes exactly as in training;
the default torchvision backend differs in the last bits of resized pixels."""


def write_card(path: Path, arch: VMoEArch, *, license: str, card: Mapping[str, Any]) -> None:
    """Write README.md.

    `card` keys with a meaning: `name` (title; required), `dataset` (name of the training and evaluation data), `metrics` (name -> number;
    `top1` and `top5` are shares of 1), `recipe` and `lineage` (mapping or text). Every other key becomes a section of its own.
    """
    header = yaml.safe_dump(_header(license, card), sort_keys=False, allow_unicode=True)
    known = [("Results", card.get("metrics")), ("Recipe", card.get("recipe")), ("Lineage", card.get("lineage"))]
    free = [(key.replace("_", " ").capitalize(), value) for key, value in card.items() if key not in _KNOWN_KEYS]
    sections = [("", _summary(arch, card)), ("Usage", _USAGE), *known, *free]
    sections.append(("Licence", f"Weights: `{license}`. Terms of the training images apply besides."))
    sections.append(("Citation", f"```bibtex\n{CITATION}\n```"))
    parts = [f"## {title}\n\n{_text(value)}" if title else _text(value) for title, value in sections if value]
    path.write_text(f"---\n{header}---\n\n# {card['name']}\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")


def _header(license: str, card: Mapping[str, Any]) -> dict[str, Any]:
    header: dict[str, Any] = {
        "license": license,
        "library_name": "transformers",
        "pipeline_tag": "image-classification",
        "tags": ["vision", "mixture-of-experts", "v-moe", "knowledge-distillation", "m2mkd", f"arxiv:{PAPER}"],
        "metrics": ["accuracy"],
    }
    metrics = card.get("metrics") or {}
    scores = [(key, label) for key, label in (("top1", "top-1 accuracy"), ("top5", "top-5 accuracy")) if key in metrics]
    if card.get("dataset") and scores:
        dataset = {"name": card["dataset"], "type": card["dataset"], "split": "validation"}
        values = [{"type": "accuracy", "name": label, "value": float(metrics[key])} for key, label in scores]
        task = {"type": "image-classification", "name": "Image classification"}
        header["model-index"] = [{"name": card["name"], "results": [{"task": task, "dataset": dataset, "metrics": values}]}]
    return header


def _summary(arch: VMoEArch, card: Mapping[str, Any]) -> str:
    total, active = count_parameters(arch)
    data = f" of {card['dataset']}" if card.get("dataset") else ""
    return (
        f"A Vision Mixture-of-Experts (V-MoE) image classifier with {arch.num_classes} classes{data}, trained by module-to-module "
        f"knowledge distillation (m2mKD, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})): {arch.num_blocks} blocks of width "
        f"{arch.embed_dim}, {len(arch.moe_blocks)} of them with {arch.num_experts} experts, {_experts_a_token(arch)}; "
        f"{total:,} parameters, {active:,} active a token; images of {arch.image_size} x {arch.image_size} pixels, patches of "
        f"{arch.patch_size}."
    )


def _experts_a_token(arch: VMoEArch) -> str:
    if arch.router.kind == "expert_choice":
        return f"which choose their tokens, {arch.router.capacity_factor:g} experts a token on the average"
    return f"{arch.router.top_k} used a token"


def _text(value: Any) -> str:
    """Text as it is; a mapping as a table with dotted names."""
    if not isinstance(value, Mapping):
        return str(value)
    rows = [f"| {key} | {_cell(item)} |" for key, item in _flat(value, "")]
    return "\n".join(["| | |", "|---|---|", *rows])


def _flat(value: Mapping[str, Any], prefix: str) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key}.") if isinstance(item, Mapping) else [(f"{prefix}{key}", item)]
    return rows


def _cell(item: Any) -> str:
    text = f"{item:.6g}" if isinstance(item, float) else str(item)
    return text.replace("|", "\\|").replace("\n", " ")
