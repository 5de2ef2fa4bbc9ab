"""From scored units to what the store and the learner take.

Shapes: B images of the step in the order of its units, L image tokens, F features.
"""

from collections.abc import Sequence

import numpy as np

from rlgen.types import LearnerBatch, ScoredRollout, StepRewards


def pooled(scored: Sequence[ScoredRollout]) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """Rewards by name and features of all units, in their order."""
    rewards = {
        name: np.concatenate([item.rewards[name] for item in scored]) for name in scored[0].rewards
    }
    features = [item.features_BF for item in scored if item.features_BF is not None]
    return rewards, np.concatenate(features) if features else None


def learner_batch(step: int, scored: Sequence[ScoredRollout], rewards: StepRewards) -> LearnerBatch:
    """The whole step for the learner group; ranks take contiguous shares of it."""
    rollouts = [item.rollout for item in scored]
    return LearnerBatch(
        step=step,
        policy_version=min(rollout.policy_version for rollout in rollouts),
        class_ids_B=np.concatenate(
            [np.repeat(r.unit.class_ids_P, r.unit.group_size) for r in rollouts]
        ),
        tokens_BL=np.concatenate([r.tokens_BL for r in rollouts]),
        rollout_logprobs_BL=np.concatenate([r.rollout_logprobs_BL for r in rollouts]),
        advantages_B=rewards.advantages_B,
        num_images_total=len(rewards.advantages_B),
    )


def split_batch(batch: LearnerBatch, *, rank: int, world_size: int) -> LearnerBatch:
    """One rank's contiguous share of a step's groups."""
    size = len(batch.class_ids_B) // world_size
    part = slice(rank * size, (rank + 1) * size)
    return LearnerBatch(
        step=batch.step,
        policy_version=batch.policy_version,
        class_ids_B=batch.class_ids_B[part],
        tokens_BL=batch.tokens_BL[part],
        rollout_logprobs_BL=batch.rollout_logprobs_BL[part],
        advantages_B=batch.advantages_B[part],
        num_images_total=batch.num_images_total,
    )
