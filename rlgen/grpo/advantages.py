"""From rewards to advantages: pure functions on tensors.

Owns centring, scaling, clipping and the weighted sum. The only state is the running scale of
each reward, which goes in and comes out.

Shapes: P conditions, G group, B = P*G images (condition-major).
Source: GRPO, arXiv:2402.03300, section 4.1; per-reward normalisation, arXiv:2603.23086.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlgen.config.reward import AdvantageConfig
from rlgen.errors import NumericsError

Scale = Literal["group_std", "batch_std", "running", "none"]


@dataclass(frozen=True)
class RunningScale:
    """Mean of a reward's batch standard deviation over the first steps, then frozen."""

    mean: float = 0.0
    num_steps: int = 0

    def updated(self, std: float, *, max_steps: int) -> "RunningScale":
        """Average in one more step, unless the scale is already frozen."""
        if self.num_steps >= max_steps:
            return self
        total = self.mean * self.num_steps + std
        return RunningScale(total / (self.num_steps + 1), self.num_steps + 1)


@dataclass(frozen=True)
class WeightedReward:
    """One reward of a step, with how it enters the advantage."""

    values_B: Tensor
    """float64 [B], finite."""
    weight: float
    scale: Scale
    center: Literal["batch", "group"]


def normalize_rewards(
    rewards_PG: Tensor,
    *,
    center: Literal["batch", "group"],
    scale: Scale,
    running_scale: float,
    epsilon: float,
    clip: float,
) -> Tensor:
    """Centre, divide and clip one reward.

    Args:
        rewards_PG: [P, G] float64, finite, any scale.
        center: subtract the mean of the batch or of each group.
        scale: what to divide by; standard deviations have ddof 0.
        running_scale: the divisor for "running".
        epsilon: added to every divisor but for "none".
        clip: largest absolute result.
    Returns:
        [P, G] float64; a constant row (a constant batch, if centred there) gives exact zeros.
    """
    centered = _centered(rewards_PG, center)
    if scale == "none":
        return centered.clamp(-clip, clip)
    if scale == "group_std":
        divisor = rewards_PG.std(dim=1, correction=0, keepdim=True)
    elif scale == "batch_std":
        divisor = centered.std(correction=0)
    else:
        divisor = torch.as_tensor(running_scale, dtype=rewards_PG.dtype)
    return (centered / (divisor + epsilon)).clamp(-clip, clip)


def combine_advantages(
    rewards: Mapping[str, WeightedReward],
    running: Mapping[str, RunningScale],
    *,
    group_size: int,
    config: AdvantageConfig,
) -> tuple[Tensor, dict[str, RunningScale], dict[str, float]]:
    """Advantages of a step from all its rewards.

    Args:
        rewards: by name.
        running: running scales so far; missing ones start empty.
        group_size: G.
        config: how to combine, clip and average.
    Returns:
        advantages [B] float32, the new running scales, and metrics.
    Raises:
        NumericsError: a reward is not finite; names the reward, the condition and the sample.
    """
    for name, reward in rewards.items():
        _check_finite(name, reward.values_B, group_size)
    if config.combine == "sum_then_normalize":
        total = torch.stack([r.weight * r.values_B for r in rewards.values()]).sum(dim=0)
        rewards = {"sum": WeightedReward(total, 1.0, config.instance_scale, "group")}
    advantages: list[Tensor] = []
    scales: dict[str, RunningScale] = {}
    metrics: dict[str, float] = {}
    for name, reward in rewards.items():
        rewards_PG = reward.values_B.double().view(-1, group_size)
        std = _centered(rewards_PG, reward.center).std(correction=0).item()
        before = running.get(name, RunningScale())
        scales[name] = before.updated(std, max_steps=config.running_steps)
        normalized = normalize_rewards(
            rewards_PG,
            center=reward.center,
            scale=reward.scale,
            running_scale=scales[name].mean,
            epsilon=config.epsilon,
            clip=config.clip,
        )
        advantages.append(reward.weight * normalized)
        zero_groups = (rewards_PG.amax(dim=1) == rewards_PG.amin(dim=1)).double().mean().item()
        metrics[f"advantage/{name}_std"] = normalized.std(correction=0).item()
        metrics[f"advantage/{name}_scale"] = scales[name].mean
        metrics[f"advantage/{name}_constant_groups_frac"] = zero_groups
    total = torch.stack(advantages).sum(dim=0).flatten()
    return total.float(), scales, metrics


def _centered(rewards_PG: Tensor, center: Literal["batch", "group"]) -> Tensor:
    dims = (0, 1) if center == "batch" else (1,)
    mean = rewards_PG.mean(dim=dims, keepdim=True)
    # A constant row can leave rounding in its mean, which a tiny divisor would blow up.
    is_constant = rewards_PG.amin(dim=dims, keepdim=True) == rewards_PG.amax(dim=dims, keepdim=True)
    return torch.where(is_constant, 0.0, rewards_PG - mean)


def _check_finite(name: str, values_B: Tensor, group_size: int) -> None:
    bad = (~values_B.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            f"reward {name} is {values_B[bad[0]].item()} for condition {bad[0] // group_size}, "
            f"sample {bad[0] % group_size} ({len(bad)} of {len(values_B)} are not finite); check "
            "this reward's scorer, nothing was learned from the step."
        )
