"""The style judge: which digit in which style an image shows, by a net that no reward uses.

Owns the net's classes and a scorer that tells what the net says, so that a run reports it beside
its rewards, with weight 0. Shapes: B images, C classes, S styles.
"""

from typing import Literal

import torch
from torch import Tensor

from rlgen.digits.data import CLASS_NAMES
from rlgen.digits.styles import STYLES
from rlgen.features.extractor import load_convnet

Question = Literal["style", "class", "both"]


def joint_ids(labels_N: Tensor, styles_N: Tensor) -> Tensor:
    """Number the pairs of style and class: int64 [N], below len(STYLES) * len(CLASS_NAMES)."""
    return styles_N * len(CLASS_NAMES) + labels_N


class StyleJudge:
    """Scores 1 where the judge agrees and 0 where it does not; the mean is a share of images."""

    def __init__(self, *, device: torch.device, style: str, question: Question, net: str) -> None:
        """Read the net.

        Args:
            style: the wanted one of STYLES.
            question: what has to be right: the style, the class that was asked for, or both.
            net: path or URL of the net's weights; `embedded` is the styled preset's.
        Raises:
            CheckpointError: the file is missing, damaged, or not such a net.
            ValueError: style or question is unknown.
        """
        questions = ("style", "class", "both")
        if style not in STYLES or question not in questions:
            raise ValueError(f"{style}, {question}: use one of {STYLES} and one of {questions}")
        self._style_id = STYLES.index(style)
        self._question = question
        self._net = load_convnet(net, device)
        if self._net.config.num_classes != len(STYLES) * len(CLASS_NAMES):
            raise ValueError(f"{net} knows {self._net.config.num_classes} classes, and no styles")

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        """Return 0 or 1 for [B, 3, H, W] in [0, 1], float32 [B]; the prompts play no part."""
        logits_BSC = self._net.classify(images_01).unflatten(1, (len(STYLES), len(CLASS_NAMES)))
        # Style and class each by their own marginal: a doubtful class must not blur the style.
        is_style_B = logits_BSC.logsumexp(2).argmax(1).cpu() == self._style_id
        is_class_B = logits_BSC.logsumexp(1).argmax(1).cpu() == class_ids_B
        answers = {"style": is_style_B, "class": is_class_B, "both": is_style_B & is_class_B}
        return answers[self._question].float()
