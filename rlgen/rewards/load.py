"""Instance rewards from their configuration.

Owns the choice of the scorer by `type`.
"""

import torch

from rlgen.config.reward import (
    AestheticRewardConfig,
    AnyScorerConfig,
    ClipRewardConfig,
    PreferenceRewardConfig,
    PythonRewardConfig,
)
from rlgen.errors import ConfigError
from rlgen.rewards.clip import load_clip_scorer
from rlgen.rewards.hpsv2 import load_hps_scorer
from rlgen.rewards.instance import InstanceReward
from rlgen.rewards.prompts import prompts_of
from rlgen.rewards.protocol import InstanceScorer
from rlgen.rewards.user import load_user_scorer


def load_reward(name: str, config: AnyScorerConfig, device: torch.device) -> InstanceReward:
    """Build a scorer and put it together with its name and prompts.

    Raises:
        CheckpointError: the files of a built-in scorer are missing, damaged or of another kind.
        ConfigError: a user's scorer can't be imported or made.
    """
    return InstanceReward(name, load_scorer(config, device), prompts_of(config))


def load_scorer(config: AnyScorerConfig, device: torch.device) -> InstanceScorer:
    """Build the scorer that a configuration names; see `load_reward` for errors."""
    if isinstance(config, ClipRewardConfig):
        return load_clip_scorer(config.checkpoint, device)
    if isinstance(config, PreferenceRewardConfig):
        return load_hps_scorer(config.checkpoint, device)
    if isinstance(config, PythonRewardConfig):
        return load_user_scorer(config, device)
    assert isinstance(config, AestheticRewardConfig), "all types are listed"
    raise ConfigError(f"no loader takes the aesthetic head {config.head} of {config.model} yet.")
