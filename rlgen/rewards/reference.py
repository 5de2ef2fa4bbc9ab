"""The reference of a run's distribution reward, as its configuration wants it.

Owns reading it from a path or URL, and what "class_conditional" makes of it: features less the
reference's mean of the class that was asked for, against a reference of mean 0 (moments/classes.py
has the mathematics). Must not know the EMA.

Shapes: K classes of the run, F features.
"""

import numpy as np

from rlgen.config.distribution import LooFidConfig
from rlgen.config.run import RunConfig
from rlgen.moments.reference import ReferenceMoments, load_reference
from rlgen.storage import local_copy


def read_reference(location: str) -> ReferenceMoments:
    """Read reference moments from a path or URL.

    Raises:
        StorageError: it can't be read.
        ConfigError: it is no such file.
    """
    with local_copy(location) as path:
        return load_reference(path)


def rewarded_reference(config: LooFidConfig) -> ReferenceMoments:
    """What the rewarded features are compared with.

    Raises:
        StorageError, ConfigError: as read_reference; or class means are wanted and not there.
    """
    reference = read_reference(config.reference)
    return reference.within_classes() if config.class_conditional else reference


def load_class_means(config: RunConfig) -> np.ndarray | None:
    """What is taken from a feature vector before it is rewarded, by class id.

    Returns:
        float64 [K, F]; None if the reward knows no classes.
    Raises:
        StorageError, ConfigError: as rewarded_reference; or other classes than the run's.
    """
    loo_fid = config.reward.loo_fid
    if loo_fid is None or not loo_fid.class_conditional:
        return None
    classes = read_reference(loo_fid.reference).known_classes()
    path = f"reward.loo_fid.reference = {loo_fid.reference}"
    return classes.in_order_of(config.class_names, path=path).numpy()
