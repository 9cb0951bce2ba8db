"""The model card of an exported folder, read by huggingface_hub's own parser."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from m2mkd_ds.config import ROUTER_PRESETS, RouterConfig
from tests.checkpoint.exported_models import ARCH, export, make_model

CARD: dict[str, Any] = {
    "name": "vmoe-fashion",
    "dataset": "fashion-mnist",
    "metrics": {"top1": 0.91, "top1_ci": [0.904, 0.916], "top5": 0.995, "loss": 0.3},
    "experts": [{"block": 1, "load": [30, 10, 60, 0], "entropy": 1.25, "drop_rate": 0.02}],
    "recipe": {"name": "fashion", "m2mkd": {"lr": 1e-3}},
    "lineage": {"teacher": "abc|def", "train_data": "482ddb"},
    "training": [
        {"phase": "m2mkd", "steps": 7, "ranks": 2, "commit": "0123abcd"},
        {"phase": "end_to_end", "steps": 9, "ranks": 2, "commit": "4567"},
    ],
    "data_licence": "fashion-mnist: MIT",
    "intended_use": "tests",
}  # fmt: skip


def test_the_model_card_is_read_by_the_hubs_own_parser(tmp_path: Path) -> None:
    from huggingface_hub import EvalResult, ModelCard

    text = (export(make_model(), tmp_path / "out", card=CARD) / "README.md").read_text()
    parsed = ModelCard(text)
    assert parsed.data.license == "mit" and parsed.data.library_name == "transformers"
    assert parsed.data.pipeline_tag == "image-classification" and "arxiv:2402.16918" in (parsed.data.tags or [])
    results = {r.metric_name: r for r in parsed.data.eval_results or []}
    assert all(isinstance(r, EvalResult) and r.task_type == "image-classification" for r in results.values())
    assert {name: r.metric_value for name, r in results.items()} == {"top-1 accuracy": 0.91, "top-5 accuracy": 0.995}
    assert results["top-1 accuracy"].metric_args == {"confidence_interval_95": [0.904, 0.916]}
    assert results["top-1 accuracy"].dataset_name == "fashion-mnist" and results["top-1 accuracy"].dataset_split == "validation"
    for expected in (
        "# vmoe-fashion", "| m2mkd.lr | 0.001 |", "abc\\|def", "## Intended use\n\ntests", "4 blocks of width 32",
        "| top1 | 0.91 | 0.904 to 0.916 |", "| loss | 0.3 |  |", "| train_data | 482ddb |",
        "| 1 | 30.0 10.0 60.0 0.0 | 1.25 | 2 |", "| phase | steps | ranks | commit |\n|---|---|---|---|\n| m2mkd | 7 | 2 | 0123abcd |",
        "Weights: `mit`. Training images: fashion-mnist: MIT.", "trained by module-to-module knowledge distillation",
        "2402.16918", "2106.05974", "2212.04129", "## Limits",
    ):  # fmt: skip
        assert expected in text, expected


def test_the_card_says_only_what_is_known(tmp_path: Path) -> None:
    text = (export(make_model(), tmp_path / "out") / "README.md").read_text()
    assert not any(f"## {title}\n" in text for title in ("Results", "Expert load", "Training", "Recipe", "Lineage"))
    assert "model-index" not in text and "# out\n" in text


def test_the_card_says_what_the_weights_are_stored_in(tmp_path: Path) -> None:
    def text(dtype: str) -> str:
        return (export(make_model(), tmp_path / dtype, card=CARD, dtype=dtype) / "README.md").read_text()

    assert "Weights are stored in float32." in text("fp32")
    assert "Weights are stored in bfloat16, those of the routers in float32; the accuracies below were measured before" in text("bf16")


def test_limits_follow_the_router(tmp_path: Path) -> None:
    def limits(router: RouterConfig, place: str) -> str:
        model = make_model(dataclasses.replace(ARCH, router=router))
        text = (export(model, tmp_path / place, card={"origin": "trained by hand"}) / "README.md").read_text()
        assert "trained by hand: 4 blocks" in text and "trained by module-to-module" not in text
        return text.partition("## Limits")[2].partition("\n## ")[0]

    assert "batch" not in limits(RouterConfig(), "a")
    assert "depend on the other images of its batch" in limits(RouterConfig(eval_capacity_factor=1.0), "b")
    assert "depend on the other images of its batch" in limits(ROUTER_PRESETS["expert_choice"], "c")
    assert "leaves the routers' balance biases as they are" in limits(ROUTER_PRESETS["loss_free"], "d")
