"""The gate before the first update: the policy that is trained must be the one that sampled.

Owns the comparison and its message. It compares equal versions only: a sampler that is behind the
learner has other log-probs by right.
"""

from collections.abc import Mapping

from rlgen.config.run import RunConfig
from rlgen.errors import NumericsError

_LARGEST_MEAN_GAP = 0.1
"""In bfloat16: nats a token, far above rounding and far below another distribution."""


def check_ratio(metrics: Mapping[str, float], config: RunConfig) -> None:
    """Compare the learner's log-probs with the sampler's at the same version.

    Args:
        metrics: of the first pass, over all ranks, so that every rank decides alike.
        config: the run.
    Raises:
        NumericsError: they differ by more than rounding.
    """
    if config.is_exact:
        deviation = metrics["policy/ratio_max_deviation"]
        clipped = metrics["policy/ratio_clipped_frac"]
        tolerance = config.grpo.ratio_tolerance
        is_equal = deviation < tolerance and clipped == 0.0
        found = (
            f"|ratio - 1| reaches {deviation:.3g} (allowed: {tolerance:g}) and "
            f"{clipped:.3g} of the ratios are clipped"
        )
    else:
        gap = metrics["policy/logprob_gap_mean"]
        is_equal = gap < _LARGEST_MEAN_GAP
        found = (
            f"they differ by {gap:.3g} nats a token (allowed in bfloat16: {_LARGEST_MEAN_GAP:g})"
        )
    if not is_equal:
        raise NumericsError(
            f"before the first update the policy's log-probs must equal the sampler's, but "
            f"{found}. The learner scores another distribution than was sampled: compare the "
            "weights' digests on both sides, the dtype, and that cfg_scale, temperature, top_k "
            "and top_p are the same for both; dropout must be off."
        )
