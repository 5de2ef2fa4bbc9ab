"""The judge's numbers on synthetic features, and the file of real features.

Shapes: B images, R real images, N neighbours' real images, F features.
"""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from rlgen.errors import ConfigError, RlgenError, StorageError
from rlgen.evaluation.judge import (
    RealFeatures,
    load_real_features,
    measure_quality,
    save_real_features,
)
from rlgen.moments.moments import batch_moments
from rlgen.types import Rollout, SamplingSettings, ScoredRollout, WorkUnit
from tests.tiny import scored

NUM_FEATURES = 4


def draw(count: int, seed: int, *, shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.array([[1, 0.3, 0, 0], [0, 1, 0.5, 0], [0, 0, 1, 0], [0.2, 0, 0, 1]])
    normal = generator.normal(size=(count, NUM_FEATURES)) @ mixing
    return (shift + scale * normal).astype(np.float32)


def real_of(features: np.ndarray, num_neighbors: int | None = None) -> RealFeatures:
    tensor = torch.from_numpy(features)
    return RealFeatures("toy:4", tensor, tensor[:num_neighbors], batch_moments(tensor))


def unit_scored(features: np.ndarray, **fields: Any) -> ScoredRollout:
    """One evaluated unit whose images have these features."""
    count = len(features)
    unit = WorkUnit(
        unit_id="e",
        purpose="evaluate",
        step=0,
        index=0,
        policy_version=0,
        seed=0,
        condition_indices_P=np.arange(count),
        class_ids_P=np.zeros(count, np.int64),
        group_size=1,
        settings=SamplingSettings(),
    )
    rollout = Rollout(
        unit=unit,
        policy_version=0,
        tokens_BL=np.zeros((count, 2), np.int32),
        rollout_logprobs_BL=np.zeros((count, 2), np.float32),
        sampling_s=fields.pop("sampling_s", 1.0),
    )
    return scored(rollout, judge_features_BF=features, **fields)


def frechet_by_sqrtm(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula in float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cov_a, cov_b = np.cov(a.T, ddof=0), np.cov(b.T, ddof=0)
    gap = a.mean(axis=0) - b.mean(axis=0)
    cross = np.trace(sqrtm(cov_a @ cov_b)).real
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_judge_fid_is_the_frechet_distance_to_all_real_images() -> None:
    ours, real = draw(500, 1, shift=0.3, scale=0.8), draw(700, 2)
    units = [unit_scored(part) for part in np.split(ours, 5)]
    quality = measure_quality(units, real_of(real, 100), num_neighbors=3)
    assert quality.judge_fid == pytest.approx(frechet_by_sqrtm(ours, real), rel=1e-8)
    assert quality.judge_fid > 0.3


def test_real_images_themselves_are_perfect() -> None:
    real = draw(300, 3)
    quality = measure_quality([unit_scored(real)], real_of(real), num_neighbors=3)
    assert quality.precision == quality.recall == 1.0
    # 4 eigenvalues of order 1 in float64; their square roots lose half the digits at worst.
    assert quality.judge_fid == pytest.approx(0.0, abs=1e-7)


def test_precision_sees_images_that_are_not_real() -> None:
    real = draw(400, 4)
    ours = np.concatenate([draw(200, 5), draw(200, 6, shift=50.0)])
    quality = measure_quality([unit_scored(ours)], real_of(real), num_neighbors=3)
    assert quality.precision == pytest.approx(0.45, abs=0.06), "half of them are nowhere near"
    assert quality.recall > 0.7


def test_recall_sees_modes_that_are_missing() -> None:
    real = np.concatenate([draw(200, 7), draw(200, 8, shift=50.0)])
    ours = draw(400, 9)
    quality = measure_quality([unit_scored(ours)], real_of(real), num_neighbors=3)
    assert quality.recall == pytest.approx(0.47, abs=0.06), "one of two modes is never drawn"
    assert quality.precision > 0.7


def test_neighbourhoods_compare_equally_many_images() -> None:
    real, ours = draw(400, 10), draw(300, 11)
    quality = measure_quality([unit_scored(ours)], real_of(real, 150), num_neighbors=3)
    # Images after the 150th must not count, however far away they are.
    far = ours.copy()
    far[150:] += 100.0
    other = measure_quality([unit_scored(far)], real_of(real, 150), num_neighbors=3)
    assert (other.precision, other.recall) == (quality.precision, quality.recall)
    assert other.judge_fid > quality.judge_fid + 100


def test_more_neighbours_make_wider_neighbourhoods() -> None:
    real, ours = draw(200, 12), draw(200, 13, scale=1.3)
    narrow, wide = (
        measure_quality([unit_scored(ours)], real_of(real), num_neighbors=k) for k in (1, 8)
    )
    assert wide.precision > narrow.precision and wide.recall > narrow.recall


def test_accuracy_and_rewards_are_means_over_images_of_all_units() -> None:
    features = draw(60, 14)
    units = [
        unit_scored(
            features[:20],
            judge_hits_B=np.ones(20, bool),
            rewards={"clip": np.full(20, 0.5, np.float32)},
        ),
        unit_scored(
            features[20:],
            judge_hits_B=np.arange(40) < 10,
            rewards={"clip": np.full(40, 0.2, np.float32)},
        ),
    ]
    quality = measure_quality(units, real_of(draw(60, 15)), num_neighbors=3)
    assert quality.accuracy == 0.5
    assert quality.rewards == {"clip": pytest.approx(0.3)}
    metrics = quality.as_metrics()
    assert metrics["judge/accuracy"] == 0.5 and metrics["judge/clip"] == pytest.approx(0.3)
    assert metrics["judge/fid"] == quality.judge_fid
    assert metrics.keys() == {
        f"judge/{k}" for k in ("fid", "precision", "recall", "accuracy", "clip")
    }


def test_a_judge_without_classes_has_no_accuracy() -> None:
    quality = measure_quality([unit_scored(draw(60, 16))], real_of(draw(60, 17)), num_neighbors=3)
    assert quality.accuracy is None
    assert "judge/accuracy" not in quality.as_metrics()


def test_units_without_judge_features_are_a_programming_error() -> None:
    unit = replace(unit_scored(draw(5, 0)), judge_features_BF=None)
    with pytest.raises(AssertionError, match="evaluation units are judged"):
        measure_quality([unit], real_of(draw(60, 1)), num_neighbors=3)


def test_real_features_come_back(tmp_path) -> None:
    path = str(tmp_path / "real.npz")
    features = torch.from_numpy(draw(80, 20))
    save_real_features(
        path, feature_space="toy:4", features_RF=features, neighbors_NF=features[:30]
    )
    real = load_real_features(path)
    assert real.feature_space == "toy:4"
    assert torch.equal(real.features_RF, features)
    assert torch.equal(real.neighbors_NF, features[:30])
    torch.testing.assert_close(real.moments.mean_F, features.double().mean(dim=0))


def test_the_moments_of_spatial_features_come_back_or_are_missing(tmp_path) -> None:
    path = str(tmp_path / "real.npz")
    features = torch.from_numpy(draw(80, 20))
    moments = batch_moments(torch.from_numpy(draw(90, 21)))
    given = {"feature_space": "toy:4", "features_RF": features, "neighbors_NF": features[:30]}
    save_real_features(path, **given, spatial=moments)
    found = load_real_features(path).spatial
    assert found is not None and found.count == 90
    assert torch.equal(found.mean_F, moments.mean_F) and torch.equal(found.cov_FF, moments.cov_FF)
    save_real_features(path, **given)
    assert load_real_features(path).spatial is None


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


PARTS = {"feature_space": np.str_("toy"), "features": draw(9, 0), "neighbors": draw(3, 0)}
GOOD = npz(**PARTS)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"no archive at all",
        GOOD[: len(GOOD) // 2],
        GOOD[:-10],
        GOOD[:200] + bytes(50) + GOOD[250:],
        npy(draw(9, 0)),
        npz(features=draw(9, 0)),
        npz(feature_space=np.str_("toy"), features=draw(9, 0), neighbors=np.array([{}])),
        npz(**PARTS, spatial_mean=np.zeros(3), spatial_count=np.int64(9)),
        npz(**PARTS, spatial_mean=np.zeros(3), spatial_count=np.int64(9), spatial_cov=np.eye(2)),
    ],
    ids=[
        "empty",
        "text",
        "half",
        "cut short",
        "damaged",
        "plain array",
        "keys",
        "pickled",
        "half spatial",
        "shapes",
    ],
)
def test_files_that_hold_no_real_features_are_named(tmp_path, payload) -> None:
    path = tmp_path / "real.npz"
    path.write_bytes(payload)
    with pytest.raises(ConfigError, match=r"judge_reference = .*real\.npz is no file of real"):
        load_real_features(str(path))


def test_real_features_that_are_not_finite_are_refused(tmp_path) -> None:
    features = draw(9, 0)
    features[4, 1] = np.nan
    path = tmp_path / "real.npz"
    path.write_bytes(npz(feature_space=np.str_("toy"), features=features, neighbors=draw(3, 0)))
    with pytest.raises(RlgenError, match="sample 4"):
        load_real_features(str(path))


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(StorageError, match=r"none\.npz does not exist"):
        load_real_features(str(tmp_path / "none.npz"))
