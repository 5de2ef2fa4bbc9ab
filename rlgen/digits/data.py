"""scikit-learn's handwritten digits, split, enlarged and augmented.

Owns the split (a held-out digit is never trained on, by anything) and the augmentation; must
not know the models. Shapes: N images, S image side.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from rlgen.config.digits import DigitsConfig

PLAIN = "plain"
CLASS_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MAX_ROTATION_DEG = 14.0
MAX_SCALE_CHANGE = 0.12
MAX_SHIFT_FRACTION = 1 / 16
"""One pixel of a 16-pixel image."""


@dataclass(frozen=True)
class DigitImages:
    """Augmented digits, all copies of one digit next to each other."""

    images_01: Tensor
    """float32 [N, 1, S, S]; ink is 1, paper 0."""
    labels_N: Tensor
    """int64 [N]."""
    sources_N: Tensor
    """int64 [N]: row of scikit-learn's data set that each image was made from."""
    rotation_deg_N: Tensor
    """float32 [N]; positive leans to the right."""
    scale_N: Tensor
    """float32 [N]; above 1 is larger than written."""
    styles_N: Tensor
    """int64 [N]: 0 for plain digits; styles.py has the others."""

    @property
    def images_rgb_01(self) -> Tensor:
        """The images with their gray repeated to three channels, as a view: [N, 3, S, S]."""
        return self.images_01.expand(-1, 3, -1, -1)

    def take(self, rows: Tensor) -> "DigitImages":
        """Return the images of these rows, int64 [M]."""
        return DigitImages(
            **{field.name: getattr(self, field.name)[rows] for field in fields(self)}
        )


@dataclass(frozen=True)
class DigitsData:
    """The two parts of the data set."""

    train: DigitImages
    heldout: DigitImages


def load_digits_data(config: DigitsConfig) -> DigitsData:
    """Make the data set of a config; the same for the same config and seed."""
    train_rows, heldout_rows = split_rows(config.num_heldout, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    return DigitsData(
        train=_make_part(train_rows, config, generator),
        heldout=_make_part(heldout_rows, config, generator),
    )


def split_rows(num_heldout: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of scikit-learn's data set to train on and to hold out, stratified."""
    labels = load_digits().target
    rows = np.arange(len(labels))
    train, heldout = train_test_split(
        rows, test_size=num_heldout, stratify=labels, random_state=seed
    )
    return np.sort(train), np.sort(heldout)


def _make_part(rows: np.ndarray, config: DigitsConfig, generator: torch.Generator) -> DigitImages:
    digits = load_digits()
    written = torch.from_numpy(digits.images[rows]).float().div(16)[:, None]  # (N, 1, 8, 8)
    side = config.image_size
    enlarged = F.interpolate(written, size=(side, side), mode="bilinear", align_corners=False)
    sources_N = torch.from_numpy(rows).repeat_interleave(config.augmentations)
    num_images = len(sources_N)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(num_images, generator=generator) * 2 - 1) * limit

    rotation_deg_N = uniform(MAX_ROTATION_DEG)
    scale_N = 1 + uniform(MAX_SCALE_CHANGE)
    images_01 = transform_images(
        enlarged.repeat_interleave(config.augmentations, dim=0),
        rotation_deg_N=rotation_deg_N,
        scale_N=scale_N,
        shift_x_N=uniform(MAX_SHIFT_FRACTION),
        shift_y_N=uniform(MAX_SHIFT_FRACTION),
    )
    labels_N = torch.from_numpy(digits.target[sources_N.numpy()]).long()
    styles_N = torch.zeros_like(labels_N)
    return DigitImages(images_01, labels_N, sources_N, rotation_deg_N, scale_N, styles_N)


def transform_images(
    images_01: Tensor,
    *,
    rotation_deg_N: Tensor,
    scale_N: Tensor,
    shift_x_N: Tensor,
    shift_y_N: Tensor,
) -> Tensor:
    """Rotate, scale and shift each image by its own amount; what comes in from outside is 0.

    Args:
        images_01: [N, C, S, S] in [0, 1].
        rotation_deg_N: positive turns the top to the right.
        scale_N: above 1 enlarges.
        shift_x_N: fraction of the side; positive moves to the right.
        shift_y_N: fraction of the side; positive moves down.
    """
    cos_N = torch.cos(torch.deg2rad(rotation_deg_N)) / scale_N
    sin_N = torch.sin(torch.deg2rad(rotation_deg_N)) / scale_N
    # affine_grid maps output to input coordinates, both from -1 to 1: hence the inverse.
    x_N, y_N = 2 * shift_x_N, 2 * shift_y_N
    rows = [
        torch.stack([cos_N, sin_N, -(cos_N * x_N + sin_N * y_N)], dim=-1),
        torch.stack([-sin_N, cos_N, sin_N * x_N - cos_N * y_N], dim=-1),
    ]
    theta = torch.stack(rows, dim=1)  # (N, 2, 3)
    grid = F.affine_grid(theta, list(images_01.shape), align_corners=False)
    moved = F.grid_sample(images_01, grid, mode="bilinear", align_corners=False)
    return moved.clamp(0, 1)
