"""From an image file's bytes to the square of pixels that reference sets are made of.

Owns the preprocessing and its description; must not know networks. It is what the authors of
ADM, and after them LlamaGen and VAR, do to ImageNet: RGB, halve by a box filter while the shorter
side is at least twice the target, then bicubic to the target, then the centre.

Shapes: S image side.
Source: center crop of the ADM reference batches (github.com/openai/guided-diffusion).
"""

import hashlib
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from rlgen.evaluation.images import ImageItem


@dataclass(frozen=True)
class Picture:
    """A decoded image, or the reason why there is none."""

    name: str
    label: str | None
    file_sha256: int
    """Digest of the file's bytes as a number."""
    pixels_u8: np.ndarray | None
    """uint8 [3, S, S]; None if the bytes are no image."""
    problem: str = ""


def describe_preprocessing(image_size: int) -> str:
    """One line for the file of moments."""
    return (
        f"RGB, box halving then PIL bicubic to a shorter side of {image_size} px, centre crop "
        f"{image_size} x {image_size}, uint8, divided by 255"
    )


def decode(item: ImageItem, *, image_size: int) -> Picture:
    """Read and decode one image.

    Args:
        item: an image that was not read yet.
        image_size: side of the square, in pixels; smaller images are enlarged.
    Raises:
        StorageError: the bytes can't be read; bytes that are no image raise nothing.
    """
    payload = item.read()
    digest = int.from_bytes(hashlib.sha256(payload).digest(), "big")
    try:
        with Image.open(io.BytesIO(payload)) as opened:
            square = crop_square(opened.convert("RGB"), image_size)
    # What Pillow raises on damaged files depends on the format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        problem = "it is empty" if not payload else f"{type(error).__name__}: {error}"
        return Picture(item.name, item.label, digest, None, problem)
    pixels_u8 = np.asarray(square).transpose(2, 0, 1)  # (S, S, 3) -> (3, S, S)
    return Picture(item.name, item.label, digest, pixels_u8)


def crop_square(image: Image.Image, image_size: int) -> Image.Image:
    """Shrink or enlarge an image to a shorter side of image_size and cut out the centre."""
    while min(image.size) >= 2 * image_size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = image_size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - image_size) // 2, (height - image_size) // 2
    return image.crop((left, top, left + image_size, top + image_size))
