"""CLIP similarity as a reward.

Owns nothing but its name and how it is loaded: `open_clip_model` does the work.
"""

import torch

from rlgen.features.open_clip_files import load_open_clip
from rlgen.rewards.open_clip_model import CosineScorer


class ClipScorer(CosineScorer):
    """Cosine of image and prompt under any open_clip model, without the logit scale."""


def load_clip_scorer(
    location: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> ClipScorer:
    """Read a scorer.

    Args:
        location: a folder in open_clip's `local-dir:` format, or one published weight file.
        model: for a single file, open_clip's name of its architecture. OpenAI's ViT-L/14 is
            ViT-L-14-quickgelu.
    Raises:
        CheckpointError: it is missing, damaged, or not such a model.
        ConfigError: open_clip has no such model.
    """
    return ClipScorer(*load_open_clip(location, device, model=model))
