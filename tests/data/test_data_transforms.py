"""Facts of transforms and mixing: timm's pixels bit for bit, keyed random numbers, hand-worked targets."""

from __future__ import annotations

import dataclasses
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import Mixup, create_transform
from torch.nn import functional as F
from torchvision import transforms as tv

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.mix import soft_targets
from m2mkd_ds.data.pil_transforms import eval_transform, train_transform
from m2mkd_ds.data.transforms import Mixer, Shift, posterize, train_parts

DEIT = AugmentConfig(hflip=0.5, color_jitter=0.3, auto_augment="rand-m9-mstd0.5-inc1", random_erase=0.25)
PLAIN = AugmentConfig(crop_scale=(0.2, 0.9), color_jitter=0.4, random_erase=1.0)
AUTO = AugmentConfig(auto_augment="original-mstd0.5", random_erase=0.5)


def photo(seed: int = 0, size: tuple[int, int] = (90, 70)) -> Image.Image:
    """A smooth colour image with some noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def timm_train(data: DataConfig) -> Any:
    augment = data.augment
    return create_transform(
        (3, data.image_size, data.image_size),
        is_training=True,
        scale=augment.crop_scale,
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment or None,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
        re_prob=augment.random_erase,
        re_mode="pixel",
    )


@pytest.mark.parametrize("augment", [DEIT, PLAIN, AUTO], ids=["deit", "plain", "autoaugment"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_training_pixels_are_timms_bit_for_bit(augment: AugmentConfig, interpolation: Any) -> None:
    data = DataConfig(image_size=48, augment=augment, interpolation=interpolation)
    ours, theirs = train_transform(data), timm_train(data)
    for number in range(20):
        with KeyedRandom() as keyed:
            keyed.seed("sample", number)
            left = ours(photo(number))
            keyed.seed("sample", number)
            right = theirs(photo(number))
        assert torch.equal(left, right)


@pytest.mark.parametrize("size", [(90, 70), (48, 48), (8, 8)])
def test_evaluation_pixels_are_timms_bit_for_bit(size: tuple[int, int]) -> None:
    data = DataConfig(image_size=48, crop_pct=0.9)
    theirs = create_transform(
        (3, 48, 48), is_training=False, interpolation="bicubic", mean=data.mean, std=data.std, crop_pct=0.9
    )  # fmt: skip
    assert torch.equal(eval_transform(data)(photo(1, size)), theirs(photo(1, size)))


def test_normalise_by_hand() -> None:
    # (255/255 - 0.5) / 0.25 = 2;  (51/255 - 0.1) / 0.5 = 0.2;  (0 - 0) / 1 = 0.
    data = DataConfig(image_size=4, mean=(0.5, 0.1, 0.0), std=(0.25, 0.5, 1.0), crop_pct=1.0)
    image = Image.new("RGB", (4, 4), (255, 51, 0))
    out = eval_transform(data)(image)
    assert out.shape == (3, 4, 4)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([2.0, 0.2, 0.0]))


def test_full_crop_scale_shifts_instead_of_cropping() -> None:
    data = DataConfig(image_size=32, mean=(0, 0, 0), std=(1, 1, 1), augment=AugmentConfig(crop_scale=(1.0, 1.0), hflip=0.0))
    transform = train_transform(data)
    image = photo(3, (32, 32))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    padded = F.pad(pixels, (4, 4, 4, 4))
    windows = {(y, x): padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)}
    seen = set()
    for number in range(400):
        with KeyedRandom() as keyed:
            keyed.seed("sample", number)
            out = transform(image)
        matches = [place for place, window in windows.items() if torch.equal(out, window)]
        assert len(matches) == 1
        seen.add(matches[0])
    # 81 places, 400 draws: about 81 * (1 - (80/81)^400) = 80.4 of them are seen.
    assert len(seen) > 74


def test_shift_equals_torchvisions_pad_and_crop() -> None:
    class Chosen(tv.RandomCrop):
        @staticmethod
        def get_params(img: Any, output_size: Any) -> tuple[int, int, int, int]:
            return top + 3, left + 3, 20, 20

    image = photo(5, (20, 20))
    with KeyedRandom() as keyed:
        for number in range(30):
            keyed.seed("sample", number)
            moved = Shift(3)(image)
            keyed.seed("sample", number)
            left, top = random.randint(-3, 3), random.randint(-3, 3)
            assert np.array_equal(moved, Chosen(20, padding=3)(image))


def test_small_images_are_resized_first() -> None:
    data = DataConfig(image_size=32, augment=AugmentConfig(crop_scale=(1.0, 1.0)))
    assert train_transform(data)(photo(0, (8, 8))).shape == (3, 32, 32)


def test_random_numbers_depend_on_the_key_and_the_callers_are_restored() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = [draw(), draw()]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    found = [draw()]
    with KeyedRandom() as keyed:
        keyed.seed("sample", 5, 6)
        first = draw()
        keyed.seed("sample", 5, 7)
        second = draw()
        keyed.seed("mix", 5, 6)
        third = draw()
        keyed.seed("sample", 5, 6)
        assert draw() == first
    found.append(draw())
    assert found == expected
    for place in range(3):
        assert len({numbers[place] for numbers in (first, second, third)}) == 3


def test_posterize_to_no_bits_is_black_and_the_rest_is_pillows() -> None:
    image = photo(2)
    assert np.array(posterize(image, 0)).max() == 0
    for bits in range(1, 8):
        assert np.array_equal(posterize(image, bits), ImageOps.posterize(image, bits))
    assert np.array_equal(posterize(image, 8), image)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "original", "v0", "augmix-m3"])
def test_every_posterize_of_a_policy_is_the_safe_one(policy: str) -> None:
    def functions(node: Any) -> list[Any]:
        if hasattr(node, "aug_fn"):
            return [node.aug_fn]
        parts = node if isinstance(node, list) else getattr(node, "ops", None) or getattr(node, "policy", None) or []
        return [function for part in parts for function in functions(part)]

    (policy_object,) = train_parts(DataConfig(image_size=32, augment=AugmentConfig(auto_augment=policy))).ops
    names = [(function.__module__, function.__name__) for function in functions(policy_object)]
    assert ("m2mkd_ds.data.transforms", "posterize") in names
    assert ("timm.data.auto_augment", "posterize") not in names


def test_transforms_can_be_sent_to_spawned_workers() -> None:
    transform = train_transform(DataConfig(image_size=32, augment=DEIT))
    copy = pickle.loads(pickle.dumps(transform))
    with KeyedRandom() as keyed:
        keyed.seed("sample", 1)
        left = transform(photo())
        keyed.seed("sample", 1)
        assert torch.equal(left, copy(photo()))


def test_smoothed_targets_by_hand() -> None:
    # V = 4, smoothing 0.2: off = 0.05, on = 1 - 0.2 + 0.05 = 0.85.
    targets_BV = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(targets_BV, torch.tensor([[0.05, 0.05, 0.85, 0.05], [0.85, 0.05, 0.05, 0.05]]))
    assert torch.equal(soft_targets(torch.tensor([1]), 3, 0.0), torch.tensor([[0.0, 1.0, 0.0]]))


def test_smoothed_targets_are_torchs_label_smoothing() -> None:
    torch.manual_seed(0)
    logits_BV, labels_B = torch.randn(16, 10, dtype=torch.float64), torch.randint(0, 10, (16,))
    ours = F.cross_entropy(logits_BV, soft_targets(labels_B, 10, 0.1).double())
    torch.testing.assert_close(ours, F.cross_entropy(logits_BV, labels_B, label_smoothing=0.1), rtol=1e-7, atol=0)


def mixed(augment: AugmentConfig, *, step: int = 3, group: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four constant images of value 0, 1, 2, 3 with labels 0..3, and what the mixer makes of them as one group."""
    augment = dataclasses.replace(augment, mix_group=4)
    images_BCHW = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8).clone()
    labels_B = torch.arange(4)
    out_BCHW, targets_BV = Mixer(augment, 4, seed)(images_BCHW.clone(), labels_B, step=step, in_step=4 * group)
    return images_BCHW, out_BCHW, targets_BV


