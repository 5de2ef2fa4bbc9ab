"""Scorers from their configuration.

Owns the choice of the class by `type`.
"""

import torch

from rlgen.config.reward import ClipRewardConfig, PreferenceRewardConfig
from rlgen.rewards.clip import load_clip_scorer
from rlgen.rewards.hpsv2 import load_hps_scorer
from rlgen.rewards.protocol import InstanceScorer


def load_scorer(
    config: ClipRewardConfig | PreferenceRewardConfig, device: torch.device
) -> InstanceScorer:
    """Build the scorer that a configuration names.

    Raises:
        CheckpointError: its files are missing, damaged or of another kind.
    """
    if isinstance(config, ClipRewardConfig):
        return load_clip_scorer(config.checkpoint, device)
    return load_hps_scorer(config.checkpoint, device)
