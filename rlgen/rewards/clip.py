"""CLIP similarity as a reward.

Owns nothing but its name and how it is loaded: `open_clip_model` does the work.
"""

import torch

from rlgen.rewards.open_clip_model import CosineScorer, load_open_clip


class ClipScorer(CosineScorer):
    """Cosine of image and prompt under any open_clip model, without the logit scale."""


def load_clip_scorer(location: str, device: torch.device | str = "cpu") -> ClipScorer:
    """Read a scorer from a folder in open_clip's `local-dir:` format.

    Raises:
        CheckpointError: the folder is missing, damaged, or not such a model.
    """
    return ClipScorer(*load_open_clip(location, device))
