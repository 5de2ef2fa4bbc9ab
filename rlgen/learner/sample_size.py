"""Whether the distribution reward's moving average holds enough samples for its dimension.

Owns the sentence that says so. Must not know files or tensors.
"""

import math

from rlgen.config.run import RunConfig


def few_samples(config: RunConfig, *, num_features: int, reference_count: int) -> str:
    """What to say if the EMA is worth too few samples for its dimension; empty if it is not.

    With fewer than F samples a covariance is singular, and an image is rewarded for filling
    directions that nobody has seen; rewards repeat well from about 2 F.

    Args:
        config: the run.
        num_features: F.
        reference_count: images behind the reference, which may be what the EMA starts from.
    """
    loo_fid = config.reward.loo_fid
    if loo_fid is None or loo_fid.covariance == "diagonal":
        return ""
    per_step = config.images_per_step
    later = loo_fid.effective_samples(per_step)
    first = loo_fid.bootstrap_images if loo_fid.start == "policy" else reference_count
    wanted = 2 * num_features
    causes = []
    if first < wanted:
        causes.append(
            f"it starts from {first} images (raise reward.loo_fid.bootstrap_images)"
            if loo_fid.start == "policy"
            else f"it starts from a reference of {first} images (make that from more)"
        )
    if later < wanted:
        enough = math.ceil(1000 * (wanted - per_step) / (wanted + per_step)) / 1000
        causes.append(
            f"{per_step} images a step with reward.loo_fid.decay = {loo_fid.decay:g} are worth "
            f"{later:.0f} (sample more images, or use a decay of at least {enough:g})"
        )
    if not causes:
        return ""
    return (
        f"the EMA of reward.loo_fid holds as few as {min(first, later):.0f} effective samples for "
        f"{num_features} feature dimensions, and full-covariance rewards are reliable from "
        f"{wanted}: {'; '.join(causes)}. The metric moments/n_eff tells how it goes; "
        "reward.loo_fid.covariance = diagonal needs fewer."
    )
