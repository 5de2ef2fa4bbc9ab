"""The adaptive entropy bonus: a controller without memory but for a running mean.

Owns the schedule and the feedback law. A proportional law on the running mean cannot wind up,
as one that multiplies its coefficient at every step can.
Source: arXiv:2603.23086, adaptive entropy.
"""

import math
from dataclasses import dataclass

from rlgen.config.learning import EntropyConfig


@dataclass(frozen=True)
class EntropyController:
    """Running mean of normalised entropy; None before the first measurement."""

    mean_entropy: float | None = None

    def observed(self, normalized_entropy: float, *, smoothing: float) -> "EntropyController":
        """Take in one step's measured H / ln V."""
        if self.mean_entropy is None:
            return EntropyController(normalized_entropy)
        mean = smoothing * self.mean_entropy + (1.0 - smoothing) * normalized_entropy
        return EntropyController(mean)

    def coefficient(self, config: EntropyConfig, *, step: int, num_steps: int) -> float:
        """Weight of the entropy bonus at a step.

        Within the dead band it is base_coef; outside, base_coef * exp(gain * (target - mean)),
        limited to [min_coef, max_coef]; all times warm-up and decay.

        Args:
            config: target, gains and limits; base_coef 0 switches the bonus off.
            step: 0-based step.
            num_steps: length of the run.
        """
        if config.base_coef == 0.0:
            return 0.0
        mean = config.target if self.mean_entropy is None else self.mean_entropy
        error = config.target - mean
        feedback = math.exp(config.gain * error) if abs(error) > config.dead_band else 1.0
        limited = min(max(config.base_coef * feedback, config.min_coef), config.max_coef)
        return limited * schedule(config, step=step, num_steps=num_steps)


def schedule(config: EntropyConfig, *, step: int, num_steps: int) -> float:
    """Linear warm-up to 1, then a half cosine to 0 from decay_start_fraction on."""
    progress = (step + 1) / num_steps
    if progress < config.warmup_fraction:
        return progress / config.warmup_fraction
    if progress <= config.decay_start_fraction or config.decay_start_fraction >= 1.0:
        return 1.0
    past = (progress - config.decay_start_fraction) / (1.0 - config.decay_start_fraction)
    return 0.5 * (1.0 + math.cos(math.pi * past))
