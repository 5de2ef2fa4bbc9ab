"""What images go through before a vision tower sees them, batched on tensors.

Owns the geometry and the normalisation; `resize` owns the arithmetic. Shapes: B images.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from open_clip.transform import PreprocessCfg
from torch import Tensor

from rlgen.features.resize import resize_like_pil, to_levels


@dataclass(frozen=True)
class Preprocess:
    """open_clip's evaluation transform, on tensors instead of PIL images."""

    image_size: tuple[int, int]
    """Height and width of the model's input."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    """shortest: shorter side to size, center crop. longest: longer side to size, pad with
    zeros. squash: both sides to size."""
    resampling: Literal["pil", "float"] = "pil"
    """pil: images are rounded to 8 bits and resized as Pillow does it, bit by bit; the published
    pipelines read images from files, and a score is then that of the saved image. float: floats
    are resized and neither rounded nor clamped, as HPSv2 does it. Images of the model's size are
    not touched by either."""
    antialias: bool = True
    """Whether float resampling widens the kernel when it reduces. False is what torchvision did
    before 0.17, and with it HPSv2's package."""

    def __call__(self, images_01: Tensor) -> Tensor:
        """Map [B, 3, H, W] in [0, 1] to the model's input, float32 [B, 3, *image_size]."""
        resized = self._resize(images_01.float())
        fitted = _center_crop_or_pad(resized, self.image_size)
        mean = fitted.new_tensor(self.mean).view(-1, 1, 1)
        std = fitted.new_tensor(self.std).view(-1, 1, 1)
        return (fitted - mean) / std

    def _resize(self, images_01: Tensor) -> Tensor:
        source = (images_01.shape[-2], images_01.shape[-1])
        if self.resampling == "float":
            size = _scaled_size(source, self.image_size, self.resize_mode)
        else:
            size = resized_size(source, self.image_size, self.resize_mode)
        if size == source:
            return images_01
        mode = "bilinear" if self.interpolation == "bilinear" else "bicubic"
        if self.resampling == "pil":
            return resize_like_pil(to_levels(images_01), size, mode) / 255
        return F.interpolate(
            images_01, size=size, mode=mode, antialias=self.antialias, align_corners=False
        )


def default_preprocess(image_size: int) -> Preprocess:
    """Return open_clip's default: OpenAI's mean and std, bicubic, shorter side."""
    defaults = PreprocessCfg()
    return Preprocess((image_size, image_size), tuple(defaults.mean), tuple(defaults.std))


def resized_size(
    source: tuple[int, ...], target: tuple[int, int], resize_mode: str
) -> tuple[int, int]:
    """Return the height and width before cropping or padding, rounded as open_clip does."""
    if resize_mode == "squash":
        return target
    ratios = [s / t for s, t in zip(source, target, strict=True)]
    ratio = max(ratios) if resize_mode == "longest" else min(ratios)
    if resize_mode == "shortest" and target[0] == target[1]:
        # torchvision's Resize truncates; open_clip's own ResizeKeepRatio rounds.
        height, width = (int(target[0] * s / min(source)) for s in source)
    else:
        height, width = (round(s / ratio) for s in source)
    return height, width


def _scaled_size(
    source: tuple[int, int], target: tuple[int, int], resize_mode: str
) -> tuple[int, int]:
    """The same as HPSv2's package rounds it: sides times a scale, where open_clip divides.

    They part where floating point decides a half: 18 of 144 rows at 28 are 3.5 or a little less.
    """
    if resize_mode != "longest":
        return resized_size(source, target, resize_mode)
    scale = min(t / s for s, t in zip(source, target, strict=True))
    return round(source[0] * scale), round(source[1] * scale)


def _center_crop_or_pad(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    pad_y, pad_x = max(height - images.shape[-2], 0), max(width - images.shape[-1], 0)
    if pad_y or pad_x:
        # An odd row or column goes to the bottom or the right.
        images = F.pad(images, (pad_x // 2, pad_x - pad_x // 2, pad_y // 2, pad_y - pad_y // 2))
    top = round((images.shape[-2] - height) / 2)
    left = round((images.shape[-1] - width) / 2)
    return images[..., top : top + height, left : left + width]
