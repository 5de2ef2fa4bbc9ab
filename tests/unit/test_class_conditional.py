"""The distribution reward that knows classes: features centred by the reference's class means.

Shapes: B images, F features.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlgen.config import RunConfig
from rlgen.errors import ConfigError
from rlgen.features.outputs import ExtractorOutputs
from rlgen.moments.classes import class_means
from rlgen.moments.moments import batch_moments
from rlgen.moments.reference import ReferenceMoments, load_reference, save_reference
from rlgen.rewards.engine import RewardEngine
from rlgen.rewards.moment_store import MomentStore
from rlgen.rewards.reference import load_class_means
from rlgen.sampling.units import independent_units, training_settings, training_units
from rlgen.types import Rollout
from tests.tiny import CLASS_NAMES, CPU, tiny_config

NUM_FEATURES = 3
CENTRES = np.array([[0, 0, 4], [4, 0, 0], [0, 4, 0], [-4, 0, 0]], dtype=np.float64)


def draw(class_ids: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=(len(class_ids), NUM_FEATURES))
    return (CENTRES[class_ids] + noise).astype(np.float32)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Classes in another order than the run's, as a sorted listing gives them."""
    ids = np.arange(4000) % 4
    features = torch.from_numpy(draw(ids, 0))
    moments = batch_moments(features)
    backwards = class_means(features, torch.from_numpy(3 - ids), CLASS_NAMES[::-1])
    reference = ReferenceMoments("toy", 4000, moments.mean_F, moments.cov_FF, classes=backwards)
    save_reference(tmp_path / "r.npz", reference)
    return tiny_config(
        reward__loo_fid__reference=str(tmp_path / "r.npz"),
        reward__loo_fid__class_conditional=True,
        reward__loo_fid__bootstrap_images=40,
        reward__scorers={"clip": None, "preference": None},
    )


class Painter:
    """Decodes a token into a flat image, and calls an image's colour its features."""

    feature_space, num_features = "toy", NUM_FEATURES

    def decode(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return (tokens_BL.float() / 100)[:, :, None, None].expand(-1, -1, 4, 4)

    def __call__(self, images_01: torch.Tensor) -> torch.Tensor:
        return images_01.mean(dim=(2, 3))

    def outputs(self, images_01: torch.Tensor) -> ExtractorOutputs:
        return ExtractorOutputs(self(images_01))


def rollout(unit: Any) -> Rollout:
    tokens = np.random.default_rng(0).integers(0, 100, (unit.num_images, 3)).astype(np.int32)
    return Rollout(unit, 0, tokens, np.zeros_like(tokens, np.float32), 0.0)


def test_rewarded_features_are_centred_by_class_and_an_evaluations_are_not(
    config: RunConfig,
) -> None:
    means_KF = load_class_means(config)
    assert means_KF is not None and abs(means_KF - CENTRES).max() < 0.2
    painter: Any = Painter()
    engine = RewardEngine(painter, (), CLASS_NAMES, painter, painter, CPU, means_KF)
    (unit, _) = training_units(config, 0, policy_version=0)
    sampled = rollout(unit)
    plain = sampled.tokens_BL / 100
    ids = np.repeat(unit.class_ids_P, unit.group_size)
    found = engine.score(sampled).features_BF
    assert found is not None and found.dtype == np.float32
    np.testing.assert_allclose(found, plain - means_KF[ids], rtol=0, atol=1e-6)
    settings = training_settings(config)
    for purpose, centred in (("bootstrap", True), ("evaluate", False)):
        (unit, *_) = independent_units(
            config, purpose, num_images=8, seed=0, policy_version=0, settings=settings
        )
        scored = engine.score(rollout(unit))
        if centred:
            assert scored.features_BF is not None
            expected = rollout(unit).tokens_BL / 100 - means_KF[unit.class_ids_P]
            np.testing.assert_allclose(scored.features_BF, expected, rtol=0, atol=1e-6)
        else:
            np.testing.assert_allclose(
                scored.judge_features_BF, rollout(unit).tokens_BL / 100, rtol=0, atol=1e-6
            )


def test_an_image_of_the_wrong_class_is_punished_only_if_classes_are_known(
    config: RunConfig,
) -> None:
    asked = np.arange(12) % 4
    shown = asked.copy()
    shown[5], shown[6] = asked[6], asked[5]  # exchanged: the mixture stays the same
    features = draw(shown, 1)
    means_KF = load_class_means(config)
    assert means_KF is not None
    wrong = [5, 6]
    right = [place for place in range(12) if place not in wrong]
    knowing, blind = (
        MomentStore(config),
        MomentStore(config.with_values({"reward.loo_fid.class_conditional": False})),
    )
    history_ids = np.arange(400) % 4
    knowing.bootstrap((draw(history_ids, 2) - means_KF[history_ids]).astype(np.float32))
    blind.bootstrap(draw(history_ids, 2))
    centred = (features - means_KF[asked]).astype(np.float32)
    known = knowing.commit(0, {}, centred).rewards["loo_fid"]
    unknown = blind.commit(0, {}, features).rewards["loo_fid"]
    assert max(known[wrong]) < min(known[right]), "the two stand out"
    assert not max(unknown[wrong]) < min(unknown[right])


def test_a_reference_without_the_runs_classes_is_refused(config: RunConfig, tmp_path: Path) -> None:
    others = config.with_values({"class_names": ("ant", "bee", "cat", "emu")})
    with pytest.raises(ConfigError, match="3 of them by the same name"):
        load_class_means(others)
    reference = load_reference(tmp_path / "r.npz")
    plain = ReferenceMoments("toy", 4000, reference.mean_F, reference.cov_FF)
    save_reference(tmp_path / "r.npz", plain)
    with pytest.raises(ConfigError, match="hold no class means"):
        MomentStore(config)
