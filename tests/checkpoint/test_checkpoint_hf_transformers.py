"""What users of transformers expect of a model: auto classes, outputs, dtypes, new heads, saving again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from m2mkd_ds.checkpoint.hf.export import load_exported
from tests.checkpoint.exported_models import IMAGES, NAMES, STITCHES, export, logits, make_model

MODEL_CODE = {"configuration_vmoe.py", "experts_vmoe.py", "modeling_vmoe.py", "routing_vmoe.py"}


def test_save_pretrained_round_trip(tmp_path: Path, auto: Any) -> None:
    from transformers import AutoModel, AutoModelForImageClassification

    model = make_model(stitches=STITCHES)
    auto(export(model, tmp_path / "out")).save_pretrained(tmp_path / "again", max_shard_size="60KB")
    assert len(list((tmp_path / "again").glob("model-*-of-*.safetensors"))) > 2
    assert MODEL_CODE <= {p.name for p in (tmp_path / "again").iterdir()}
    second, info = AutoModelForImageClassification.from_pretrained(tmp_path / "again", trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert second.config.id2label == dict(enumerate(NAMES))
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(second.eval()), logits(model))
    assert type(AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)).__name__ == "VMoEModel"
    assert load_exported(tmp_path / "out").arch == model.arch


def test_the_backbone_gives_what_the_head_sees(tmp_path: Path, auto: Any) -> None:
    from transformers import AutoModel

    model = make_model(stitches=STITCHES)
    folder = export(model, tmp_path / "out")
    backbone, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert set(backbone.state_dict()) == {k for k in model.state_dict() if not k.startswith("head.")}
    with torch.no_grad():
        out = backbone.eval()(IMAGES)
        plain = backbone(IMAGES, return_dict=False)
    assert out.last_hidden_state.shape == (3, 17, 32) and torch.equal(plain[0], out.last_hidden_state)
    assert torch.equal(model.head(out.pooler_output), logits(model))


def test_hidden_states_attentions_and_tuple_output(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    exported = auto(folder)
    out = exported(IMAGES, output_hidden_states=True)
    assert [tuple(h.shape) for h in out.hidden_states] == [(3, 17, 32)] * 5 and out.attentions is None
    assert torch.equal(model.head(model.norm(out.hidden_states[-1][:, 0])), out.logits)
    plain = exported(IMAGES, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], out.logits)
    with pytest.raises(ValueError, match="takes images of 28 x 28 pixels"):
        exported(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="output_attentions=True needs attn_implementation='eager', .* 'sdpa'"):
        exported(IMAGES, output_attentions=True)


def test_eager_attention_is_sdpa_and_shows_its_weights(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out")
    assert auto(folder).config._attn_implementation == "sdpa"
    eager = auto(folder, attn_implementation="eager")
    out = eager(IMAGES, output_attentions=True)
    torch.testing.assert_close(out.logits, logits(model), rtol=1e-4, atol=1e-5)
    assert [tuple(a.shape) for a in out.attentions] == [(3, 4, 17, 17)] * 4
    torch.testing.assert_close(out.attentions[2].sum(dim=-1), torch.ones(3, 4, 17))
    # By hand, for the first block: softmax(q k^T / sqrt(32 / 4)) of the normed embeddings.
    x = model.blocks["0"].norm1(eager(IMAGES, output_hidden_states=True).hidden_states[0])
    q, k, _ = model.blocks["0"].attn.qkv(x).view(3, 17, 3, 4, 8).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(8)
    torch.testing.assert_close(out.attentions[0], scores.softmax(dim=-1))


@pytest.mark.parametrize(("dtype", "torch_dtype", "atol"), [("bf16", torch.bfloat16, 0.1), ("fp16", torch.float16, 0.02)])
def test_half_precision_keeps_the_router_in_fp32(dtype: str, torch_dtype: torch.dtype, atol: float, tmp_path: Path, auto: Any) -> None:
    model = make_model()
    folder = export(model, tmp_path / "out", dtype=dtype)
    for exported in (auto(folder), auto(export(model, tmp_path / "fp32"), dtype=torch_dtype)):
        dtypes = {name: p.dtype for name, p in exported.named_parameters()}
        assert {d for n, d in dtypes.items() if ".router." in n} == {torch.float32}
        assert {d for n, d in dtypes.items() if ".router." not in n} == {torch_dtype}
        assert logits(exported).dtype == torch_dtype
        torch.testing.assert_close(logits(exported).float(), logits(model), rtol=atol, atol=atol)
        assert torch.equal(exported.blocks[0].moe.router.weight, model.state_dict()["blocks.0.moe.router.weight"])
    tensors = load_exported(folder).tensors
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    assert torch.equal(tensors["blocks.0.moe.router.weight"], model.state_dict()["blocks.0.moe.router.weight"])
    assert torch.equal(tensors["norm.weight"], model.state_dict()["norm.weight"].to(torch_dtype).float())


@pytest.mark.parametrize("place", ["all on the CPU", "part on the disk"])
def test_accelerate_places_the_model(place: str, tmp_path: Path, auto: Any) -> None:
    model = make_model(stitches=STITCHES)
    folder = export(model, tmp_path / "out", max_shard_size="60KB")
    if place == "all on the CPU":
        placed = auto(folder, device_map="auto")
    else:
        placed = auto(folder, device_map="auto", max_memory={"cpu": "150KB"}, offload_folder=str(tmp_path / "offload"))
        places = {str(p.device) for p in placed.parameters()}
        assert places == {"cpu", "meta"} and "disk" in placed.hf_device_map.values()
    assert torch.equal(logits(placed), logits(model))


def test_weights_are_loaded_without_a_second_copy(tmp_path: Path, auto: Any) -> None:
    from transformers import AutoModelForImageClassification

    model = make_model()
    folder = export(model, tmp_path / "out")
    made: list[str] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (torch.empty, torch.Tensor.normal_, torch.nn.init.trunc_normal_) and isinstance(out, torch.Tensor):
                made.extend([str(out.device)] * (out.numel() > 500))
            return out

    with Watch():
        loaded = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True, low_cpu_mem_usage=True)
    assert made and set(made) == {"meta"}  # the model is built without memory, then the file's tensors take the places
    assert torch.equal(logits(loaded.eval()), logits(model))


def test_a_new_head_is_initialised_and_the_rest_is_kept(tmp_path: Path, auto: Any) -> None:
    model = make_model()
    exported = auto(export(model, tmp_path / "out"), num_labels=7, ignore_mismatched_sizes=True)
    assert exported.head.weight.shape == (7, 32)
    assert exported.head.weight.std().item() == pytest.approx(0.02, rel=0.3)
    weights = model.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in exported.state_dict().items() if not k.startswith("head."))


def test_a_model_from_the_config_alone_is_fully_initialised(tmp_path: Path, auto: Any) -> None:
    from transformers import AutoModelForImageClassification

    config = auto(export(make_model(), tmp_path / "out")).config
    fresh = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    for name, p in fresh.named_parameters():
        scale = 0.02 if p.ndim > 1 and not name.endswith("bias") and name != "cls_token" else 1e-6
        assert p.std().item() == pytest.approx(scale, rel=0.35, abs=2e-6), name


def test_without_trust_the_error_names_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForImageClassification

    folder = export(make_model(), tmp_path / "out")
    with pytest.raises(ValueError, match=f"(?s){folder}.*trust_remote_code=True"):
        AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=False)
