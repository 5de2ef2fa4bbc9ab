"""Instance rewards from their configuration.

Owns the choice of the scorer by `type`.
"""

import torch

from rlgen.config.base import EMBEDDED
from rlgen.config.reward import (
    AestheticRewardConfig,
    AnyScorerConfig,
    ClipRewardConfig,
    PreferenceRewardConfig,
    PythonRewardConfig,
)
from rlgen.features.open_clip_files import is_weight_file, open_clip_config
from rlgen.rewards.aesthetic import load_aesthetic_scorer, load_head
from rlgen.rewards.clip import load_clip_scorer
from rlgen.rewards.hpsv2 import ARCHITECTURE, load_hps_scorer
from rlgen.rewards.instance import InstanceReward
from rlgen.rewards.prompts import prompts_of
from rlgen.rewards.protocol import InstanceScorer
from rlgen.rewards.user import find_scorer_class, load_user_scorer
from rlgen.storage import open_binary


def load_reward(name: str, config: AnyScorerConfig, device: torch.device) -> InstanceReward:
    """Build a scorer and put it together with its name and prompts.

    Raises:
        CheckpointError: the files of a built-in scorer are missing, damaged or of another kind.
        ConfigError: open_clip has no such model; a user's scorer can't be imported or made.
    """
    return InstanceReward(name, load_scorer(config, device), prompts_of(config))


def load_scorer(config: AnyScorerConfig, device: torch.device) -> InstanceScorer:
    """Build the scorer that a configuration names; see `load_reward` for errors."""
    if isinstance(config, PythonRewardConfig):
        return load_user_scorer(config, device)
    if isinstance(config, AestheticRewardConfig):
        return load_aesthetic_scorer(config.checkpoint, config.head, device, model=config.model)
    load = load_clip_scorer if isinstance(config, ClipRewardConfig) else load_hps_scorer
    return load(config.checkpoint, device, model=config.model)


def check_scorer(config: AnyScorerConfig) -> None:
    """Find what a scorer is made of, without building a model; the embedded default is passed over.

    Raises:
        CheckpointError, ConfigError, StorageError: as `load_reward`, as far as can be told so.
    """
    if isinstance(config, PythonRewardConfig):
        find_scorer_class(config)
        return
    if config.checkpoint == EMBEDDED:
        return
    model = config.model
    if is_weight_file(config.checkpoint):
        if isinstance(config, PreferenceRewardConfig) and model is None:
            model = ARCHITECTURE
        with open_binary(config.checkpoint):
            pass
    open_clip_config(config.checkpoint, model)
    if isinstance(config, AestheticRewardConfig):
        load_head(config.head)
