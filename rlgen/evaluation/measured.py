"""Everything that an evaluation says of one policy at one guidance scale.

Owns which metric is taken over which images. Must not know where units come from.

Shapes: N generated images, R real images, F features, S spatial features.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlgen.evaluation.finished import JudgedUnit
from rlgen.evaluation.judge import RealFeatures
from rlgen.evaluation.metrics import (
    Spread,
    frechet_of_features,
    inception_score,
    kernel_distance,
    neighborhoods,
    vendi_score,
)
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.moments import Moments, batch_moments


@dataclass(frozen=True)
class Measured:
    """The metrics of one guidance scale; None where judge or configuration have no such thing."""

    num_images: int
    fid: float
    """Frechet distance in the judge's features, full covariance, divisors count - 1."""
    sfid: float | None
    """The same in the judge's spatial features."""
    fd_second: float | None
    """Frechet distance in the reward extractor's features."""
    kid: float
    kid_std: float
    """Over the subsets."""
    precision: float
    recall: float
    vendi: float
    """Effective number of different images in the judge's features."""
    inception_score: float | None
    """From the judge's class logits; published numbers are of the Inception network alone."""
    inception_score_std: float | None
    """Over the splits."""
    accuracy: float | None
    """Share of images whose class the judge recognises."""
    rewards: dict[str, float]
    """Mean of each scorer."""
    images_per_s: float
    """Sampling of one rollout worker, median over its units."""
    model_evaluations_per_image: int
    """Forward passes of the policy, with guidance twice."""
    missing: dict[str, str]
    """Metrics that are None, and why."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def as_metrics(self) -> dict[str, float]:
        """Flat names and numbers for the tracker."""
        values = self.as_json()
        rewards, _ = values.pop("rewards"), values.pop("missing")
        return {name: float(value) for name, value in values.items() if value is not None} | {
            f"reward/{name}": value for name, value in rewards.items()
        }


def measure(
    units: Sequence[JudgedUnit],
    real: RealFeatures,
    second: Moments | None,
    *,
    num_neighbors: int,
    model_evaluations_per_image: int,
) -> Measured:
    """Take all metrics of the images of one guidance scale.

    Precision and recall compare as many images as `real.neighbors_NF` has: they depend on the
    number. KID's subsets are as large as the smaller side if that has under 1000 images.

    Args:
        units: all units of the scale, in order.
        real: features of real images in the judge's space.
        second: moments of real images in the reward extractor's space, if there is one.
    """
    features_NF = _joined([unit.judge_features_BF for unit in units])
    logits_NC = _joined([unit.judge_logits_BC for unit in units])
    second_NF = _joined([unit.features_BF for unit in units])
    spatial_NS = _joined([unit.judge_spatial_BS for unit in units])
    hits_N = _joined([unit.judge_hits_B for unit in units])
    assert features_NF is not None, "an evaluation has at least one unit"
    kid = kernel_distance(features_NF, real.features_RF)
    near = neighborhoods(
        features_NF[: len(real.neighbors_NF)], real.neighbors_NF, num_neighbors=num_neighbors
    )
    score: Spread | None = None
    if logits_NC is not None:
        score = inception_score(logits_NC)
    missing: dict[str, str] = {}
    if spatial_NS is None or real.spatial is None:
        missing["sfid"] = _why_no_sfid(real, spatial_NS)
    if second is None or second_NF is None:
        missing["fd_second"] = "reward.loo_fid is null"
    if score is None:
        missing["inception_score"] = "the judge has no class logits; FID's Inception has"
    if hits_N is None:
        missing["accuracy"] = "the judge knows no classes, or others than the policy's"
    return Measured(
        num_images=len(features_NF),
        fid=frechet_of_features(features_NF, real.features_RF),
        sfid=_distance(spatial_NS, real.spatial),
        fd_second=_distance(second_NF, second),
        kid=kid.mean,
        kid_std=kid.std,
        precision=near.precision,
        recall=near.recall,
        vendi=vendi_score(features_NF),
        inception_score=None if score is None else score.mean,
        inception_score_std=None if score is None else score.std,
        accuracy=None if hits_N is None else float(hits_N.double().mean()),
        rewards={
            name: float(np.concatenate([unit.rewards[name] for unit in units]).mean(dtype=float))
            for name in units[0].rewards
        },
        images_per_s=median(len(unit.judge_features_BF) / unit.sampling_s for unit in units),
        model_evaluations_per_image=model_evaluations_per_image,
        missing=missing,
    )


def _why_no_sfid(real: RealFeatures, spatial_NS: Tensor | None) -> str:
    if spatial_NS is None:
        return f"the judge {real.feature_space} has no spatial features; FID's Inception has"
    return (
        "evaluation.judge_reference has no statistics of spatial features; make it again with the "
        "reference_moments job and --judge-features"
    )


def _distance(rows_NF: Tensor | None, real: Moments | None) -> float | None:
    """FID's distance; None where one side has nothing."""
    if rows_NF is None or real is None:
        return None
    return frechet_distance(batch_moments(rows_NF), real, unbiased=True)


def _joined(parts: Sequence[np.ndarray | None]) -> Tensor | None:
    """All units' rows, or None where the units have none."""
    found = [part for part in parts if part is not None]
    assert len(found) in (0, len(parts)), "units of one evaluation have the same parts"
    return torch.from_numpy(np.concatenate(found)) if found else None
