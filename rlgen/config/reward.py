"""The configuration of rewards and advantages.

Owns the scorers, the distribution reward and how they become advantages. Must not import torch.
"""

from typing import Annotated, Literal

from pydantic import Field

from rlgen.config.base import EMBEDDED, NonNegative, Positive, PositiveInt, Section
from rlgen.config.distribution import LooFidConfig

RewardScale = Literal["group_std", "batch_std", "running", "none"]


class ClipRewardConfig(Section):
    """Cosine between image and prompt in an open_clip model."""

    type: Literal["clip"] = "clip"
    """Which scorer this is."""
    weight: NonNegative = 0.05
    """Weight of its advantages."""
    checkpoint: str = EMBEDDED
    """Folder (open_clip's local-dir layout) of the model."""
    prompt: str = "a photo of the digit {class}"
    """Caption of a condition; {class} is replaced by its name."""


class PreferenceRewardConfig(Section):
    """Human-preference score in the manner of HPSv2."""

    type: Literal["hpsv2"] = "hpsv2"
    """Which scorer this is."""
    weight: NonNegative = 0.05
    """Weight of its advantages."""
    checkpoint: str = EMBEDDED
    """Folder (open_clip's local-dir layout) of the model."""
    prompt: str = "a photo of the digit {class}"
    """Caption of a condition; {class} is replaced by its name."""


ScorerConfig = Annotated[ClipRewardConfig | PreferenceRewardConfig, Field(discriminator="type")]


def _default_scorers() -> dict[str, ClipRewardConfig | PreferenceRewardConfig | None]:
    return {"clip": ClipRewardConfig(), "preference": PreferenceRewardConfig()}


class RewardConfig(Section):
    """Scoring: the reward actors, and what they score."""

    num_workers: PositiveInt = 1
    """Reward actors."""
    threads: PositiveInt = 1
    """CPU threads of each reward actor, and of the moment store."""
    num_cpus: NonNegative = 0.25
    """CPUs that Ray sets aside for each reward actor, and for the moment store."""
    num_gpus: NonNegative = 0.0
    """GPUs (or a share of one) for each reward actor."""
    scorers: dict[str, ScorerConfig | None] = Field(default_factory=_default_scorers)
    """Instance rewards by name; null removes one."""
    loo_fid: LooFidConfig | None = LooFidConfig()
    """The distribution reward; null leaves it out."""

    @property
    def active_scorers(self) -> "dict[str, ClipRewardConfig | PreferenceRewardConfig]":
        """The scorers that were not removed."""
        return {name: scorer for name, scorer in self.scorers.items() if scorer is not None}


class AdvantageConfig(Section):
    """From rewards to advantages."""

    combine: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum"
    """Normalise each reward and add the weighted advantages, or add the weighted rewards first."""
    instance_scale: RewardScale = "running"
    """What centred instance rewards are divided by: each group's or the batch's standard
    deviation, a running scale over the first steps, or nothing."""
    distribution_scale: RewardScale = "running"
    """The same for the distribution reward."""
    distribution_center: Literal["batch", "group"] = "batch"
    """Centre the distribution reward over the whole batch or within each group."""
    running_steps: PositiveInt = 20
    """Steps over which the running scale averages before it is frozen."""
    epsilon: Positive = 1e-6
    """Added to a standard deviation before dividing."""
    clip: Positive = 4.0
    """Largest size of one reward's normalised advantage."""
