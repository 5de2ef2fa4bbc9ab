"""HPSv2, a CLIP tuned on human preferences, as a reward.

Owns HPSv2's image geometry, in which it differs from CLIP. Source: arXiv:2306.09341 and
github.com/tgxs002/HPSv2, img_score.py. The package `hpsv2` computes the same; it is not used
because its pins exclude current versions of Ray's and MLflow's dependencies.
"""

from dataclasses import replace

import open_clip
import torch

from rlgen.errors import ConfigError
from rlgen.features.open_clip_files import is_weight_file, load_open_clip
from rlgen.features.preprocess import Preprocess, default_preprocess
from rlgen.rewards.open_clip_model import CosineScorer, Tokenizer

ARCHITECTURE = "ViT-H-14"


class HpsScorer(CosineScorer):
    """Cosine of image and prompt; the longer side is resized to fit and the rest is black.

    The resize works on floats and is not clamped, as in the HPSv2 package; the padding is
    zero before the normalisation.
    """

    def __init__(self, model: open_clip.CLIP, preprocess: Preprocess, tokenizer: Tokenizer) -> None:
        geometry = replace(
            preprocess, resize_mode="longest", interpolation="bicubic", resampling="float"
        )
        super().__init__(model, geometry, tokenizer)


def load_hps_scorer(
    location: str, device: torch.device | str = "cpu", *, model: str | None = None
) -> HpsScorer:
    """Read a scorer.

    Args:
        location: a folder in open_clip's `local-dir:` format, or one published weight file, such
            as HPS_v2_compressed.pt (v2.0) and HPS_v2.1_compressed.pt.
        model: for a single file, open_clip's name of its architecture; None is ViT-H-14.
    Raises:
        CheckpointError: it is missing, damaged, or not such a model.
        ConfigError: open_clip has no such model, or it has QuickGELU, which HPSv2 has not.
    """
    if model is None and is_weight_file(location):
        model = ARCHITECTURE
    if model is not None and model.endswith("-quickgelu"):
        raise ConfigError(
            f"HPSv2 was trained with plain GELU and {model} has QuickGELU, with which every score "
            f"would be wrong; use model={ARCHITECTURE}."
        )
    net, preprocess, tokenizer = load_open_clip(location, device, model=model)
    if model is not None:
        # Other weights of the same architecture may have another mean; HPSv2 has OpenAI's.
        preprocess = default_preprocess(preprocess.image_size[0])
    return HpsScorer(net, preprocess, tokenizer)
