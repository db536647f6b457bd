"""Augmentation: what each option does, and that nothing but the seed decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from paradepth.data import Augment
from paradepth.data.rand_augment import OPERATIONS, PHOTOMETRIC, BatchRandAugment


def random_images(count, channels=3, size=(9, 7)):
    return torch.randint(
        0, 256, (count, channels, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_augment_with_nothing_on_only_converts():
    images = random_images(4)
    out = Augment()(images, seed=0)
    assert out.dtype == torch.float32
    assert torch.equal(out, images.float() / 255)
    assert torch.equal(Augment()(out, seed=0), out)


def test_flip_mirrors_about_half_of_the_images():
    images = random_images(400, 1)
    out = Augment(flip=True)(images, seed=0).mul(255).round().to(torch.uint8)
    same = (out == images).flatten(1).all(1)
    mirrored = (out == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 140 < mirrored.sum() < 260  # 6 standard deviations


@pytest.mark.parametrize("flip", [True, False])
def test_crop_returns_windows_of_the_padded_image(flip):
    images, pad = random_images(600), 2
    out = Augment(flip=flip, crop_padding=pad)(images, seed=3).mul(255).round().to(torch.uint8)
    windows = {}
    for mirrored in (False, True) if flip else (False,):
        padded = torch.nn.functional.pad(images.flip(-1) if mirrored else images, (pad,) * 4)
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                windows[mirrored, top, left] = padded[:, :, top : top + 9, left : left + 7]
    hits = torch.stack([(out == window).flatten(1).all(1) for window in windows.values()])
    assert hits.any(0).all(), "an image is no window of the padded one"
    assert hits.any(1).all(), "a place is never drawn"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"flip": True},
        {"crop_padding": 2},
        {"rand_augment": (2, 14)},
        {"flip": True, "crop_padding": 1, "rand_augment": (3, 5)},
    ],
)
def test_augmentation_depends_on_the_seed_alone(options, channels):
    images = random_images(32, channels)
    before = images.clone()
    augment = Augment(**options)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = augment(images, seed=5)
    assert torch.equal(state, torch.random.get_rng_state()), "the global generator moved"
    torch.manual_seed(2)
    assert torch.equal(Augment(**options)(images, seed=5), first)
    assert not torch.equal(augment(images, seed=6), first)
    assert torch.equal(images, before), "the input was changed"
    assert (first.shape, first.dtype, first.requires_grad) == (images.shape, torch.float32, False)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_a_global_batch_are_augmented_as_in_one_process(channels):
    images = random_images(24, channels)
    augment = Augment(flip=True, crop_padding=2, rand_augment=(2, 14))
    alone = augment(images, seed=11)
    slices = [augment(part, seed=11, first=8 * rank, total=24) for rank, part in enumerate(images.split(8))]
    torch.testing.assert_close(torch.cat(slices), alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="rows 20 to 44"):
        augment(images, seed=0, first=20, total=30)


def test_rand_augment_draws_operations_for_each_image():
    # the same picture 256 times: the whole batch going through one pair of operations would give few results
    images = random_images(1, 3, (16, 16)).expand(256, -1, -1, -1)
    out = Augment(rand_augment=(1, 14))(images, seed=0)
    # 15 operations, 5 of them with a random sign; equalize and another may leave such an image as it is
    assert 18 <= len(out.flatten(1).unique(dim=0)) <= 20
    twice = Augment(rand_augment=(2, 14))(images, seed=0)
    assert len(twice.flatten(1).unique(dim=0)) > 60


def test_rand_augment_of_other_channels():
    ramp = torch.linspace(0, 1, 16).expand(64, 1, 16, 16)
    out = Augment(rand_augment=(2, 14))(ramp, seed=0)
    assert out.shape == ramp.shape
    assert ((out - ramp).abs().flatten(1).amax(1) > 0.02).float().mean() > 0.4, "hardly any image changed"
    with pytest.raises(ValueError, match="1 or 3 channels"):
        Augment(rand_augment=(2, 14))(torch.zeros(2, 4, 8, 8), seed=0)


def pillow_operation(name, image, sign, m):
    """The published operations, in Pillow."""
    enhancers = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhancers:
        return enhancers[name](image).enhance(0.1 + 1.8 * m / 30)
    if name in ("auto_contrast", "equalize", "invert"):
        return getattr(ImageOps, name.replace("_", ""))(image)
    if name == "posterize":
        return ImageOps.posterize(image, int(8 - 4 * m / 30))
    if name == "solarize":
        return ImageOps.solarize(image, round(256 - 256 * m / 30))
    if name == "solarize_add":
        return image.point(lambda level: min(255, level + round(110 * m / 30)) if level < 128 else level)
    if name == "rotate":
        return image.rotate(sign * m, Image.Resampling.BILINEAR)
    centre, value = 15.5, -sign * m / 30  # Pillow's matrices map the result back to the source
    matrix = {
        "shear_x": (1, 0.3 * value, -0.3 * value * (centre + 0.5), 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * value, 1, -0.3 * value * (centre + 0.5)),
        "translate_x": (1, 0, 3.2 * value, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 3.2 * value),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


@pytest.mark.parametrize("m", [9, 24])
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_the_published_one(name, m):
    waves = np.sin(np.arange(32)[:, None, None] / [5, 7, 9] + np.arange(32)[None, :, None] / [8, 4, 6])
    pixels = (100 + 90 * waves).astype(np.uint8)  # smooth, so that interpolation at the border hardly matters
    images = torch.from_numpy(pixels).permute(2, 0, 1).expand(1, -1, -1, -1) / 255
    # a seed with which the only image draws this operation first
    place = OPERATIONS.index(name)
    draws = ((seed, torch.Generator().manual_seed(seed)) for seed in range(1000))
    seed, generator = next(
        (seed, g) for seed, g in draws if int(torch.rand(1, len(OPERATIONS), generator=g).argmin()) == place
    )
    sign = -1 if float(torch.rand(1, 1, generator=generator)) < 0.5 else 1
    out = (
        BatchRandAugment(1, m)(images, generator=torch.Generator().manual_seed(seed), total=1, rows=slice(0, 1))[
            0
        ].permute(1, 2, 0)
        * 255
    )
    expected = np.asarray(pillow_operation(name, Image.fromarray(pixels), sign, m)).astype(float)
    difference = np.abs(out.numpy() - expected)
    if name in PHOTOMETRIC:
        assert np.median(difference) <= 2
        assert np.mean(difference <= 6) >= 0.97, difference.max()
    else:
        assert np.median(difference) <= 1.5
        assert np.mean(difference <= 6) >= 0.9, difference.max()  # the two blend the border differently
    assert np.abs(expected - pixels).mean() > 0.2, "nothing was compared"


def test_augment_refuses_bad_options():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"rand_augment": (0, 14)}, "n = 0"),
        ({"rand_augment": (16, 14)}, "n = 16"),
        ({"rand_augment": (2, 0)}, "m = 0"),
        ({"rand_augment": (2, 31)}, "m = 31"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            Augment(**options)
