"""Facts of the work on the device: timm's boxes, flips and mixing from the same random numbers, noise that depends on its key alone."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing

from m2mkd_ds.config import AugmentConfig, DataConfig
from m2mkd_ds.data.batch import DeviceWork, WorkerBatch
from m2mkd_ds.data.device_ops import Finisher, erase_, flip, keyed_normal, normalise
from m2mkd_ds.data.keyed_random import KeyedRandom
from m2mkd_ds.data.mix import group_draws, mix, soft_targets
from m2mkd_ds.data.transforms import Mixer, erase_box

CPU = torch.device("cpu")


def test_normalise_and_flip_by_hand() -> None:
    pixels_BHWC = torch.tensor([[[[255, 51, 0], [0, 0, 255]]]], dtype=torch.uint8)
    # (255/255 - 0.5) / 0.25 = 2;  (51/255 - 0.1) / 0.5 = 0.2;  0;  the second pixel: -2, -0.2, 1.
    images = normalise(pixels_BHWC, torch.tensor([0.5, 0.1, 0.0]), torch.tensor([0.25, 0.5, 1.0]))
    torch.testing.assert_close(images, torch.tensor([[[[2.0, -2.0]], [[0.2, -0.2]], [[0.0, 1.0]]]]))
    both = flip(images.repeat(2, 1, 1, 1), torch.tensor([False, True]))
    assert torch.equal(both[0], images[0]) and torch.equal(both[1, :, 0], images[0, :, 0, [1, 0]])


def test_erased_boxes_are_timms() -> None:
    ours, seen = RandomErasing(0.5, mode="pixel", device="cpu"), 0
    with KeyedRandom() as keyed:
        for number in range(60):
            keyed.seed("sample", number)
            image_CHW = torch.full((3, 40, 40), torch.nan)
            ours(image_CHW)
            keyed.seed("sample", number)
            box = erase_box(ours, 40)
            expected = torch.zeros(40, 40, dtype=torch.bool)
            if box is not None:
                top, left, height, width = box
                expected[top : top + height, left : left + width] = True
                seen += 1
            assert torch.equal(~image_CHW[0].isnan(), expected)
    assert 15 < seen < 45


def test_erasing_a_batch_fills_each_box_with_noise_of_its_key_alone() -> None:
    boxes = [(0, 2, 3, 4, 5, 77), (2, 0, 0, 8, 8, 1 << 61), (2, 5, 1, 2, 9, 77)]
    images = torch.full((3, 3, 12, 12), 9.0)
    erase_(images, torch.tensor(boxes), 20 + 64 + 18)
    expected = torch.full((3, 3, 12, 12), 9.0)
    for image, top, left, height, width, key in boxes:  # one pixel at a time
        for row in range(top, top + height):
            for column in range(left, left + width):
                for channel in range(3):
                    counter = torch.tensor([(row * 12 + column) * 4 + channel])
                    expected[image, channel, row, column] = keyed_normal(torch.tensor([key]), counter)[0]
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)
    assert (images[1] == 9).all()


def test_noise_is_standard_normal_and_keys_are_independent() -> None:
    counters = torch.arange(200_000)
    one, other = (keyed_normal(torch.tensor(key), counters).double() for key in (5, 6))
    for noise in (one, other):
        # Standard errors: mean 0.0022, variance 0.0032, fourth moment 0.022; share beyond 1.96: 0.05 +- 0.0005.
        assert abs(float(noise.mean())) < 0.01 and abs(float(noise.var()) - 1) < 0.015 and abs(float((noise**4).mean()) - 3) < 0.12
        assert abs(float((noise.abs() > 1.95996).double().mean()) - 0.05) < 0.0025
        assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.01  # neighbours
    assert abs(float((one * other).mean())) < 0.01
    assert keyed_normal(torch.tensor(1 << 40), counters)[0] != keyed_normal(torch.tensor(1 << 41), counters)[0]


def test_the_integer_hash_is_known() -> None:
    # lowbias32 as published, in Python's integers.
    def hash32(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    key, counter = 0x2BCDEF0123456789, 123_456
    first = hash32(hash32(counter ^ key % 2**32) ^ key >> 32)
    uniform, angle = (((bits >> 8) + 0.5) / 2**24 for bits in (first, hash32(first ^ 0x9E3779B9)))
    expected = np.sqrt(-2 * np.log(uniform)) * np.cos(2 * np.pi * angle)
    assert float(keyed_normal(torch.tensor(key), torch.tensor([counter]))[0]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("mix_group", [2, 4, 8, 0])
@pytest.mark.parametrize("alphas", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.7}])
def test_both_paths_mix_each_group_as_timm_does(mix_group: int, alphas: dict[str, Any]) -> None:
    augment = AugmentConfig(mix_group=mix_group, label_smoothing=0.1, **alphas)
    mixer, size = Mixer(augment, 10, 3), mix_group or 8
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    timm_mixup = Mixup(
        augment.mixup, augment.cutmix, prob=augment.mix_prob, switch_prob=0.5, label_smoothing=0.1, num_classes=10
    )  # fmt: skip
    expected_images, expected_targets = images.clone(), []
    with KeyedRandom() as keyed:
        for group in range(8 // size):
            # The micro-batch begins at image 16 of its step.
            keyed.seed("mix", 3, 5, 16 // size + group)
            members = slice(group * size, (group + 1) * size)
            expected_targets.append(timm_mixup(expected_images[members], labels[members])[1])
    ours, targets = mixer(images.clone(), labels, step=5, in_step=16)
    assert torch.equal(ours, expected_images) and torch.equal(targets, torch.cat(expected_targets))
    draws = mixer.draw(8, 16, step=5, in_step=16)
    on_device, device_targets = mix(images, soft_targets(labels, 10, 0.1), *group_draws(draws))
    torch.testing.assert_close(on_device, expected_images, rtol=0, atol=1e-6)
    torch.testing.assert_close(device_targets, torch.cat(expected_targets), rtol=0, atol=1e-6)


def test_a_batch_is_finished_in_timms_order() -> None:
    # Normalise, flip, erase, mix: the erased box is that of the flipped image, and noise is not normalised but mixed.
    random.seed(0)
    pixels = torch.randint(0, 256, (2, 6, 6, 3), dtype=torch.uint8)
    data = DataConfig(num_classes=2, image_size=6, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    work = DeviceWork(
        flip_B=torch.tensor([True, False]), erase_E6=torch.tensor([[0, 1, 2, 2, 3, 9]]), erase_pixels=6,
        shares_G4=torch.tensor([[0.75, 0.25, 0.75, 0.25]]), boxes_G4=torch.zeros(1, 4, dtype=torch.int64),
    )  # fmt: skip
    batch = WorkerBatch(images=pixels, labels_B=torch.tensor([0, 1]), slot_ids_B=torch.arange(2), step=0, micro_step=0, targets_BV=None,
                        work=work)  # fmt: skip
    done = Finisher(data, CPU, smoothing=0.0)(batch, 0.5)
    one, two = ((image.permute(2, 0, 1) / 255 - 0.5) / 0.25 for image in pixels)
    one = one.flip(2)
    counters = (torch.arange(36).view(1, 6, 6) * 4) + torch.arange(3)[:, None, None]
    one[:, 1:3, 2:5] = keyed_normal(torch.tensor(9), counters)[:, 1:3, 2:5]
    torch.testing.assert_close(done.images_BCHW, torch.stack([0.75 * one + 0.25 * two, 0.75 * two + 0.25 * one]), rtol=0, atol=1e-5)
    assert torch.equal(done.targets_BV, torch.tensor([[0.75, 0.25], [0.25, 0.75]])) and done.wait_s == 0.5


@pytest.mark.gpu
def test_a_gpu_finishes_as_the_cpu_does() -> None:
    data = DataConfig(num_classes=4, image_size=32)
    mixer = Mixer(dataclasses.replace(data.augment, mixup=0.8, cutmix=1.0), 4, 0)
    shares_G4, boxes_G4 = group_draws(mixer.draw(8, 32, step=0, in_step=0))
    work = DeviceWork(flip_B=torch.arange(8) % 3 == 0, erase_E6=torch.tensor([[1, 3, 4, 10, 12, 1 << 50], [5, 0, 0, 9, 9, 3]]),
                      erase_pixels=201, shares_G4=shares_G4, boxes_G4=boxes_G4)  # fmt: skip
    batch = WorkerBatch(images=torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8), labels_B=torch.arange(8) % 4,
                        slot_ids_B=torch.arange(8), step=0, micro_step=0, targets_BV=None, work=work)  # fmt: skip
    cuda = torch.device("cuda")
    there, here = Finisher(data, cuda, smoothing=0.1)(batch.pin_memory(), 0.0), Finisher(data, CPU, smoothing=0.1)(batch, 0.0)
    torch.testing.assert_close(there.images_BCHW.cpu(), here.images_BCHW, rtol=0, atol=1e-4)
    torch.testing.assert_close(there.targets_BV.cpu(), here.targets_BV)
