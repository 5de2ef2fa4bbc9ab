"""From the sum of all shards to the file that a run reads.

Owns what goes into a reference of the distribution reward, and into the judge's. Must not know
how images were read.

Shapes: R images, N neighbours, F features.
"""

from pathlib import Path

import torch

from rlgen.evaluation.judge import save_real_features
from rlgen.evaluation.partial import Partial
from rlgen.evaluation.pixels import describe_preprocessing
from rlgen.moments.classes import ClassMeans, sort_class_names
from rlgen.moments.reference import ReferenceMoments

NEIGHBOR_SEED = 0


def to_reference(whole: Partial, feature_space: str, *, image_size: int) -> ReferenceMoments:
    """Moments with their origin, and class means if every image has one of several classes.

    Args:
        whole: the sum of all shards, of at least one image.
        feature_space: id of the extractor.
        image_size: side of the squares that the extractor saw, in pixels.
    """
    assert whole.moments is not None, "at least one image counts"
    classes = None
    if len(whole.class_sums) > 1 and whole.num_unlabelled == 0:
        names = sort_class_names(list(whole.class_sums))
        counts = tuple(whole.class_sums[name][0] for name in names)
        means = [whole.class_sums[name][1] / whole.class_sums[name][0] for name in names]
        classes = ClassMeans(tuple(names), counts, torch.stack(means))
    return ReferenceMoments(
        feature_space,
        whole.num_images,
        whole.moments.mean_F,
        whole.moments.cov_FF,
        describe_preprocessing(image_size),
        images_sha256=f"{whole.digest:064x}",
        classes=classes,
    )


def save_judge_features(
    path: Path, whole: Partial, feature_space: str, *, num_neighbors: int
) -> None:
    """Write all features, a random part of them that precision and recall compare with, and the
    moments of the spatial features where there are any."""
    features_RF = torch.cat(whole.features)
    generator = torch.Generator().manual_seed(NEIGHBOR_SEED)
    chosen_N = torch.randperm(len(features_RF), generator=generator)[:num_neighbors]
    save_real_features(
        str(path),
        feature_space=feature_space,
        features_RF=features_RF,
        neighbors_NF=features_RF[chosen_N],
        spatial=whole.spatial,
    )
