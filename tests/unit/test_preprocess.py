"""Resizes and geometry against the implementations that published numbers were made with."""

from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x,
)

from rlgen.features.preprocess import Preprocess, default_preprocess
from rlgen.features.resize import resize_like_pil, resize_like_tf1, to_levels

FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
IS_PILLOW_13 = int(PIL.__version__.split(".")[0]) >= 13


def black_and_white_u8(height: int, width: int) -> np.ndarray:
    """The hardest case: every kernel overshoots and is cut off."""
    return np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


def levels_of(image_u8: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image_u8).permute(2, 0, 1)[None].float()


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((256, 256), (224, 224)),
        ((512, 512), (224, 224)),
        ((64, 64), (224, 224)),
        ((192, 320), (224, 373)),
        ((150, 90), (80, 48)),
        ((275, 79), (224, 64)),
        ((300, 200), (224, 224)),
        ((13, 7), (48, 48)),
        ((37, 1000), (10, 3)),
        ((224, 300), (224, 224)),
    ],
    ids=str,
)
def test_resizing_is_pillows_to_the_last_bit(source, target, interpolation) -> None:
    if not IS_PILLOW_13 and source[0] > source[1]:
        pytest.skip(f"Pillow {PIL.__version__} takes the width first, also of portraits")
    image_u8 = black_and_white_u8(*source)
    pil = Image.fromarray(image_u8).resize(target[::-1], FILTERS[interpolation])
    ours = resize_like_pil(levels_of(image_u8), target, interpolation)
    assert ours.dtype == torch.float32
    np.testing.assert_array_equal(ours[0].permute(1, 2, 0).numpy(), np.asarray(pil))


def test_every_image_of_a_batch_is_resized_alone() -> None:
    levels = levels_of(black_and_white_u8(40, 60))
    other = 255 - levels
    together = resize_like_pil(torch.cat([levels, other]), (28, 42), "bicubic")
    assert torch.equal(together[:1], resize_like_pil(levels, (28, 42), "bicubic"))
    assert torch.equal(together[1:], resize_like_pil(other, (28, 42), "bicubic"))


def test_images_are_rounded_to_the_nearest_level_first() -> None:
    images_01 = torch.tensor([-0.1, 0.0, 0.4 / 255, 0.6 / 255, 100.4 / 255, 1.0, 1.2])
    assert to_levels(images_01).tolist() == [0, 0, 0, 1, 100, 255, 255]
    every = torch.arange(256) / 255
    assert torch.equal(to_levels(every), torch.arange(256).float())


@pytest.mark.parametrize("size", [(256, 256), (64, 80), (200, 301), (512, 400)], ids=str)
def test_tensorflows_resize_is_torch_fidelitys(size) -> None:
    levels = levels_of(black_and_white_u8(*size))
    expected = interpolate_bilinear_2d_like_tensorflow1x(
        levels, size=(299, 299), align_corners=False
    )
    # The same products in another order would differ by 3e-5 of 255.
    torch.testing.assert_close(resize_like_tf1(levels, (299, 299)), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(
        F.interpolate(levels, (299, 299), mode="bilinear", align_corners=False), expected, atol=1
    ), "a resize with pixel centers at halves is another one"


def test_float_resampling_keeps_what_overshoots_and_pil_cuts_it_off() -> None:
    edges = torch.zeros(1, 3, 20, 20)
    edges[..., 10:] = 1.0
    pil = replace(default_preprocess(28), mean=(0.0,) * 3, std=(1.0,) * 3)
    kept = replace(pil, resampling="float")
    assert pil(edges).min() == 0 and pil(edges).max() == 1
    assert kept(edges).min() < -0.02 and kept(edges).max() > 1.02


def test_without_antialiasing_a_reduction_skips_pixels() -> None:
    generator = torch.Generator().manual_seed(0)
    images_01 = torch.rand(1, 3, 256, 256, generator=generator)
    smooth = Preprocess((64, 64), (0.0,) * 3, (1.0,) * 3, resampling="float")
    rough = replace(smooth, antialias=False)
    assert rough(images_01).std() > 2 * smooth(images_01).std()
    expected = F.interpolate(images_01, (64, 64), mode="bicubic", align_corners=False)
    torch.testing.assert_close(rough(images_01), expected)


def test_images_of_the_models_size_are_not_touched() -> None:
    images_01 = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    pil = replace(default_preprocess(28), mean=(0.0,) * 3, std=(1.0,) * 3)
    assert torch.equal(pil(images_01), images_01)


@pytest.mark.parametrize(
    ("source", "rows"), [((18, 144), 4), ((144, 18), 28), ((75, 200), 11), ((119, 136), 24)]
)
def test_hps_rounds_a_half_as_its_package_does(source, rows) -> None:
    """Sides times scale: 18 * (28 / 144) = 3.5 goes to 4, and 18 / (144 / 28) would give 3."""
    geometry = Preprocess(
        (28, 28), (0.0,) * 3, (1.0,) * 3, resize_mode="longest", resampling="float"
    )
    fitted = geometry(torch.ones(1, 3, *source))
    assert int((fitted[0, 0].amax(dim=1) > 0.5).sum()) == rows
