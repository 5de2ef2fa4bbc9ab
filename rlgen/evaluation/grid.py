"""Image grids: the same seeds, one row per class, as a PNG.

Owns layout and enlargement. Must not know who made the images.

Shapes: N images, H and W pixels.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from rlgen.storage import atomic_path

MIN_CELL_PIXELS = 48
GAP_PIXELS = 2
GAP_COLOR = (226, 226, 222)


def arrange_by_class(images_u8: np.ndarray, num_classes: int, per_class: int) -> np.ndarray:
    """Order images so that row-major rows of `per_class` hold one class each.

    Args:
        images_u8: [N, 3, H, W]; image i is of class i % num_classes.
    Returns:
        [num_classes * per_class, 3, H, W]: the first `per_class` images of class 0, of class 1 ...
    """
    num_needed = num_classes * per_class
    assert len(images_u8) >= num_needed, (
        f"{num_classes} classes * {per_class} images need {num_needed}, not {len(images_u8)}"
    )
    # (per_class, num_classes, ...) -> (num_classes, per_class, ...)
    by_class = images_u8[:num_needed].reshape(per_class, num_classes, *images_u8.shape[1:])
    return by_class.swapaxes(0, 1).reshape(num_needed, *images_u8.shape[1:])


def write_grid(path: Path, images_u8: np.ndarray, *, columns: int) -> None:
    """Write images as one PNG, row by row; small images are enlarged by whole pixels.

    Args:
        path: the PNG; it appears complete or not at all.
        images_u8: uint8 [N, 3, H, W]; a last row that isn't full leaves its cells empty.
    """
    assert images_u8.dtype == np.uint8, f"{images_u8.dtype} is not uint8"
    assert images_u8.ndim == 4 and images_u8.shape[1] == 3, f"{images_u8.shape} is not [N, 3, H, W]"
    count, _, height, width = images_u8.shape
    zoom = max(1, -(-MIN_CELL_PIXELS // min(height, width)))
    # (N, 3, H, W) -> (N, H * zoom, W * zoom, 3)
    cells = images_u8.transpose(0, 2, 3, 1).repeat(zoom, axis=1).repeat(zoom, axis=2)
    rows = -(-count // columns)
    down, right = height * zoom + GAP_PIXELS, width * zoom + GAP_PIXELS
    canvas = np.empty((rows * down - GAP_PIXELS, columns * right - GAP_PIXELS, 3), dtype=np.uint8)
    canvas[:] = GAP_COLOR
    for i, cell in enumerate(cells):
        top, left = (i // columns) * down, (i % columns) * right
        canvas[top : top + height * zoom, left : left + width * zoom] = cell
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        Image.fromarray(canvas).save(partial, format="PNG", optimize=True)
