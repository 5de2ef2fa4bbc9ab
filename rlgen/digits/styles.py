"""Styles of handwriting: slanted, thick and inverted digits made from plain ones.

Owns what the styles are, and the bigger data set of a styled preset. Must not know the models.
Shapes: N images, S image side, M = N images of one style.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.digits.data import PLAIN, DigitImages, DigitsData

STYLES = (PLAIN, "slanted", "thick", "inverted")
"""By style id; plain digits are the data set as it is."""
SHEAR = 0.6
"""How far the top of a slanted digit moves to the right, and its bottom to the left, as a multiple
of its height above the center."""
THICK_SHARE = 0.75
"""Weight of the maximum over 3 x 3 pixels in a thick digit; the rest is the image itself."""


def apply_style(images_01: Tensor, style: str) -> Tensor:
    """Redraw images in a style.

    Args:
        images_01: [N, C, S, S] in [0, 1], ink 1.
        style: one of STYLES.
    Returns:
        [N, C, S, S] in [0, 1].
    """
    if style == "slanted":
        return _sheared(images_01, SHEAR)
    if style == "thick":
        spread = F.max_pool2d(images_01, 3, stride=1, padding=1)
        return THICK_SHARE * spread + (1 - THICK_SHARE) * images_01
    if style == "inverted":
        return 1 - images_01
    assert style == PLAIN, f"{style} is none of {STYLES}"
    return images_01


def in_all_styles(data: DigitsData) -> DigitsData:
    """Return every digit in every style, one block of all digits after the other."""
    return DigitsData(train=_styled(data.train), heldout=_styled(data.heldout))


def in_style(images: DigitImages, style: str) -> DigitImages:
    """Return the block of one style from what `in_all_styles` made."""
    rows_M = (images.styles_N == STYLES.index(style)).nonzero().flatten()
    return images.take(rows_M)


def _styled(plain: DigitImages) -> DigitImages:
    everything = torch.arange(len(plain.labels_N)).repeat(len(STYLES))
    return replace(
        plain.take(everything),
        images_01=torch.cat([apply_style(plain.images_01, style) for style in STYLES]),
        styles_N=torch.arange(len(STYLES)).repeat_interleave(len(plain.labels_N)),
    )


def _sheared(images_01: Tensor, shear: float) -> Tensor:
    # affine_grid maps output to input coordinates, with y downwards: what lands at (x, y) comes
    # from (x + shear * y, y), so that the top, where y is negative, moves to the right.
    theta = torch.tensor([[1.0, shear, 0.0], [0.0, 1.0, 0.0]]).expand(len(images_01), 2, 3)
    grid = F.affine_grid(theta, list(images_01.shape), align_corners=False)
    return F.grid_sample(images_01, grid, mode="bilinear", align_corners=False).clamp(0, 1)
