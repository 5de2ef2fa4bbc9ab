"""HPSv2, a CLIP tuned on human preferences, as a reward.

Owns HPSv2's image geometry, in which it differs from CLIP. Source: arXiv:2306.09341 and
github.com/tgxs002/HPSv2, img_score.py.
"""

from dataclasses import replace

import open_clip
import torch

from rlgen.rewards.open_clip_model import CosineScorer, Preprocess, Tokenizer, load_open_clip


class HpsScorer(CosineScorer):
    """Cosine of image and prompt; the longer side is resized to fit and the rest is black.

    The resize works on floats and is not clamped, as in the HPSv2 package; the padding is
    zero before the normalisation.
    """

    def __init__(self, model: open_clip.CLIP, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
        geometry = replace(preprocess, resize_mode="longest", interpolation="bicubic", clamp=False)
        super().__init__(model, geometry, tokenizer)


def load_hps_scorer(location: str, device: torch.device | str = "cpu") -> HpsScorer:
    """Read a scorer from a folder in open_clip's `local-dir:` format.

    Raises:
        CheckpointError: the folder is missing, damaged, or not such a model.
    """
    return HpsScorer(*load_open_clip(location, device))
