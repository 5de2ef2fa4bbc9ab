"""The typed configuration of a GRPO run; the defaults are the embedded digits preset.

Owns every field's name, type, default and help text, and the checks across fields. Must not
import torch, Ray or MLflow. The word `embedded` in place of a path means: the file that the
pretrain job makes for the embedded default.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from rlgen.config.base import EMBEDDED, Dtype, NonNegative, Positive, PositiveInt, Section
from rlgen.config.digits import DigitsConfig
from rlgen.config.guard import GuardConfig
from rlgen.config.learning import EntropyConfig, GrpoConfig, LearnerConfig
from rlgen.config.models import model_spec
from rlgen.config.replay import ReplayConfig
from rlgen.config.reward import (
    AdvantageConfig,
    RewardConfig,
)
from rlgen.config.tracking import TrackingConfig
from rlgen.config.tree import flatten
from rlgen.config.weights import WeightsConfig


class PublicFile(Section):
    """A weight file: rlgen's own, which says what it holds, or a published one, named here."""

    checkpoint: str = EMBEDDED
    """Path or URL of the weights."""
    model: str | None = None
    """Published model that the file holds, such as `llamagen-l-256` (config/models.py lists all);
    null for a file that rlgen wrote."""
    architecture: dict[str, Any] = Field(default_factory=dict)
    """Fields that differ from the published model's, such as `num_classes: 100`."""
    sha256: str | None = None
    """Digest that the file must have; null checks nothing."""

    @field_validator("model")
    @classmethod
    def _model_is_known(cls, name: str | None) -> str | None:
        if name is not None:
            model_spec(name)
        return name


class PolicyConfig(PublicFile):
    """The image generator that is trained."""

    captions: str | None = None
    """Path or URL of encoded captions, the conditions of a text-conditional policy."""


class TokenizerConfig(PublicFile):
    """The decoder from tokens to pixels; it is not trained."""


class RolloutConfig(Section):
    """Sampling: how many images a step has, how they are cut into units, who samples them."""

    num_workers: PositiveInt = 2
    """Rollout actors; with min_workers, the most that join while the cluster has room."""
    min_workers: PositiveInt | None = None
    """Rollout actors that a run starts and goes on with; the others, up to num_workers, join when
    nodes join and leave with them. null waits for all."""
    threads: PositiveInt = 1
    """CPU threads of each rollout actor."""
    num_cpus: NonNegative = 0.25
    """CPUs that Ray sets aside for each rollout actor; roles that take turns may share one."""
    num_gpus: NonNegative = 0.0
    """GPUs (or a share of one) for each rollout actor."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes for rollout actors, such as `ray.io/market-type: spot`; Ray also knows
    `!x`, `in(x, y)` and `!in(x, y)`."""
    conditions_per_step: PositiveInt = 60
    """Conditions (classes) of a step; classes are balanced and shuffled."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Images per condition; advantages compare them with each other."""
    conditions_per_unit: PositiveInt = 15
    """Conditions in a work unit; the unit's shape does not depend on the workers."""
    temperature: Positive = 1.0
    """Divides the logits before sampling."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Keep only the k likeliest codes; 0 keeps all."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Keep the likeliest codes up to this mass; 1 keeps all."""
    cfg_scale: Annotated[float, Field(ge=1.0)] = 1.0
    """Classifier-free guidance in rollouts; the learner scores the guided distribution. 1 is none.
    A VAR policy reaches it at its last scale; VAR's own `cfg` is this minus 1."""
    cfg_interval: Annotated[int, Field(ge=0)] | None = None
    """Guide only the tokens up to this position plus 1; null guides all."""
    dtype: Dtype = "float32"
    """Number format of the samplers' weights and arithmetic."""

    @property
    def fewest_workers(self) -> int:
        """Rollout actors that there must be."""
        return self.min_workers or self.num_workers


