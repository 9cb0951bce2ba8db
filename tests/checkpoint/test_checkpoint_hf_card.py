"""The model card of an exported folder, read by huggingface_hub's own parser."""

from __future__ import annotations

from pathlib import Path

from tests.checkpoint.exported_models import export, make_model


def test_the_model_card_is_read_by_the_hubs_own_parser(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard

    card = {
        "name": "vmoe-fashion", "dataset": "fashion-mnist", "metrics": {"top1": 0.91, "top5": 0.995, "loss": 0.3},
        "recipe": {"name": "fashion", "m2mkd": {"lr": 1e-3}}, "lineage": {"teacher": "abc|def"}, "intended_use": "tests",
    }  # fmt: skip
    text = (export(make_model(), tmp_path / "out", card=card) / "README.md").read_text()
    parsed = ModelCard(text)
    assert parsed.data.license == "mit" and parsed.data.library_name == "transformers"
    assert parsed.data.pipeline_tag == "image-classification" and "arxiv:2402.16918" in (parsed.data.tags or [])
    scores = {r.metric_name: r.metric_value for r in parsed.data.eval_results or []}
    assert scores == {"top-1 accuracy": 0.91, "top-5 accuracy": 0.995}
    for expected in ("# vmoe-fashion", "| m2mkd.lr | 0.001 |", "abc\\|def", "## Intended use\n\ntests", "4 blocks of width 32",
                     "m2mKD: Module-to-Module Knowledge Distillation for Modular Transformers", "| loss | 0.3 |"):  # fmt: skip
        assert expected in text, expected
