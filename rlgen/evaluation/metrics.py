"""Metrics of two sets of images, or of one, from features that are there already.

What torch-fidelity measures comes from torch-fidelity, with its seeds; the Frechet distance and
the Vendi score are rlgen's own. Owns no feature network. Must not know who made the images.

Shapes: N generated images, R real images, F features, C classes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from rlgen.errors import NumericsError
from rlgen.moments.frechet import frechet_distance
from rlgen.moments.moments import batch_moments

KERNEL_SUBSETS = 100
KERNEL_SUBSET_SIZE = 1000
SCORE_SPLITS = 10
SEED = 2020
"""Of torch-fidelity's subsets and permutations."""
_PAIRS_AT_ONCE = 10_000
"""Rows and columns of one block of distances."""


class Spread(NamedTuple):
    """A metric over subsets of the images."""

    mean: float
    std: float


class Neighborhoods(NamedTuple):
    """Shares of images that lie within the other side's neighbourhoods."""

    precision: float
    recall: float
    f_score: float


def frechet_of_features(generated_NF: Tensor, real_RF: Tensor) -> float:
    """Frechet distance of two sets of features with covariances of divisor count - 1, as FID.

    With fewer images than features on both sides it is taken from the product of the centred
    features instead of covariances: tr sqrt(S_n S_r) is the sum of the singular values of X Y^T,
    over the roots of the divisors. That is N x R instead of F x F, and exact for singular S.

    Args:
        generated_NF: any float type, N >= 2.
        real_RF: the same F, R >= 2.
    Returns:
        squared feature units, >= 0.
    Raises:
        NumericsError: a feature is not finite, too few images, or other dimensions.
    Source: FID, arXiv:1706.08500.
    """
    _check_pair(generated_NF, real_RF, at_least=2)
    if max(len(generated_NF), len(real_RF)) > generated_NF.shape[1]:
        return frechet_distance(batch_moments(generated_NF), batch_moments(real_RF), unbiased=True)
    x_NF, x_mean_F = _centred(generated_NF)
    y_RF, y_mean_F = _centred(real_RF)
    cross = torch.linalg.svdvals(x_NF @ y_RF.T).sum()
    gap_F = x_mean_F - y_mean_F
    distance = gap_F @ gap_F + x_NF.square().sum() + y_RF.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def kernel_distance(
    generated_NF: Tensor,
    real_RF: Tensor,
    *,
    num_subsets: int = KERNEL_SUBSETS,
    subset_size: int = KERNEL_SUBSET_SIZE,
    seed: int = SEED,
) -> Spread:
    """KID: squared maximum mean discrepancy under the kernel (x.y/F + 1)^3, unbiased.

    Args:
        generated_NF: float32 or float64.
        real_RF: the same F and type.
        subset_size: images of each subset; sets with fewer are taken whole.
    Returns:
        mean and standard deviation over the subsets; the mean may be just below 0.
    Raises:
        NumericsError: a feature is not finite, too few images, or other dimensions.
    Source: arXiv:1801.01401, by torch-fidelity.
    """
    _check_pair(generated_NF, real_RF, at_least=2)
    found = kid_features_to_metric(
        generated_NF,
        real_RF,
        kid_subsets=num_subsets,
        kid_subset_size=min(subset_size, len(generated_NF), len(real_RF)),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    return Spread(found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"])


def inception_score(
    logits_NC: Tensor, *, num_splits: int = SCORE_SPLITS, is_shuffled: bool = True, seed: int = SEED
) -> Spread:
    """exp of the mean KL between each image's classes and all images' classes.

    Comparable with published numbers only for the Inception network's logits without their bias.

    Args:
        logits_NC: float; N >= num_splits.
        num_splits: parts that the images are cut into; the mean and std are over these.
        is_shuffled: permute the images first, as their order may follow the classes.
    Raises:
        NumericsError: a logit is not finite, or too few images.
    Source: arXiv:1606.03498, by torch-fidelity.
    """
    _check_rows(logits_NC, at_least=num_splits)
    found = isc_features_to_metric(logits_NC, num_splits, is_shuffled, seed)
    return Spread(found["inception_score_mean"], found["inception_score_std"])


def neighborhoods(generated_NF: Tensor, real_RF: Tensor, *, num_neighbors: int) -> Neighborhoods:
    """Improved precision and recall: a ball to the k-th neighbour around each image of a side.

    Args:
        generated_NF: float; both sides should have about as many images, as the balls shrink with
            their number.
        real_RF: the same F and type.
        num_neighbors: k, without the image itself; both sides need more images than that.
    Raises:
        NumericsError: a feature is not finite, too few images, or other dimensions.
    Source: arXiv:1904.06991, by torch-fidelity.
    """
    _check_pair(generated_NF, real_RF, at_least=num_neighbors + 1)
    found = prc_features_to_metric(
        generated_NF,
        real_RF,
        prc_neighborhood=num_neighbors,
        prc_batch_size=_PAIRS_AT_ONCE,
        # By parts, all distances of one side never lie in memory together.
        save_cpu_ram=max(len(generated_NF), len(real_RF)) > _PAIRS_AT_ONCE,
        verbose=False,
    )
    return Neighborhoods(found["precision"], found["recall"], found["f_score"])


def vendi_score(features_NF: Tensor) -> float:
    """Effective number of different images: exp of the entropy of the similarities' eigenvalues.

    The similarity is the cosine. The eigenvalues of K/N = X X^T/N, with rows of length 1, are those
    of X^T X/N and zeros, so the smaller of the two matrices is decomposed.

    Args:
        features_NF: float; N >= 1.
    Returns:
        from 1 (all images alike) to min(N, F).
    Raises:
        NumericsError: a feature is not finite, or a row is all zeros and has no direction.
    Source: arXiv:2210.02410.
    """
    _check_rows(features_NF, at_least=1)
    x_NF = features_NF.to(torch.float64)
    lengths_N = torch.linalg.vector_norm(x_NF, dim=1)
    if not lengths_N.all():
        first = int((lengths_N == 0).nonzero()[0])
        raise NumericsError(
            f"{int((lengths_N == 0).sum())} of {len(x_NF)} feature vectors are zero, the first is "
            f"image {first}; the Vendi score needs a direction: use other features."
        )
    x_NF = x_NF / lengths_N[:, None]
    similarities = x_NF @ x_NF.T if len(x_NF) <= x_NF.shape[1] else x_NF.T @ x_NF
    shares = (torch.linalg.eigvalsh(similarities) / len(x_NF)).clamp(min=0)
    return float(torch.special.entr(shares).sum().exp())


def _centred(features_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows over the root of the divisor count - 1, so that X^T X is the covariance."""
    features_BF = features_BF.to(torch.float64)
    mean_F = features_BF.mean(dim=0)
    return (features_BF - mean_F) / (len(features_BF) - 1) ** 0.5, mean_F


def _check_pair(generated_NF: Tensor, real_RF: Tensor, *, at_least: int) -> None:
    _check_rows(generated_NF, at_least=at_least)
    _check_rows(real_RF, at_least=at_least)
    if generated_NF.shape[1] != real_RF.shape[1]:
        raise NumericsError(
            f"can't compare {generated_NF.shape[1]} with {real_RF.shape[1]} features; use features "
            "of one feature space."
        )


def _check_rows(rows_NF: Tensor, *, at_least: int) -> None:
    if rows_NF.ndim != 2 or len(rows_NF) < at_least:
        raise NumericsError(
            f"expected features [N, F] of at least {at_least} images, got {list(rows_NF.shape)}."
        )
    finite_N = torch.isfinite(rows_NF).all(dim=1)
    if not finite_N.all():
        raise NumericsError(
            f"features of {int((~finite_N).sum())} of {len(rows_NF)} images are not finite, the "
            f"first is image {int((~finite_N).nonzero()[0])}."
        )