class EvaluationConfig(Section):
    """The judge: image quality and diversity in a feature space that no reward sees."""

    every_steps: Annotated[int, Field(ge=0)] = 20
    """Steps between evaluations without guidance during training; 0 evaluates only the ends."""
    num_images: Annotated[int, Field(ge=10)] = 2000
    """Images per evaluation."""
    images_per_unit: PositiveInt = 250
    """Images in one work unit of an evaluation."""
    cfg_scales: Annotated[tuple[Annotated[float, Field(gt=1.0)], ...], Field(strict=False)] = (
        1.25,
        1.5,
        2.0,
        3.0,
    )
    """Guidance scales tried before and after, beside no guidance."""
    seed: Annotated[int, Field(ge=0)] = 1234
    """Sampling seed of every evaluation, so that the same noise is compared."""
    judge: str = EMBEDDED
    """Path or URL of the judge's weights."""
    judge_reference: str = EMBEDDED
    """Path or URL of features of real images in the judge's space."""
    num_neighbors: PositiveInt = 3
    """k of the k-nearest-neighbour precision and recall."""
    grid_images_per_class: PositiveInt = 8
    """Columns of the fixed-seed grid."""
    grid_classes: PositiveInt = 10
    """Rows of the fixed-seed grid."""


class CheckpointConfig(Section):
    """What is saved, where and how often."""

    uri: str | None = None
    """Folder or URL of checkpoints; by default `checkpoints` in the output folder."""
    every_steps: PositiveInt = 40
    """Steps between checkpoints; the last step is always saved."""
    keep: PositiveInt = 2
    """Newest checkpoints kept."""
    timeout_s: Positive = 600.0
    """Longest time that writing one checkpoint may take, beside the training; then it counts as
    failed."""
    retries: Annotated[int, Field(ge=0)] = 8
    """How often each file is tried again, after pauses of 1, 2, 4 ... up to 30 s."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` goes on from the newest checkpoint of an interrupted run with the same settings, when
    the same command is given again."""
    resume_from: str | None = None
    """A checkpoint (`.../step-00040`) to go on from; with the same config the run ends as if it
    had never been interrupted."""


class ClusterConfig(Section):
    """Ray."""

    address: str = "auto"
    """`auto` takes the cluster that RAY_ADDRESS names, or one of `ray start` on this machine, and
    starts one here if there is none; `local` always starts one."""
    namespace: str = "rlgen"
    """Ray namespace of the named actors."""
    dashboard: bool = True
    """Whether a Ray that the run starts has its dashboard, which takes eleven processes."""
    placement_timeout_s: Positive = 20.0
    """How long a run waits for free resources before it stops and says what is missing; where
    nodes are added on demand, give them the time to come."""
    start_timeout_s: Positive = 120.0
    """How long actors may take to come up before the run stops and says what is missing."""
    step_timeout_s: Positive = 600.0
    """Longest wait for sampling, scoring or learning of one step."""
    heartbeat_timeout_s: Positive = 15.0
    """A process that gives no sign of life for so long hangs: it is killed and replaced."""
    max_restarts: Annotated[int, Field(ge=0)] = 5
    """How often a process may be replaced within one step before the run gives up."""


