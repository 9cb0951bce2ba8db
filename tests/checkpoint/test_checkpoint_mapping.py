"""Loading by rules: what is used, dropped, filled, fresh, and what the error names."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from m2mkd_ds.checkpoint.mapping import (
    Alias,
    Convert,
    Drop,
    Fresh,
    MappingError,
    Rename,
    Stack,
    apply_rules,
    load_exact,
    same_bits,
    transform,
)

DENSE = {"norm1.weight": (4,), "mlp.fc1.weight": (8, 4), "mlp.fc1.bias": (8,), "mlp.fc2.weight": (4, 8), "mlp.fc2.bias": (4,)}
SPARSE = {"norm1.weight": (4,), "moe.router.weight": (2, 4), "moe.experts.up_proj": (2, 8, 4), "moe.experts.down_proj": (2, 4, 8)}


def blocks(numbers: range, parts: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {f"blocks.{i}.{name}": torch.full(shape, float(i)) for i in numbers for name, shape in parts.items()}


def shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def test_without_rules_names_must_agree_exactly() -> None:
    source = blocks(range(2), DENSE)
    tensors, report = apply_rules(source, shapes(source))
    assert tensors.keys() == source.keys() and all(tensors[k] is source[k] for k in source)
    assert report.summary() == "10 tensors filled from 10 source keys"


def test_every_rule_does_its_work_and_the_counts_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    source = {
        "a.weight": torch.tensor([1.0, 2.0]),
        "copy.a.weight": torch.tensor([1.0, 2.0]),
        "flat": torch.arange(6.0),
        "e.1.w": torch.tensor([[3.0]]),
        "e.0.w": torch.tensor([[2.0]]),
        "e.2.w": torch.tensor([[4.0]]),
        "junk.1": torch.zeros(1),
        "junk.2": torch.zeros(1),
    }
    rules = [
        Alias(r"copy\.(.+)", r"\1.new"),
        Rename(r"a\.(weight)", r"a.\1.new"),
        Convert(r"flat", "matrix", lambda t: t.reshape(2, 3).T),
        Stack(r"e\.(?P<index>\d+)\.w", "experts"),
        Drop(r"junk\.\d", "not a weight"),
        Fresh(r"head\..+", "another number of classes"),
    ]
    with caplog.at_level(logging.INFO, "m2mkd_ds"):
        tensors, report = apply_rules(source, {"a.weight.new": (2,), "matrix": (3, 2), "experts": (3, 1), "head.weight": (5, 2)}, rules)
    assert tensors["matrix"].tolist() == [[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]
    assert tensors["experts"].tolist() == [[2.0], [3.0], [4.0]]
    assert tensors["a.weight.new"].tolist() == [1.0, 2.0] and "head.weight" not in tensors
    assert report.origin["experts"] == ("e.0.w", "e.1.w", "e.2.w") and report.origin["a.weight.new"] == ("a.weight", "copy.a.weight")
    # 2 + 1 + 3 source keys made 3 tensors; 2 were dropped; 1 target stays fresh.
    counts = "3 tensors filled from 6 source keys, 2 dropped (not a weight), 1 fresh (another number of classes)"
    assert report.summary() == counts and counts in caplog.text


def test_more_than_ten_parts_are_stacked_by_number_and_not_by_text() -> None:
    source = {f"e.{i}.w": torch.tensor([float(i)]) for i in range(12)}
    tensors, _ = transform(source, [Stack(r"e\.(?P<index>\d+)\.w", "w")])
    assert tensors["w"].tolist() == list(range(12))


def test_sparse_stage_into_dense_target_names_the_keys_of_both() -> None:
    with pytest.raises(MappingError, match=r"blocks\.3\.moe\.router\.weight") as caught:
        apply_rules(blocks(range(3, 6), SPARSE), shapes(blocks(range(3, 6), DENSE)))
    assert len(caught.value.unused) == 9 and len(caught.value.unfilled) == 12
    assert "9 source keys that the target does not have" in str(caught.value) and "12 target keys" in str(caught.value)
    assert "blocks.3.mlp.fc1.weight and 2 alike up to blocks.5.mlp.fc1.weight" in str(caught.value)
    assert "(3 keys did)" in str(caught.value)


def test_swapped_module_is_told_by_its_block_numbers() -> None:
    with pytest.raises(MappingError, match=r"only in the source: blocks \[6, 7, 8\], only in the target: blocks \[3, 4, 5\]") as caught:
        apply_rules(blocks(range(6, 9), DENSE), shapes(blocks(range(3, 6), DENSE)))
    assert "blocks.6.norm1.weight" in str(caught.value) and "blocks.3.norm1.weight" in str(caught.value)


def test_missing_module_lists_its_keys() -> None:
    source = {**blocks(range(0, 3), DENSE), **blocks(range(6, 9), DENSE)}
    with pytest.raises(MappingError, match=r"15 target keys that the source does not fill: blocks\.3\.") as caught:
        apply_rules(source, shapes(blocks(range(9), DENSE)))
    assert not caught.value.unused and {key.split(".")[1] for key in caught.value.unfilled} == {"3", "4", "5"}


def test_shape_mismatch_gives_both_shapes() -> None:
    with pytest.raises(MappingError, match=r"head\.weight source \[10, 4\] target \[5, 4\]"):
        apply_rules({"head.weight": torch.zeros(10, 4)}, {"head.weight": (5, 4)})


def test_long_lists_are_cut_in_the_text_and_whole_in_the_attribute() -> None:
    source = {f"{letter}{letter}.weight": torch.zeros(1) for letter in "abcdefghijklmnopqrstuvwxyz"}
    with pytest.raises(MappingError, match="and 14 more") as caught:
        apply_rules(source, {})
    assert len(caught.value.unused) == 26 and len(str(caught.value)) < 600
    assert str(caught.value.at("file.pth")).startswith("file.pth: weights do not fit")


def test_two_sources_for_one_target_are_refused() -> None:
    rules = [Rename(r"(?:old|new)\.(w)", r"\1")]
    with pytest.raises(MappingError, match=r"1 keys claimed twice: w \(from new\.w and old\.w\)"):
        transform({"old.w": torch.zeros(1), "new.w": torch.zeros(1)}, rules)


def test_copies_that_differ_in_one_bit_are_refused() -> None:
    source = {"w": torch.tensor([0.0, 1.0]), "copy.w": torch.tensor([-0.0, 1.0])}
    with pytest.raises(MappingError, match=r"w \(w and copy\.w should be copies but differ\)"):
        transform(source, [Alias(r"copy\.(w)", r"\1")])
    tensors, _ = transform({"copy.w": source["copy.w"]}, [Alias(r"copy\.(w)", r"\1")])
    assert tensors["w"] is source["copy.w"]


def test_stack_with_a_gap_is_refused() -> None:
    source = {f"e.{i}.w": torch.zeros(1) for i in (0, 2)}
    with pytest.raises(MappingError, match=r"numbered \[0, 2\], expected 0 to 1"):
        transform(source, [Stack(r"e\.(?P<index>\d+)\.w", "w")])


def test_fresh_target_that_the_source_fills_is_a_clash() -> None:
    with pytest.raises(MappingError, match=r"head\.weight \(declared fresh: new classes; the source fills it too"):
        apply_rules({"head.weight": torch.zeros(1)}, {"head.weight": (1,)}, [Fresh(r"head\..+", "new classes")])


def test_same_bits_sees_nan_as_equal_and_dtype_as_different() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone()) and not same_bits(nan, nan.bfloat16()) and same_bits(torch.tensor(1.0), torch.tensor(1.0))
    base = torch.arange(4.0).reshape(2, 2)
    assert same_bits(base.T, base.T.clone()) and not same_bits(base.T, base)


def test_load_exact_copies_values_and_keeps_dtype() -> None:
    module = nn.Linear(2, 3).bfloat16()
    source = {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}
    load_exact(module, source)
    assert module.weight.dtype == torch.bfloat16 and module.weight.tolist() == source["weight"].tolist()
    source["bias"].zero_()
    assert module.bias.tolist() == [1.0, 1.0, 1.0]


def test_load_exact_refuses_extra_and_missing_keys_and_changes_nothing() -> None:
    module = nn.Linear(2, 3)
    before = module.weight.detach().clone()
    with pytest.raises(MappingError, match="bias"):
        load_exact(module, {"weight": torch.zeros(3, 2)})
    with pytest.raises(MappingError, match="scale"):
        load_exact(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "scale": torch.zeros(1)})
    assert torch.equal(module.weight, before)


def test_load_exact_leaves_fresh_keys_as_they_were() -> None:
    module = nn.Linear(2, 3)
    bias = module.bias.detach().clone()
    report = load_exact(module, {"weight": torch.zeros(3, 2)}, fresh=[Fresh("bias", "test")])
    assert torch.equal(module.bias, bias) and report.fresh == {"bias": "test"}


def test_load_exact_fills_a_meta_module_with_values_of_its_own() -> None:
    source = {"weight": torch.ones(3, 2), "bias": torch.ones(3)}
    with torch.device("meta"):
        first, second = nn.Linear(2, 3), nn.Linear(2, 3)
    second.weight.requires_grad_(False)
    load_exact(first, source)
    load_exact(second, source)
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.tolist() == source["weight"].tolist() == torch.ones(3, 2).tolist()
    assert first.weight.requires_grad and not second.weight.requires_grad
    with torch.device("meta"):
        third = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="bias cannot stay fresh"):
        load_exact(third, {"weight": torch.ones(3, 2)}, fresh=[Fresh("bias", "test")])
