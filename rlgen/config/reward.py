"""The configuration of rewards and advantages.

Owns the scorers, the distribution reward and how they become advantages. Must not import torch.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlgen.config.base import EMBEDDED, REQUIRED, NonNegative, Positive, PositiveInt, Section
from rlgen.config.distribution import LooFidConfig

RewardScale = Literal["group_std", "batch_std", "running", "none"]

CLASS_PLACEHOLDER = "{class}"


def _checked_template(text: object) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{text!r} is no template; write a caption such as 'a photo of a {{class}}'"
        )
    for found in re.findall(r"\{[^{}]*\}", text):
        if found != CLASS_PLACEHOLDER:
            raise ValueError(
                f"the template {text!r} has {found}; {CLASS_PLACEHOLDER} is all that is filled in"
            )
    return text


def _checked_templates(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{value!r} is no list of templates")
    return tuple(_checked_template(text) for text in value)


def _checked_prompt(value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        return _checked_template(value)
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{value!r} is neither a template nor a list of templates")
    return _checked_templates(value)


Prompt = Annotated[str | tuple[str, ...], BeforeValidator(_checked_prompt)]
Templates = Annotated[tuple[str, ...], BeforeValidator(_checked_templates)]


class PromptedScorerConfig(Section):
    """What scorers share that compare an image with words."""

    type: str
    """Which scorer this is."""
    weight: NonNegative = 0.05
    """Weight of its advantages."""
    prompt: Prompt = "a photo of the digit {class}"
    """Caption of a condition; {class} is replaced by its name, and a caption without it asks for a
    style alone. Several captions in a list: the mean of their scores."""
    negative_prompts: Templates = ()
    """Captions that an image should not fit; the mean of their scores is taken off."""
    negative_weight: NonNegative = 1.0
    """Factor of what is taken off for the negative prompts."""


def _check_model_has_a_file(checkpoint: str, model: str | None) -> None:
    if checkpoint == EMBEDDED and model is not None:
        raise ValueError(
            f"model = {model} is the architecture of a published file, and checkpoint = {EMBEDDED} "
            "is a folder; give the file's path, or model null"
        )


class ClipRewardConfig(PromptedScorerConfig):
    """Cosine between image and prompt in an open_clip model."""

    type: Literal["clip"] = "clip"
    """Which scorer this is."""
    checkpoint: str = EMBEDDED
    """Folder (open_clip's local-dir layout) of the model, or a published file of weights."""
    model: str | None = None
    """open_clip's name of the architecture if checkpoint is a single file, such as
    `ViT-L-14-quickgelu`; null for a folder, which says it itself."""

    @model_validator(mode="after")
    def _model_has_a_file(self) -> Self:
        _check_model_has_a_file(self.checkpoint, self.model)
        return self


class PreferenceRewardConfig(PromptedScorerConfig):
    """Human-preference score in the manner of HPSv2."""

    type: Literal["hpsv2"] = "hpsv2"
    """Which scorer this is."""
    checkpoint: str = EMBEDDED
    """Folder (open_clip's local-dir layout) of the model, or a published file of weights."""
    model: str | None = None
    """open_clip's name of the architecture if checkpoint is a single file; null for a folder, which
    says it itself, and for a single file of ViT-H-14, as HPSv2 published them."""

    @model_validator(mode="after")
    def _model_has_a_file(self) -> Self:
        _check_model_has_a_file(self.checkpoint, self.model)
        return self


class AestheticRewardConfig(Section):
    """LAION's aesthetic score: a small head on CLIP's image features; words play no part."""

    type: Literal["aesthetic"] = "aesthetic"
    """Which scorer this is."""
    weight: NonNegative = 0.05
    """Weight of its advantages."""
    checkpoint: str = REQUIRED
    """Folder (open_clip's local-dir layout) of the CLIP, or a published file of its weights."""
    model: str | None = None
    """open_clip's name of the architecture if checkpoint is a single file, such as
    `ViT-L-14-quickgelu`; null for a folder, which says it itself."""
    head: str = REQUIRED
    """Path or URL of the head's weights."""

    @model_validator(mode="after")
    def _nothing_is_embedded(self) -> Self:
        if EMBEDDED in (self.checkpoint, self.head):
            raise ValueError(
                f"checkpoint = {self.checkpoint} and head = {self.head}: the embedded default has "
                "no aesthetic model; give paths"
            )
        return self


class PythonRewardConfig(PromptedScorerConfig):
    """A scorer of your own: any class that follows `UserScorer` in rlgen/rewards/user.py."""

    type: Literal["python"] = "python"
    """Which scorer this is."""
    target: str
    """`package.module:Class`; the module is found like any other, also in the current folder."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of its `__init__`; `device` is added to them."""
    prompt: Prompt = CLASS_PLACEHOLDER
    """Caption of a condition; {class} is replaced by its name. Several captions in a list: the
    scorer is called for each, and the mean of its scores counts."""
    try_first: bool = True
    """Make the scorer on the driver's CPU and score two images before anything starts; false for
    one that only runs on a GPU, of which then only name and arguments are checked."""

    @field_validator("target")
    @classmethod
    def _target_names_a_class(cls, target: str) -> str:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", target):
            raise ValueError(f"{target!r} names no class; write package.module:Class")
        return target

    @field_validator("arguments")
    @classmethod
    def _device_is_ours(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if "device" in arguments:
            raise ValueError("rlgen passes device itself; name the argument differently")
        return arguments


AnyScorerConfig = (
    ClipRewardConfig | PreferenceRewardConfig | AestheticRewardConfig | PythonRewardConfig
)
ScorerConfig = Annotated[AnyScorerConfig, Field(discriminator="type")]
SCORER_TYPES: dict[str, type[Section]] = {
    "clip": ClipRewardConfig,
    "hpsv2": PreferenceRewardConfig,
    "aesthetic": AestheticRewardConfig,
    "python": PythonRewardConfig,
}


def _default_scorers() -> dict[str, AnyScorerConfig | None]:
    return {"clip": ClipRewardConfig(), "preference": PreferenceRewardConfig()}


class RewardConfig(Section):
    """Scoring: the reward actors, and what they score."""

    num_workers: PositiveInt = 1
    """Reward actors; with min_workers, the most that join while the cluster has room."""
    min_workers: PositiveInt | None = None
    """Reward actors that a run starts and goes on with; null waits for all num_workers."""
    threads: PositiveInt = 1
    """CPU threads of each reward actor, and of the moment store."""
    num_cpus: NonNegative = 0.25
    """CPUs that Ray sets aside for each reward actor, and for the moment store."""
    num_gpus: NonNegative = 0.0
    """GPUs (or a share of one) for each reward actor."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for reward actors, such as `ray.io/market-type: spot`."""
    scorers: dict[str, ScorerConfig | None] = Field(default_factory=_default_scorers)
    """Instance rewards by name; null removes one."""
    loo_fid: LooFidConfig | None = LooFidConfig()
    """The distribution reward; null leaves it out."""

    @field_validator("scorers")
    @classmethod
    def _names_can_be_metrics(
        cls, scorers: dict[str, AnyScorerConfig | None]
    ) -> dict[str, AnyScorerConfig | None]:
        for name in scorers:
            if name == "loo_fid" or not re.fullmatch(r"[A-Za-z_][\w-]*", name):
                raise ValueError(
                    f"{name!r} can't be the name of a scorer, which names its metric; use letters, "
                    "digits, _ and -, and not loo_fid"
                )
        return scorers

    @property
    def fewest_workers(self) -> int:
        """Reward actors that there must be."""
        return self.min_workers or self.num_workers

    @property
    def active_scorers(self) -> dict[str, AnyScorerConfig]:
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
