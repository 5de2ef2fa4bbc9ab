"""The judge: quality and diversity in a feature space that no reward sees.

Owns the metrics of an evaluation. Must not know who sampled the images.

Shapes: B images, F features, R real images, S spatial features.
"""

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlgen.errors import ConfigError
from rlgen.evaluation.metrics import neighborhoods
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.moments import Moments, batch_moments
from rlgen.storage import read_bytes
from rlgen.types import ScoredRollout


@dataclass(frozen=True)
class RealFeatures:
    """Features of real images in the judge's space."""

    feature_space: str
    features_RF: Tensor
    """float32 [R, F]."""
    neighbors_NF: Tensor
    """float32 [N, F]: the fixed subset that precision and recall compare with."""
    moments: Moments
    spatial: Moments | None = None
    """Of the real images' spatial features, for sFID; None if the file has none."""


def save_real_features(
    path: str,
    *,
    feature_space: str,
    features_RF: Tensor,
    neighbors_NF: Tensor,
    spatial: Moments | None = None,
) -> None:
    """Write features of real images as .npz.

    Args:
        path: local.
        feature_space: the judge's id.
        features_RF: float32.
        neighbors_NF: float32, some of these.
        spatial: moments of the same images' spatial features, if the judge has any.
    """
    arrays: dict[str, Any] = {
        "feature_space": np.str_(feature_space),
        "features": features_RF.numpy(),
        "neighbors": neighbors_NF.numpy(),
    }
    if spatial is not None:
        arrays["spatial_count"] = np.int64(spatial.count)
        arrays["spatial_mean"] = spatial.mean_F.numpy()
        arrays["spatial_cov"] = spatial.cov_FF.numpy()
    with open(path, "wb") as stream:
        np.savez(stream, **arrays)


def load_real_features(location: str) -> RealFeatures:
    """Read features of real images.

    Raises:
        StorageError: the file is missing or unreadable.
        ConfigError: it is not such a file.
    """
    payload = read_bytes(location)
    try:
        loaded = np.load(BytesIO(payload), allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise ValueError("it holds one plain array")
        with loaded as archive:
            space = str(archive["feature_space"])
            features = torch.from_numpy(archive["features"])
            neighbors = torch.from_numpy(archive["neighbors"])
            spatial = _spatial_moments(archive) if "spatial_mean" in archive.files else None
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(
            f"evaluation.judge_reference = {location} is no file of real features "
            f"({type(error).__name__}: {error}); make it with the "
            "reference_moments job and --judge-features."
        ) from None
    return RealFeatures(space, features, neighbors, batch_moments(features), spatial)


def _spatial_moments(archive: np.lib.npyio.NpzFile) -> Moments:
    count, mean_S, cov_SS = (archive[f"spatial_{name}"] for name in ("count", "mean", "cov"))
    if mean_S.ndim != 1 or cov_SS.shape != (len(mean_S), len(mean_S)):
        raise ValueError(f"spatial_mean is {list(mean_S.shape)}, spatial_cov {list(cov_SS.shape)}")
    return Moments(float(count), torch.from_numpy(mean_S), torch.from_numpy(cov_SS))


@dataclass(frozen=True)
class Quality:
    """What an evaluation at one guidance scale found."""

    judge_fid: float
    """Frechet distance in the judge's features, full covariance."""
    precision: float
    recall: float
    accuracy: float | None
    """Share of images whose class the judge recognises; None if it knows no classes."""
    rewards: dict[str, float]
    """Mean of each instance reward."""

    def as_metrics(self) -> dict[str, float]:
        """Flat metric names for the tracker."""
        metrics = {
            "judge/fid": self.judge_fid,
            "judge/precision": self.precision,
            "judge/recall": self.recall,
        }
        if self.accuracy is not None:
            metrics["judge/accuracy"] = self.accuracy
        return metrics | {f"judge/{name}": value for name, value in self.rewards.items()}


def measure_quality(
    scored: Sequence[ScoredRollout], real: RealFeatures, *, num_neighbors: int
) -> Quality:
    """Compare one evaluation's images with real ones.

    Args:
        scored: all units of the evaluation, in order.
        real: features of real images in the judge's space.
        num_neighbors: k of the k-nearest-neighbour precision and recall.
    Source: precision and recall, arXiv:1904.06991, by torch-fidelity.
    """
    features = torch.from_numpy(np.concatenate([_judge_features(item) for item in scored]))
    near = neighborhoods(
        features[: len(real.neighbors_NF)], real.neighbors_NF, num_neighbors=num_neighbors
    )
    hits = [item.judge_hits_B for item in scored if item.judge_hits_B is not None]
    names = scored[0].rewards
    return Quality(
        judge_fid=frechet_distance(batch_moments(features), real.moments),
        precision=near.precision,
        recall=near.recall,
        accuracy=float(np.concatenate(hits).mean()) if hits else None,
        rewards={
            name: float(np.concatenate([item.rewards[name] for item in scored]).mean())
            for name in names
        },
    )


def _judge_features(item: ScoredRollout) -> np.ndarray:
    assert item.judge_features_BF is not None, "evaluation units are judged"
    return item.judge_features_BF
