"""Captions of digits: the sentences that the tiny CLIP learns, and which images they describe.

Owns the wording; must not know the models. Shapes: N images, U distinct captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.digits.data import CLASS_NAMES, MAX_ROTATION_DEG, MAX_SCALE_CHANGE, DigitImages

PROMPTS = tuple(f"a photo of the digit {name}" for name in CLASS_NAMES)
"""What a digit is asked for by, per class; also one of the captions."""

_ANY = -1
_TEMPLATES = (
    # text, claimed size, claimed slant
    ("a photo of the digit {name}", _ANY, _ANY),
    ("a scan of a handwritten {name}", _ANY, _ANY),
    ("the number {name}, written by hand", _ANY, _ANY),
    ("an image of the digit {name}", _ANY, _ANY),
    ("a small {name}", 0, _ANY),
    ("a large {name}", 2, _ANY),
    ("the digit {name} leaning left", _ANY, 0),
    ("an upright {name}", _ANY, 1),
    ("the digit {name} leaning right", _ANY, 2),
    ("a small digit {name} leaning left", 0, 0),
    ("a small digit {name} leaning right", 0, 2),
    ("a large digit {name} leaning left", 2, 0),
    ("a large digit {name} leaning right", 2, 2),
)


@dataclass(frozen=True)
class CaptionTable:
    """All distinct captions with what each one claims."""

    texts: tuple[str, ...]
    class_U: Tensor
    size_U: Tensor
    """0 small, 1 medium, 2 large, -1 not mentioned."""
    slant_U: Tensor
    """0 left, 1 upright, 2 right, -1 not mentioned."""

    def truth_NU(self, images: DigitImages) -> Tensor:
        """Return which captions are true of which images: bool [N, U]."""
        size_N1 = _thirds((images.scale_N - 1) / MAX_SCALE_CHANGE)[:, None]
        slant_N1 = _thirds(images.rotation_deg_N / MAX_ROTATION_DEG)[:, None]
        return (
            (images.labels_N[:, None] == self.class_U)
            & ((self.size_U == _ANY) | (self.size_U == size_N1))
            & ((self.slant_U == _ANY) | (self.slant_U == slant_N1))
        )


def make_caption_table() -> CaptionTable:
    """List every caption of every class."""
    entries = [
        (template.format(name=name), class_id, size, slant)
        for class_id, name in enumerate(CLASS_NAMES)
        for template, size, slant in _TEMPLATES
    ]
    texts, classes, sizes, slants = zip(*entries, strict=True)
    return CaptionTable(texts, torch.tensor(classes), torch.tensor(sizes), torch.tensor(slants))


def _thirds(value_N: Tensor) -> Tensor:
    """Cut -1..1 into three equal parts: 0, 1, 2."""
    return ((value_N + 1) * 1.5).floor().clamp(0, 2).long()
