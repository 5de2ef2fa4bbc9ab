"""What crosses a process: frozen dataclasses of numpy arrays and plain values.

Owns the messages between roles; must not know torch or Ray. Tokens travel, pixels do not:
a few hundred bytes an image.

Shapes: P conditions, G samples per condition, B = P*G images (condition-major: image
p*G + g is sample g of condition p), L image tokens, F feature dimensions.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Purpose = Literal["train", "bootstrap", "evaluate"]


@dataclass(frozen=True)
class SamplingSettings:
    """The distribution that tokens are drawn from, given the policy's logits."""

    cfg_scale: float = 1.0
    """Classifier-free guidance: 1 is none; other values double the forward passes."""
    cfg_interval: int | None = None
    """Blocks after this one plus 1 are not guided; None guides all."""
    temperature: float = 1.0
    top_k: int = 0
    """0 keeps every code."""
    top_p: float = 1.0
    """1 keeps every code."""

    @property
    def is_guided(self) -> bool:
        """Whether sampling and scoring need the unconditional logits as well."""
        return self.cfg_scale != 1.0


@dataclass(frozen=True)
class WorkUnit:
    """A fixed-shape piece of sampling that any rollout worker can do, with the same result."""

    unit_id: str
    purpose: Purpose
    step: int
    index: int
    """Position among the units of the step; results are pooled in this order."""
    policy_version: int
    """Weights to sample with; a worker that holds others fetches these first."""
    seed: int
    """First part of the noise key."""
    condition_indices_P: np.ndarray
    """int64 [P]: place of each condition in the step; part of the noise key."""
    class_ids_P: np.ndarray
    """int64 [P]."""
    group_size: int
    settings: SamplingSettings
    kept_images: tuple[int, ...] = ()
    """Which of the unit's images the reward worker returns as thumbnails."""
    is_detailed: bool = False
    """Whether an evaluation also asks for features in the LOO-FID extractor's space and for the
    judge's class logits and spatial features."""

    @property
    def num_images(self) -> int:
        """P * G."""
        return len(self.class_ids_P) * self.group_size


@dataclass(frozen=True)
class Rollout:
    """The tokens sampled for one work unit."""

    unit: WorkUnit
    policy_version: int
    tokens_BL: np.ndarray
    """int32 [B, L] codes."""
    rollout_logprobs_BL: np.ndarray
    """float32 [B, L] nats, of the drawn tokens under the distribution they were drawn from."""
    sampling_s: float


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with what the reward worker found."""

    rollout: Rollout
    rewards: dict[str, np.ndarray]
    """Per scorer float32 [B], finite."""
    features_BF: np.ndarray | None
    """float32 [B, F] in the LOO-FID extractor's space; None if no one asked."""
    judge_features_BF: np.ndarray | None
    """float32 [B, F'] in the judge's space; only for purpose "evaluate"."""
    judge_hits_B: np.ndarray | None
    """bool [B]: the judge recognises the image's class; None if the judge knows no classes."""
    images_u8: np.ndarray | None
    """uint8 [len(kept_images), 3, H, W]."""
    scoring_s: float
    judge_logits_BC: np.ndarray | None = None
    """float32 [B, C]; only for detailed units, None if the judge has no class logits."""
    judge_spatial_BS: np.ndarray | None = None
    """float32 [B, S]; only for detailed units, None if the judge has no spatial features."""


@dataclass(frozen=True)
class StepRewards:
    """What the moment store answers to the commit of one step."""

    step: int
    advantages_B: np.ndarray
    """float32 [B], weighted over all rewards."""
    rewards: dict[str, np.ndarray]
    """Per reward float32 [B]; instance rewards and `loo_fid`."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class LearnerBatch:
    """One rank's part of a step: whole groups, in the order of the step."""

    step: int
    policy_version: int
    """Version that the tokens were sampled from (the oldest one, if they differ)."""
    class_ids_B: np.ndarray
    tokens_BL: np.ndarray
    rollout_logprobs_BL: np.ndarray
    advantages_B: np.ndarray
    num_images_total: int
    """Images of the step over all ranks: what the loss is divided by."""


@dataclass(frozen=True)
class GroupCounts:
    """Training groups since the roles were started; generated = taken + dropped + in flight."""

    generated: int = 0
    """Sampled, at least once."""
    taken: int = 0
    """Scored and handed to the learner's side."""
    dropped: dict[str, int] = field(default_factory=dict)
    """By reason."""
    in_flight: int = 0

    def __add__(self, other: "GroupCounts") -> "GroupCounts":
        """The sum of the counts of two coordinators."""
        return GroupCounts(
            self.generated + other.generated,
            self.taken + other.taken,
            dict(Counter(self.dropped) + Counter(other.dropped)),
            self.in_flight + other.in_flight,
        )

    def closed(self) -> "GroupCounts":
        """The counts of a coordinator that is gone: what was in flight is rewound."""
        dropped = Counter(self.dropped) + Counter({"rewound": self.in_flight})
        return GroupCounts(self.generated, self.taken, dict(dropped), 0)


@dataclass(frozen=True)
class Health:
    """What has happened to the roles so far."""

    restarts: dict[str, int]
    """Processes replaced, by role."""
    recovery_s: dict[str, float]
    """Seconds from the last time that a loss was noticed to a replacement at work, by role."""
    groups: GroupCounts
    workers: dict[str, int] = field(default_factory=dict)
    """Workers that have come up and were not lost, by role."""


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in a flat weight buffer."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class WeightManifest:
    """What a flat weight buffer holds, and the digest that the receiver must find."""

    version: int
    digest: str
    """Of the buffer's bytes; see nn/flat.py."""
    num_bytes: int
    tensors: tuple[TensorSpec, ...] = field(repr=False)
