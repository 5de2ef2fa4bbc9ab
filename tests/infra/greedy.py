"""Rewards by which a policy collapses when it is told to."""

from pathlib import Path

import torch
from torch import Tensor


class Ink:
    """Covered area, once a file is there; nothing before."""

    def __init__(self, *, device: torch.device, switch: str) -> None:
        self._switch = Path(switch)

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        """Score [B, 3, H, W]: float32 [B]."""
        return images_01.mean(dim=(1, 2, 3)) * float(self._switch.exists())


class Paper:
    """Area that is not covered; what falls when the policy is after ink."""

    def __init__(self, *, device: torch.device) -> None:
        pass

    def __call__(self, images_01: Tensor, prompts: list[str], class_ids_B: Tensor) -> Tensor:
        """Score [B, 3, H, W]: float32 [B]."""
        return 1.0 - images_01.mean(dim=(1, 2, 3))
