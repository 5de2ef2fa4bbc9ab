"""From a step to its work units: conditions, shapes and noise keys.

Owns the condition schedule. It is a pure function of (seed, step), so that the condition cursor
is the step itself, and neither workers nor restarts can change it.

Shapes: P conditions of a unit.
"""

import numpy as np

from rlgen.config.run import RunConfig
from rlgen.types import Purpose, SamplingSettings, WorkUnit


def class_schedule(*, seed: int, step: int, num_conditions: int, num_classes: int) -> np.ndarray:
    """Class ids of a step: every class equally often, as far as it divides, in random order.

    Args:
        seed: run seed.
        step: training step.
        num_conditions: conditions of the step.
        num_classes: classes to choose from.
    Returns:
        int64 [num_conditions].
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, step]))
    rounds = -(-num_conditions // num_classes)
    permutations = [generator.permutation(num_classes) for _ in range(rounds)]
    return np.concatenate(permutations)[:num_conditions].astype(np.int64)


def training_settings(config: RunConfig) -> SamplingSettings:
    """The distribution that rollouts are drawn from and the learner scores."""
    rollout = config.rollout
    return SamplingSettings(
        cfg_scale=rollout.cfg_scale,
        cfg_interval=rollout.cfg_interval,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )


def training_units(config: RunConfig, step: int, *, policy_version: int) -> list[WorkUnit]:
    """The units of a training step."""
    rollout = config.rollout
    class_ids = class_schedule(
        seed=config.seed,
        step=step,
        num_conditions=rollout.conditions_per_step,
        num_classes=len(config.class_names),
    )
    return [
        WorkUnit(
            unit_id=f"train-{step}-{index}",
            purpose="train",
            step=step,
            index=index,
            policy_version=policy_version,
            seed=config.seed,
            condition_indices_P=np.arange(first, first + rollout.conditions_per_unit),
            class_ids_P=class_ids[first : first + rollout.conditions_per_unit],
            group_size=rollout.group_size,
            settings=training_settings(config),
        )
        for index, first in enumerate(
            range(0, rollout.conditions_per_step, rollout.conditions_per_unit)
        )
    ]


def independent_units(
    config: RunConfig,
    purpose: Purpose,
    *,
    num_images: int,
    seed: int,
    policy_version: int,
    settings: SamplingSettings,
    kept_classes: int = 0,
    kept_per_class: int = 0,
) -> list[WorkUnit]:
    """Units of single images, classes in turn: for evaluations and the bootstrap.

    Image i always has class i modulo the number of classes and noise key i, so that runs and
    guidance scales are compared on the same noise. Of the first classes the first images are kept
    as thumbnails.
    """
    per_unit = config.evaluation.images_per_unit
    indices = np.arange(num_images)
    rounds, class_ids = np.divmod(indices, len(config.class_names))
    is_kept = (rounds < kept_per_class) & (class_ids < kept_classes)
    return [
        WorkUnit(
            unit_id=f"{purpose}-v{policy_version}-s{settings.cfg_scale:g}-{index}",
            purpose=purpose,
            step=0,
            index=index,
            policy_version=policy_version,
            seed=seed,
            condition_indices_P=indices[first : first + per_unit],
            class_ids_P=class_ids[first : first + per_unit],
            group_size=1,
            settings=settings,
            kept_images=tuple(is_kept[first : first + per_unit].nonzero()[0].tolist()),
        )
        for index, first in enumerate(range(0, num_images, per_unit))
    ]
