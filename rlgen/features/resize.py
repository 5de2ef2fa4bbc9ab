"""Resizing as the public implementations do it, on tensors and on any device.

Owns the arithmetic of two resizes that published numbers depend on: Pillow's, on 8-bit images, and
TensorFlow 1's, on which FID stands. Must not know the models. Shapes: B images, C channels.
"""

import functools
import math

import torch
from torch import Tensor

_PRECISION_BITS = 22
"""Pillow holds weights as integers with so many binary places for 8-bit images."""


def to_levels(images_01: Tensor) -> Tensor:
    """Return the 8-bit level of each value of images in [0, 1], in float32: 0, 1, ..., 255.

    Half a level goes up, as where images are saved.
    """
    return images_01.float().mul(255).add(0.5).floor_().clamp_(0, 255)


def resize_like_pil(levels: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Resize 8-bit images exactly as Pillow does.

    Two passes with antialiasing and weights of 22 binary places, and rounding to 8 bits after
    each. Sums of integers under 2^53 in float64 are exact on any device in any order.

    Args:
        levels: [B, C, H, W], whole numbers from 0 to 255.
        size: height and width of the result.
        interpolation: bicubic or bilinear.
    Returns:
        float32 [B, C, *size], whole numbers from 0 to 255.
    Source: Pillow 13, compared bit by bit in tests/unit/test_preprocess.py. Before 13 the width
        always came first; both orders agree but for the rounding of portraits.
    """
    height, width = levels.shape[-2:]
    rows_removed, columns_removed = height - size[0], max(width - size[1], 0)
    axes = (-2, -1) if rows_removed > 2 * columns_removed else (-1, -2)
    for axis in axes:
        num_in, num_out = levels.shape[axis], size[axis]
        if num_in != num_out:
            weights = _pil_matrix(num_in, num_out, interpolation, levels.device)
            wide = levels.double()
            sums = weights @ wide if axis == -2 else wide @ weights.T
            levels = sums.mul_(2.0**-_PRECISION_BITS).add_(0.5).floor_().clamp_(0, 255)
    return levels.float()


@functools.lru_cache(maxsize=64)
def _pil_matrix(num_in: int, num_out: int, interpolation: str, device: torch.device) -> Tensor:
    """[num_out, num_in] whole numbers in float64: the weights times 2^22, of a row each."""
    kernel, radius = _KERNELS[interpolation]
    scale = num_in / num_out
    stretch = max(scale, 1.0)  # a reduction widens the kernel: that is the antialiasing
    matrix = torch.zeros(num_out, num_in, dtype=torch.float64, device="cpu")
    for row in range(num_out):
        center = (row + 0.5) * scale
        first = max(int(center - radius * stretch + 0.5), 0)
        last = min(int(center + radius * stretch + 0.5), num_in)
        weights = [kernel((x - center + 0.5) / stretch) for x in range(first, last)]
        total = sum(weights)
        for x, weight in zip(range(first, last), weights, strict=True):
            scaled = weight / total * 2**_PRECISION_BITS
            matrix[row, x] = math.copysign(math.floor(abs(scaled) + 0.5), scaled)
    return matrix.to(device)


def _cubic(x: float) -> float:
    """Keys' kernel with a = -0.5, which Pillow and torch's antialiased resize use."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def _triangle(x: float) -> float:
    return max(1 - abs(x), 0.0)


_KERNELS = {"bicubic": (_cubic, 2.0), "bilinear": (_triangle, 1.0)}


def resize_like_tf1(levels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize as TensorFlow 1's bilinear resize, for which FID's Inception was ported.

    Output pixel i lies at input i * in / out: no shift by half a pixel and no antialiasing.
    Positions are float32, as there. Taken by index and not by matrix products, which GPUs may
    round to TF32.

    Args:
        levels: [B, C, H, W] float32.
        size: height and width of the result.
    """
    for axis, num_out in ((-1, size[1]), (-2, size[0])):
        num_in = levels.shape[axis]
        scale = torch.tensor(num_in / num_out, dtype=torch.float32, device=levels.device)
        position = torch.arange(num_out, dtype=torch.float32, device=levels.device) * scale
        low = position.long()
        fraction = position - low
        if axis == -2:
            fraction = fraction[:, None]
        near = levels.index_select(axis, low)
        far = levels.index_select(axis, (low + 1).clamp_max(num_in - 1))
        levels = near + (far - near) * fraction
    return levels
