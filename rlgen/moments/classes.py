"""Class means of a reference, and what a distribution reward that knows classes needs of them.

Owns the order of classes and the reference of class-centred features. With f' = f - mu_y, y the
class that an image was asked for and mu_y the reference's mean of it, the reference becomes
N(0, Sigma_within): the law of total covariance takes the scatter of the class means out of Sigma.
A policy whose classes are right on average but exchanged, or shifted against each other, shows as
extra covariance. All classes share one state, so the EMA needs no more samples than without them,
and every formula of the leave-one-out reward stays exact.

Shapes: K classes, F feature dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlgen.errors import ConfigError

MEAN_TOLERANCE = 1e-6
"""Of the weighted class means against the mean, relative to the largest standard deviation."""


@dataclass(frozen=True, eq=False)
class ClassMeans:
    """Means of the reference's classes; every image of the reference belongs to one."""

    names: tuple[str, ...]
    """Distinct; see sort_class_names for the order."""
    counts: tuple[int, ...]
    """Images of each class, >= 1."""
    means_KF: Tensor
    """[K, F] float64, CPU."""

    @property
    def shares_K(self) -> Tensor:
        """[K] float64: share of each class among the images."""
        counts_K = torch.tensor(self.counts, dtype=torch.float64)
        return counts_K / counts_K.sum()

    def scatter(self, mean_F: Tensor) -> Tensor:
        """Covariance of the class means around the mean of all images: [F, F]."""
        gaps_KF = (self.means_KF - mean_F) * self.shares_K.sqrt()[:, None]
        return gaps_KF.T @ gaps_KF

    def in_order_of(self, class_names: Sequence[str], *, path: str) -> Tensor:
        """Class means in the order of a run's classes.

        By name if the reference knows all the names. If it knows none of them, it must have as
        many classes, and their order is taken for that of the class ids: ImageNet's synsets
        sorted, or labels 0, 1, 2 and so on.

        Args:
            class_names: the run's classes, in the order of their ids.
            path: where the reference came from, for the message.
        Returns:
            [len(class_names), F] float64.
        Raises:
            ConfigError: neither holds; names both sides.
        """
        places = {name: place for place, name in enumerate(self.names)}
        known = [name for name in class_names if name in places]
        if len(known) == len(class_names):
            return self.means_KF[[places[name] for name in class_names]]
        if not known and len(class_names) == len(self.names):
            return self.means_KF
        raise ConfigError(
            f"reference moments {path} have means of {len(self.names)} classes "
            f"({', '.join(self.names[:3])}, ...), and class_names has {len(class_names)} "
            f"({', '.join(class_names[:3])}, ...), {len(known)} of them by the same name; name the "
            "reference's folders like class_names, or set reward.loo_fid.class_conditional=false."
        )


def class_means(features_NF: Tensor, labels_N: Tensor, names: Sequence[str]) -> ClassMeans:
    """Compute the means of labelled features in float64.

    Args:
        features_NF: [N, F] of any float type.
        labels_N: [N] int64 class ids, each of which occurs.
        names: the classes in the order of their ids.
    """
    rows = [features_NF[labels_N == label].double().cpu() for label in range(len(names))]
    means_KF = torch.stack([row.mean(dim=0) for row in rows])
    return ClassMeans(tuple(names), tuple(len(row) for row in rows), means_KF)


def sort_class_names(names: Sequence[str]) -> list[str]:
    """Numbers by value, everything else as text."""
    if all(name.isdecimal() for name in names):
        return sorted(names, key=int)
    return sorted(names)


def check_class_means(classes: ClassMeans, mean_F: Tensor, cov_FF: Tensor, count: int) -> str:
    """What is wrong with class means beside the moments of all images; empty if nothing is."""
    num, width = len(classes.names), mean_F.numel()
    if classes.means_KF.shape != (num, width) or len(classes.counts) != num or num == 0:
        return (
            f"{num} class names, {len(classes.counts)} counts and means of shape "
            f"{list(classes.means_KF.shape)}; expected one of each and [classes, {width}]"
        )
    if len(set(classes.names)) != num or min(classes.counts) < 1 or sum(classes.counts) != count:
        return (
            f"{len(set(classes.names))} different names of {num} classes with "
            f"{sum(classes.counts)} images, at least {min(classes.counts)} each; expected "
            f"different names and {count} images"
        )
    spread = float(cov_FF.diagonal().clamp(min=0).max().sqrt()) + float(mean_F.abs().max())
    gap = float((classes.shares_K @ classes.means_KF - mean_F).abs().max())
    if not gap <= MEAN_TOLERANCE * spread:  # also true of values that are not finite
        return f"the weighted class means differ from the mean by {gap:.3g}"
    return ""
