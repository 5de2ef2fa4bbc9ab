"""Metrics on features: limits that are known, and features that must be refused."""

import pytest
import torch

from rlgen.errors import NumericsError
from rlgen.evaluation.metrics import (
    frechet_of_features,
    inception_score,
    kernel_distance,
    neighborhoods,
    vendi_score,
)


def draw(count: int, seed: int = 0, *, width: int = 6, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + shift


def test_a_set_is_no_distance_from_itself() -> None:
    features = draw(300)
    assert frechet_of_features(features, features) < 1e-10
    assert frechet_of_features(features[:4], features[:4]) < 1e-10  # by the features' product
    near = neighborhoods(features, features, num_neighbors=3)
    assert (near.precision, near.recall, near.f_score) == (1.0, 1.0, 1.0)


def test_a_shift_of_the_mean_is_its_squared_length() -> None:
    features = draw(300).double()
    # Six dimensions shifted by 2 each, with the same covariance.
    assert frechet_of_features(features + 2, features) == pytest.approx(24.0, rel=1e-9)
    assert frechet_of_features(features[:5] + 2, features[:5]) == pytest.approx(24.0, rel=1e-9)


def test_kid_is_near_zero_for_one_distribution_and_far_from_it_for_two() -> None:
    real, alike, shifted = draw(800, 0), draw(800, 1), draw(800, 2, shift=1.0)
    same = kernel_distance(alike, real, subset_size=400)
    other = kernel_distance(shifted, real, subset_size=400)
    assert abs(same.mean) < 0.02
    assert other.mean > 20 * abs(same.mean)
    assert 0 < same.std < 0.05


def test_kid_takes_small_sets_whole() -> None:
    # Subsets of 1000 don't exist: all images in another order give the same value each time.
    found = kernel_distance(draw(50, 1), draw(50, 2))
    assert found.std == pytest.approx(0.0, abs=1e-6)


def test_precision_is_what_lies_among_the_real_and_recall_the_reverse() -> None:
    real = torch.cat([draw(200, 0), draw(200, 1, shift=50.0)])
    generated = draw(200, 2)  # one of the two modes
    near = neighborhoods(generated, real, num_neighbors=3)
    assert near.precision > 0.8
    assert near.recall < 0.5


def test_the_inception_score_is_one_for_no_opinion_and_the_classes_for_sure_and_even_ones() -> None:
    assert inception_score(torch.zeros(100, 8)).mean == pytest.approx(1.0)
    sure = 100 * torch.eye(8).repeat(20, 1)  # each part of 16 has every class twice
    found = inception_score(sure, is_shuffled=False)
    assert found.mean == pytest.approx(8.0, rel=1e-6)
    assert found.std == pytest.approx(0.0, abs=1e-9)


def test_the_vendi_score_counts_the_different_images() -> None:
    assert vendi_score(torch.ones(50, 4)) == pytest.approx(1.0)
    assert vendi_score(5 * torch.eye(7)) == pytest.approx(7.0)
    assert vendi_score(torch.eye(7).repeat(30, 1)) == pytest.approx(
        7.0
    )  # more images than features
    assert vendi_score(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 5.0]])) == (
        pytest.approx(2.0)  # length does not count
    )


@pytest.mark.parametrize("metric", [frechet_of_features, kernel_distance])
def test_features_that_are_not_finite_are_refused_with_the_image(metric) -> None:
    broken = draw(20)
    broken[7, 2] = torch.nan
    with pytest.raises(NumericsError, match=r"1 of 20 images are not finite, the first is image 7"):
        metric(draw(20, 1), broken)


def test_features_of_two_spaces_are_refused() -> None:
    with pytest.raises(NumericsError, match="can't compare 6 with 5 features"):
        frechet_of_features(draw(20), draw(20, width=5))
    with pytest.raises(NumericsError, match="can't compare 6 with 5 features"):
        neighborhoods(draw(20), draw(20, width=5), num_neighbors=3)


def test_too_few_images_are_refused() -> None:
    with pytest.raises(NumericsError, match=r"at least 4 images, got \[3, 6\]"):
        neighborhoods(draw(3), draw(20), num_neighbors=3)
    with pytest.raises(NumericsError, match="at least 10 images"):
        inception_score(draw(9))


def test_an_image_without_a_direction_has_no_vendi_score() -> None:
    features = draw(5)
    features[3] = 0
    with pytest.raises(
        NumericsError, match="1 of 5 feature vectors are zero, the first is image 3"
    ):
        vendi_score(features)
