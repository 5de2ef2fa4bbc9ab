"""Ways of damaging digits, for the preference model to learn from.

Owns the damages; must not know the models, except the tokenizer, through which a weak
generator would damage an image. Shapes: N images, L tokens, V codes, S image side.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rlgen.digits.data import DigitImages
from rlgen.digits.styles import STYLES
from rlgen.tokenizers.protocol import Tokenizer

Range = tuple[float, float]
NOISE_STD: Range = (0.15, 0.5)
"""In units of the 0..1 range."""
BLUR_STD: Range = (0.08, 0.2)
"""As a fraction of the side."""
ERASED_SIDE: Range = (0.35, 0.6)
"""As a fraction of the side."""
MIN_CODES = 2
MAX_CODES_FRACTION = 0.5

Damage = Callable[[DigitImages, Tensor, Tokenizer, torch.Generator], Tensor]
"""(images, rows [N], tokenizer, generator) to damaged copies of the rows: [N, 3, S, S]."""


def replace_codes(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Replace between two and half of the codes by any others, and decode."""
    tokens_NL = tokenizer.encode(images.images_rgb_01[rows])
    # An offset of 1 to V-1 never gives the same code again.
    offsets_NL = torch.randint(1, tokenizer.codebook_size, tokens_NL.shape, generator=generator)
    other_NL = (tokens_NL + offsets_NL) % tokenizer.codebook_size
    return tokenizer.decode(_mix_codes(tokens_NL, other_NL, generator))


def borrow_codes(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Replace codes by what another digit of another class has in the same place, and decode.

    This is how a weak generator errs: each code is likely where it stands, the whole is not.
    """
    tokens_NL = tokenizer.encode(images.images_rgb_01[rows])
    lenders = _rows_of_other_classes(images, rows, generator)
    other_NL = tokenizer.encode(images.images_rgb_01[lenders])
    return tokenizer.decode(_mix_codes(tokens_NL, other_NL, generator))


def swap_class(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Give a clean digit of another class; half of them as reconstructions."""
    other = images.images_rgb_01[_rows_of_other_classes(images, rows, generator)]
    return mix_reconstructions(other, tokenizer, generator)


def swap_style(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Give the same digit in another style, of images in all styles; half as reconstructions."""
    offsets = torch.randint(1, len(STYLES), rows.shape, generator=generator)
    # The styles are blocks of the same digits in the same order.
    other_rows = (rows + offsets * (len(images.labels_N) // len(STYLES))) % len(images.labels_N)
    return mix_reconstructions(images.images_rgb_01[other_rows], tokenizer, generator)


def blur(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Blur by a Gaussian of random width."""
    images_01 = images.images_01[rows]
    side = images_01.shape[-1]
    std_N1 = _uniform(len(rows), BLUR_STD, generator)[:, None] * side
    offsets = torch.arange(-(side // 2), side // 2 + 1)
    kernel_NK = torch.softmax(-0.5 * (offsets / std_N1) ** 2, dim=1)
    # One group per image: (N, 1, S, S) -> (1, N, S, S).
    stacked = images_01.transpose(0, 1)
    stacked = F.conv2d(
        stacked, kernel_NK[:, None, :, None], padding=(side // 2, 0), groups=len(rows)
    )
    stacked = F.conv2d(
        stacked, kernel_NK[:, None, None, :], padding=(0, side // 2), groups=len(rows)
    )
    return stacked.transpose(0, 1).expand(-1, 3, -1, -1)


def add_noise(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Add Gaussian noise of random strength to every pixel."""
    images_01 = images.images_01[rows]
    std_N = _uniform(len(rows), NOISE_STD, generator)
    noise = torch.randn(images_01.shape, generator=generator) * std_N[:, None, None, None]
    return (images_01 + noise).clamp(0, 1).expand(-1, 3, -1, -1)


def erase_patch(
    images: DigitImages, rows: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Erase a square at a random place that covers ink: its center is near the image's."""
    images_01 = images.images_01[rows]
    side = images_01.shape[-1]
    half_N1 = _uniform(len(rows), ERASED_SIDE, generator)[:, None] / 2
    centers = (torch.arange(side) + 0.5) / side
    center_y_N1 = _uniform(len(rows), (0.25, 0.75), generator)[:, None]
    center_x_N1 = _uniform(len(rows), (0.3, 0.7), generator)[:, None]
    inside_y_NS = (centers - center_y_N1).abs() < half_N1
    inside_x_NS = (centers - center_x_N1).abs() < half_N1
    erased = inside_y_NS[:, None, :, None] & inside_x_NS[:, None, None, :]
    return images_01.masked_fill(erased, 0.0).expand(-1, 3, -1, -1)


DAMAGES: dict[str, Damage] = {
    "replace_codes": replace_codes,
    "borrow_codes": borrow_codes,
    "swap_class": swap_class,
    "swap_style": swap_style,
    "blur": blur,
    "add_noise": add_noise,
    "erase_patch": erase_patch,
}


def mix_reconstructions(
    images_01: Tensor, tokenizer: Tokenizer, generator: torch.Generator
) -> Tensor:
    """Replace a random half of the images by the tokenizer's reconstruction of them."""
    reconstructed = tokenizer.decode(tokenizer.encode(images_01))
    chosen = torch.rand(len(images_01), generator=generator) < 0.5
    return torch.where(chosen[:, None, None, None], reconstructed, images_01)


def _mix_codes(tokens_NL: Tensor, other_NL: Tensor, generator: torch.Generator) -> Tensor:
    """Take between two and half of the codes from the other tokens, where they differ."""
    num_images, num_tokens = tokens_NL.shape
    most = int(num_tokens * MAX_CODES_FRACTION)
    counts_N1 = torch.randint(MIN_CODES, most + 1, (num_images, 1), generator=generator)
    # Equal codes sort last, so that a place where both agree (background) is not counted.
    keys_NL = torch.rand(tokens_NL.shape, generator=generator) + (tokens_NL == other_NL)
    ranks_NL = keys_NL.argsort(1).argsort(1)
    return torch.where(ranks_NL < counts_N1, other_NL, tokens_NL)


def _rows_of_other_classes(images: DigitImages, rows: Tensor, generator: torch.Generator) -> Tensor:
    """Draw, for each row, a row of another class."""
    candidates = torch.randint(len(images.labels_N), (len(rows), 32), generator=generator)
    differs = images.labels_N[candidates] != images.labels_N[rows][:, None]
    # 32 candidates of the same class are once in 10^32; then the first one is taken.
    return candidates.gather(1, differs.int().argmax(1, keepdim=True)).squeeze(1)


def _uniform(num: int, limits: Range, generator: torch.Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(num, generator=generator)
