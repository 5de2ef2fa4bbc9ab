"""Captions of digits: the sentences that the tiny CLIP learns, and which images they describe.

Owns the wording; must not know the models. Shapes: N images, U distinct captions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.digits.data import CLASS_NAMES, MAX_ROTATION_DEG, MAX_SCALE_CHANGE, DigitImages
from rlgen.digits.styles import STYLES

PROMPTS = tuple(f"a photo of the digit {name}" for name in CLASS_NAMES)
"""What a digit is asked for by, per class; also one of the captions."""
_ARTICLES = {"inverted": "an"}
STYLED_PROMPTS = PROMPTS + tuple(
    f"{_ARTICLES.get(style, 'a')} {style} {name}" for style in STYLES[1:] for name in CLASS_NAMES
)
"""What a digit in a style is asked for by, in the order of style_judge's joint_ids."""

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
_STYLE_TEMPLATES = ("{article} {style} {name}", "a photo of {article} {style} digit {name}")


@dataclass(frozen=True)
class CaptionTable:
    """All distinct captions with what each one claims."""

    texts: tuple[str, ...]
    class_U: Tensor
    size_U: Tensor
    """0 small, 1 medium, 2 large, -1 not mentioned."""
    slant_U: Tensor
    """0 left, 1 upright, 2 right, -1 not mentioned; a rotation, so only plain digits have it."""
    style_U: Tensor
    """Row of STYLES, -1 not mentioned."""

    def truth_NU(self, images: DigitImages) -> Tensor:
        """Return which captions are true of which images: bool [N, U]."""
        size_N1 = _thirds((images.scale_N - 1) / MAX_SCALE_CHANGE)[:, None]
        slant_N1 = _thirds(images.rotation_deg_N / MAX_ROTATION_DEG)[:, None]
        return (
            (images.labels_N[:, None] == self.class_U)
            & ((self.size_U == _ANY) | (self.size_U == size_N1))
            & ((self.slant_U == _ANY) | (self.slant_U == slant_N1))
            & ((self.style_U == _ANY) | (self.style_U == images.styles_N[:, None]))
        )


def make_caption_table(*, names_styles: bool = False) -> CaptionTable:
    """List every caption of every class, with or without those that name a style."""
    templates = [
        (text, size, slant, 0 if slant != _ANY else _ANY) for text, size, slant in _TEMPLATES
    ]
    if names_styles:
        templates += [
            (
                text.format(article=_ARTICLES.get(style, "a"), style=style, name="{name}"),
                _ANY,
                _ANY,
                i,
            )
            for i, style in enumerate(STYLES)
            for text in _STYLE_TEMPLATES
        ]
    entries = [
        (template.format(name=name), class_id, size, slant, style)
        for class_id, name in enumerate(CLASS_NAMES)
        for template, size, slant, style in templates
    ]
    texts, *claims = zip(*entries, strict=True)
    classes, sizes, slants, styles = (torch.tensor(claim) for claim in claims)
    return CaptionTable(texts, classes, sizes, slants, styles)


def _thirds(value_N: Tensor) -> Tensor:
    """Cut -1..1 into three equal parts: 0, 1, 2."""
    return ((value_N + 1) * 1.5).floor().clamp(0, 2).long()