class RunConfig(Section):
    """A GRPO run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of conditions and sampling noise."""
    steps: Annotated[int, Field(ge=1)] = 120
    """Policy updates."""
    runtime: Literal["ray", "local"] = "ray"
    """`ray` places actors on a cluster; `local` runs the same objects in this process."""
    max_policy_lag: Annotated[int, Field(ge=0)] = 0
    """Steps that sampling may run ahead of the learner; 0 is synchronous."""
    class_names: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = (
        "zero",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
    )
    """Names of the classes, in the order of their ids."""
    policy: PolicyConfig = PolicyConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    rollout: RolloutConfig = RolloutConfig()
    reward: RewardConfig = RewardConfig()
    advantage: AdvantageConfig = AdvantageConfig()
    grpo: GrpoConfig = GrpoConfig()
    entropy: EntropyConfig = EntropyConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    guard: GuardConfig = GuardConfig()
    replay: ReplayConfig = ReplayConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()
    digits: DigitsConfig = DigitsConfig()

    @property
    def num_units(self) -> int:
        """Work units of a step."""
        return self.rollout.conditions_per_step // self.rollout.conditions_per_unit

    @property
    def images_per_step(self) -> int:
        """conditions_per_step * group_size."""
        return self.rollout.conditions_per_step * self.rollout.group_size

    @property
    def is_exact(self) -> bool:
        """Whether sampler and learner both compute in float32."""
        return self.rollout.dtype == self.learner.dtype == "float32"

    @model_validator(mode="after")
    def _formats_fit(self) -> Self:
        if self.learner.lora is not None and self.grpo.reference == "ema":
            raise ValueError(
                "grpo.reference = ema needs a second copy of the weights, which learner.lora "
                "saves; use reference frozen, or lora null"
            )
        return self

    @model_validator(mode="after")
    def _crews_fit(self) -> Self:
        for name, crew in (("rollout", self.rollout), ("reward", self.reward)):
            if crew.fewest_workers > crew.num_workers:
                raise ValueError(
                    f"{name}.min_workers = {crew.min_workers} is above {name}.num_workers = "
                    f"{crew.num_workers}, which is the most; raise that one"
                )
        return self

    @model_validator(mode="after")
    def _batch_algebra_holds(self) -> Self:
        conditions, ranks = self.rollout.conditions_per_step, self.learner.num_workers
        per_unit = self.rollout.conditions_per_unit
        if conditions % per_unit:
            raise ValueError(
                f"rollout.conditions_per_step = {conditions} can't be cut into units of "
                f"rollout.conditions_per_unit = {per_unit}; use {_divisors(conditions)}"
            )
        if conditions % ranks:
            raise ValueError(
                f"rollout.conditions_per_step = {conditions} groups of {self.rollout.group_size} "
                f"images can't be split over learner.num_workers = {ranks} ranks; use "
                f"{_divisors(conditions)} ranks"
            )
        in_grid = len(self.class_names) * self.evaluation.grid_images_per_class
        if self.evaluation.num_images < in_grid:
            raise ValueError(
                f"evaluation.num_images = {self.evaluation.num_images} can't fill the grid of "
                f"{len(self.class_names)} classes x evaluation.grid_images_per_class = "
                f"{self.evaluation.grid_images_per_class}; use at least {in_grid}"
            )
        if not self.reward.active_scorers and self.reward.loo_fid is None:
            raise ValueError("there is no reward: set reward.scorers or reward.loo_fid")
        if self.max_reward_weight == 0.0:
            raise ValueError("every reward has weight 0; give at least one a positive weight")
        return self

    def keys_with(self, value: str) -> list[str]:
        """Dotted keys of all fields that hold this value."""
        return [key for key, found in flatten(self.model_dump()) if found == value]

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with some dotted keys replaced, checked like any configuration."""
        tree = self.model_dump()
        for key, value in values.items():
            *parents, last = key.split(".")
            section = tree
            for parent in parents:
                section = section[parent]
            section[last] = value
        return type(self).model_validate(tree)

    def flattened(self) -> dict[str, Any]:
        """Dotted keys and values of all fields."""
        return dict(flatten(self.model_dump(mode="json")))

    @property
    def max_reward_weight(self) -> float:
        """The largest weight of any reward."""
        weights = [scorer.weight for scorer in self.reward.active_scorers.values()]
        if self.reward.loo_fid is not None:
            weights.append(self.reward.loo_fid.weight)
        return max(weights, default=0.0)


def _divisors(number: int) -> str:
    divisors = [str(d) for d in range(1, number + 1) if number % d == 0]
    return ", ".join(divisors[:-1]) + f" or {divisors[-1]}" if len(divisors) > 1 else divisors[0]
