"""The model card (README.md) of an exported folder: YAML header that the Hub reads, then text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
}

@inproceedings{riquelme2021scaling,
  title     = {Scaling Vision with Sparse Mixture of Experts},
  author    = {Carlos Riquelme and Joan Puigcerver and Basil Mustafa and Maxim Neumann and Rodolphe Jenatton and
               Andr{\\'e} Susano Pinto and Daniel Keysers and Neil Houlsby},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2021},
  note      = {arXiv:2106.05974}
}

@article{ni2022deep,
  title   = {Deep Incubation: Training Large Models by Divide-and-Conquering},
  author  = {Zanlin Ni and Yulin Wang and Jiangwei Yu and Haojun Jiang and Yue Cao and Gao Huang},
  journal = {arXiv preprint arXiv:2212.04129},
  year    = {2022}
}"""
_ORIGIN = f"trained by module-to-module knowledge distillation (m2mKD, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER}))"
_KNOWN_KEYS = ("name", "origin", "dataset", "metrics", "experts", "recipe", "lineage", "training", "data_licence")
_USAGE = """```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH_OR_REPOSITORY", trust_remote_code=True)
classify("image.png")
```

The folder carries its own model code (torch and transformers only), therefore `trust_remote_code=True`; read it first, and pin
`revision=` when you load from a hub. `AutoModelForImageClassification` gives the classifier, `AutoModel` the features without its head,
`AutoImageProcessor` the evaluation transform bit for bit. `from_pretrained(..., expert_backend="loop")` picks how experts are computed
(`auto`, `grouped`, `loop`, `dense`), `attn_implementation="eager"` shows attention weights. Routers compute in float32 in every dtype."""


def write_card(path: Path, arch: VMoEArch, *, dtype: str, license: str, card: Mapping[str, Any]) -> None:
    """Write README.md. `dtype`: what the weights are stored in, as torch calls it.

    `card` keys with a meaning: `name` (title; required), `origin` (how it was trained, where that is not m2mKD to the end), `dataset`
    (name of the training and evaluation data), `metrics` (name -> number, NAME_ci -> [low, high]; `top1` and `top5` are shares of 1),
    `experts` (rows {block, load: routed rows by expert, entropy, drop_rate}), `recipe` and `lineage` (mapping or text), `training` (rows,
    one a phase), `data_licence` (text). Every other key becomes a section.
    """
    header = yaml.safe_dump(_header(license, card), sort_keys=False, allow_unicode=True)
    free = [(key.replace("_", " ").capitalize(), value) for key, value in card.items() if key not in _KNOWN_KEYS]
    terms = [f"Weights: `{license}`.", f"Training images: {card['data_licence']}." if card.get("data_licence") else ""]
    sections = [
        ("", f"{_summary(arch, card)} {_stored(dtype)}"),
        ("Usage", _USAGE),
        ("Results", _results(card)),
        ("Expert load", _expert_load(card.get("experts") or ())),
        ("Limits", _limits(arch)),
        ("Training", _rows(card.get("training") or ())),
        ("Recipe", card.get("recipe")),
        ("Lineage", card.get("lineage")),
        *free,
        ("Licence", " ".join(filter(None, [*terms, "The terms of the images apply besides those of the weights."]))),
        ("Citation", f"```bibtex\n{CITATION}\n```"),
    ]
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
        values = [{"type": "accuracy", "name": label, "value": float(metrics[key]), **_interval(metrics, key)} for key, label in scores]
        task = {"type": "image-classification", "name": "Image classification"}
        header["model-index"] = [{"name": card["name"], "results": [{"task": task, "dataset": dataset, "metrics": values}]}]
    return header


def _interval(metrics: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The 95 % interval of a metric, where the Hub's format has room for it."""
    ci = metrics.get(f"{key}_ci")
    return {} if ci is None else {"args": {"confidence_interval_95": [float(bound) for bound in ci]}}


def _summary(arch: VMoEArch, card: Mapping[str, Any]) -> str:
    total, active = count_parameters(arch)
    data = f" of {card['dataset']}" if card.get("dataset") else ""
    return (
        f"A Vision Mixture-of-Experts (V-MoE) image classifier with {arch.num_classes} classes{data}, "
        f"{card.get('origin') or _ORIGIN}: {arch.num_blocks} blocks of width {arch.embed_dim}, {len(arch.moe_blocks)} of them with "
        f"{arch.num_experts} experts, {_experts_a_token(arch)}; {total:,} parameters, {active:,} active a token; images of "
        f"{arch.image_size} x {arch.image_size} pixels, patches of "
        f"{arch.patch_size}."
    )


def _stored(dtype: str) -> str:
    if dtype == "float32":
        return "Weights are stored in float32."
    return f"Weights are stored in {dtype}, those of the routers in float32; the accuracies below were measured before that rounding."


def _experts_a_token(arch: VMoEArch) -> str:
    if arch.router.kind == "expert_choice":
        return f"which choose their tokens, {arch.router.capacity_factor:g} experts a token on the average"
    return f"{arch.router.top_k} used a token"


def _results(card: Mapping[str, Any]) -> str:
    """Every metric with its 95 % interval."""
    metrics = card.get("metrics") or {}
    rows = []
    for key, value in metrics.items():
        if key.endswith("_ci"):
            continue
        low_high = metrics.get(f"{key}_ci")
        interval = "" if low_high is None else f"{_cell(float(low_high[0]))} to {_cell(float(low_high[1]))}"
        rows.append({"metric": key, "value": value, "95 % interval": interval})
    return _rows(rows)


def _expert_load(experts: Sequence[Mapping[str, Any]]) -> str:
    """How evenly each block's experts are used on the validation images."""
    rows = []
    for block in experts:
        total = max(sum(block["load"]), 1)
        shares = " ".join(f"{100 * load / total:.1f}" for load in block["load"])
        rows.append(
            {
                "block": block["block"],
                "rows an expert, % of all": shares,
                "routing entropy, nats": float(block["entropy"]),
                "dropped choices, %": 100 * float(block["drop_rate"]),
            }
        )
    return _rows(rows)


def _limits(arch: VMoEArch) -> str:
    limits = [
        f"Images of {arch.image_size} x {arch.image_size} pixels only, and the {arch.num_classes} classes it was trained on: every image "
        "gets one of them. It was not tested on images from elsewhere, nor for bias between groups of people."
    ]
    if arch.moe_blocks and (arch.router.eval_capacity_factor > 0 or arch.router.kind == "expert_choice"):
        limits.append(
            "Experts have a bounded capacity, so an image's logits depend on the other images of its batch; one image a batch is the only "
            "reproducible way to ask."
        )
    if arch.moe_blocks and arch.router.balance_rate > 0:
        limits.append("Fine-tuning leaves the routers' balance biases as they are.")
    return "\n".join(f"- {limit}" for limit in limits)


def _rows(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with the same keys."""
    if not rows:
        return ""
    head = list(rows[0])
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(_cell(row[key]) for key in head)} |" for row in rows)]
    return "\n".join(lines)


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
