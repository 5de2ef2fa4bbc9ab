"""A run in miniature: a random policy, a configuration that fits it, and on-policy batches.

Shapes: P conditions, G group, B = P*G images, L image tokens.
"""

import copy
from typing import Any

import numpy as np
import torch

from rlgen.config import RunConfig
from rlgen.learner.batch import learner_batch
from rlgen.nn.flat import pack_weights
from rlgen.policies.llamagen import LlamaGen, LlamaGenConfig
from rlgen.sampling.sampler import Sampler
from rlgen.sampling.units import training_units
from rlgen.types import LearnerBatch, Rollout, ScoredRollout, StepRewards

CPU = torch.device("cpu")
CLASS_NAMES = ("ant", "bee", "cat", "dog")


def tiny_policy(seed: int = 0, *, grid_size: int = 3, codebook_size: int = 17) -> LlamaGen:
    """A LlamaGen with weights large enough that its distributions are far from uniform."""
    config = LlamaGenConfig(
        num_layers=2,
        num_heads=2,
        width=16,
        grid_size=grid_size,
        codebook_size=codebook_size,
        num_classes=len(CLASS_NAMES),
        ffn_multiple_of=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy = LlamaGen(config)
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=0.3)
    return policy


def tiny_config(**values: Any) -> RunConfig:
    """A configuration for the tiny policy; `__` stands for the dot of a key."""
    defaults = {
        "class_names": CLASS_NAMES,
        "steps": 4,
        "rollout.conditions_per_step": 4,
        "rollout.group_size": 3,
        "rollout.conditions_per_unit": 2,
    }
    given = {key.replace("__", "."): value for key, value in values.items()}
    return RunConfig().with_values(defaults | given)


def sampler_of(policy: LlamaGen, version: int = 0) -> Sampler:
    """A sampler that holds a copy of the policy."""
    sampler = Sampler(copy.deepcopy(policy), device=CPU)
    sampler.update_weights(*pack_weights(policy.state_dict(), version=version))
    return sampler


def scored(rollout: Rollout, **fields: Any) -> ScoredRollout:
    """A scored rollout that holds nothing but what is given."""
    defaults: dict[str, Any] = {
        "rewards": {},
        "features_BF": None,
        "judge_features_BF": None,
        "judge_hits_B": None,
        "images_u8": None,
        "scoring_s": 0.0,
    }
    return ScoredRollout(rollout=rollout, **(defaults | fields))


def sampled_batch(
    policy: LlamaGen, config: RunConfig, *, step: int = 0, version: int = 0
) -> LearnerBatch:
    """A step sampled from the policy, with random advantages that depend on the step alone."""
    sampler = sampler_of(policy, version)
    rollouts = [
        scored(sampler.sample(unit))
        for unit in training_units(config, step, policy_version=version)
    ]
    generator = np.random.default_rng([7, step])
    advantages_B = generator.normal(size=config.images_per_step).astype(np.float32)
    return learner_batch(step, rollouts, StepRewards(step, advantages_B, {}, {}))
