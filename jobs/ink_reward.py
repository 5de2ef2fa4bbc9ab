"""A reward of one's own: how much of the image is covered with ink.

`jobs/digits_ink.yaml` uses it; `UserScorer` in rlgen/rewards/user.py tells what such a class may
expect and must return.
"""

import torch
from torch import Tensor


class InkCoverage:
    """Ink is bright: 0 is paper, 1 is ink. The wanted share of ink scores 0, all else less."""

    def __init__(self, *, device: torch.device, share: float) -> None:
        """Take `arguments` of the configuration; nothing has to be loaded here.

        Args:
            device: where the images will be.
            share: wanted mean of an image's pixels, 0 to 1.
        """
        self.share = share

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        """Score [B, 3, H, W]: minus the distance to the wanted share of ink, float32 [B]."""
        coverage_B = images_01.mean(dim=(1, 2, 3))
        return -(coverage_B - self.share).abs()