def test_mixup_by_hand() -> None:
    # Sample 0 (value 0) is mixed with sample 3 (value 3): lam * 0 + (1 - lam) * 3, so lam = 1 - value / 3.
    _, out, targets = mixed(AugmentConfig(mixup=0.8, label_smoothing=0.2))
    lam = 1 - float(out[0, 0, 0, 0]) / 3
    assert 0 < lam < 1
    torch.testing.assert_close(out[1, 0, 0, 0], torch.tensor(lam * 1 + (1 - lam) * 2))
    # Targets: on 0.85, off 0.05 as above; row 0 = lam * [on off off off] + (1 - lam) * [off off off on].
    expected = torch.tensor([0.05 + 0.8 * lam, 0.05, 0.05, 0.05 + 0.8 * (1 - lam)])
    torch.testing.assert_close(targets[0], expected)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))


def test_cutmix_weighs_targets_by_the_pasted_area() -> None:
    before, out, targets = mixed(AugmentConfig(cutmix=1.0))
    pasted = float((out[0, 0] == 3).double().mean())
    assert set(out[0].unique().tolist()) <= {0.0, 3.0}
    assert 0 < pasted < 1
    torch.testing.assert_close(targets[0], torch.tensor([1 - pasted, 0.0, 0.0, pasted]))
    assert torch.equal(before.flip(0)[0].unique(), torch.tensor([3.0]))


def test_mixing_is_timms_and_keyed_by_seed_step_and_group() -> None:
    augment = AugmentConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    images, out, targets = mixed(augment)
    timm_mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=4)
    with KeyedRandom() as keyed:
        keyed.seed("mix", 0, 3, 1)
        expected_images, expected_targets = timm_mixup(images.clone(), torch.arange(4))
    assert torch.equal(out, expected_images)
    assert torch.equal(targets, expected_targets)
    assert torch.equal(mixed(augment)[1], out)
    for other in ({"step": 4}, {"group": 2}, {"seed": 1}):
        assert not torch.equal(mixed(augment, **other)[2], targets)


def test_no_mixing_leaves_images_alone() -> None:
    before, out, targets = mixed(AugmentConfig(label_smoothing=0.1))
    assert torch.equal(before, out)
    assert torch.equal(targets, soft_targets(torch.arange(4), 4, 0.1))
    with pytest.raises(ValueError, match="micro_batch_size is 3; mixup and cutmix mix pairs"):
        Mixer(AugmentConfig(mixup=1.0, mix_group=0), 4, 0)(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.int64), step=0, in_step=0)
    with pytest.raises(ValueError, match="micro_batch_size is 6 and data.augment.mix_group is 4: .* must divide"):
        Mixer(AugmentConfig(mixup=1.0, mix_group=4), 4, 0).check(6)
