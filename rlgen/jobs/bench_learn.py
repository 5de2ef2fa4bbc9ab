"""Images per second of a policy update on an on-policy batch, with random weights."""

import argparse
import copy
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from rlgen.config import RunConfig, load_config
from rlgen.errors import ConfigError
from rlgen.jobs.bench_model import (
    Clock,
    add_model_arguments,
    describe,
    open_device,
    peak_memory_gib,
    random_policy,
    rates,
)
from rlgen.learner.batch import learner_batch
from rlgen.learner.learner import Learner
from rlgen.nn.flat import pack_weights
from rlgen.sampling.sampler import Sampler
from rlgen.sampling.units import training_units
from rlgen.types import LearnerBatch, ScoredRollout, StepRewards

_GROUP_SIZE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    add_model_arguments(parser)
    parser.add_argument("--micro-batch", type=int, help="images in one pass (default: all)")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="section.key=value",
        help="such as grpo.kl_coef=0.01 learner.gradient_checkpointing=true learner.lora.rank=16",
    )


def measure(request: argparse.Namespace) -> dict[str, Any]:
    """Sample one batch, then learn from it a few times.

    Raises:
        ConfigError: no such model or device, or settings that don't fit.
    """
    device = open_device(request)
    config = _config(request)
    policy = random_policy(request.model, device=device)
    clock = Clock(device)
    with clock.part("rollout"):
        batch = _on_policy_batch(policy, config, device)
    learner = _TimedLearner(policy, config, device=device, clock=clock)
    first = learner.update(batch)  # also passes the gate on the ratio
    rollout_s = clock.seconds.pop("rollout")
    clock.seconds.clear()
    seconds: list[float] = []
    for step in range(1, 1 + request.repeats):
        with clock.part("all"):
            learner.update(replace(batch, step=step))
        seconds.append(clock.seconds.pop("all"))
    split = {name: total / request.repeats for name, total in clock.seconds.items()}
    split["other"] = sum(seconds) / request.repeats - sum(split.values())
    return {
        **describe(policy, request, device),
        "micro_batch": config.learner.micro_batch_size,
        "settings": request.settings,
        **rates(seconds, policy=policy, batch=request.batch),
        "time_split_s": split,
        "rollout_s": rollout_s,
        "logprob_gap_mean": first["policy/logprob_gap_mean"],
        "logprob_gap_max": first["policy/logprob_gap_max"],
        "peak_memory_gib": peak_memory_gib(device),
    }


def _config(request: argparse.Namespace) -> RunConfig:
    """A run whose step is the batch, without a reference policy unless the settings ask for one.

    Raises:
        ConfigError: the batch can't be cut into groups, or the settings are wrong.
    """
    if request.batch % _GROUP_SIZE:
        raise ConfigError(f"--batch {request.batch} must be even: groups have two images here.")
    own = {
        "steps": request.repeats + 1,
        "class_names": [str(index) for index in range(4)],
        "policy.model": request.model,
        "rollout.conditions_per_step": request.batch // _GROUP_SIZE,
        "rollout.conditions_per_unit": request.batch // _GROUP_SIZE,
        "rollout.group_size": _GROUP_SIZE,
        "rollout.cfg_scale": request.cfg_scale,
        "rollout.dtype": request.dtype,
        "learner.dtype": request.dtype,
        "learner.micro_batch_size": request.micro_batch or request.batch,
        "learner.lr": 1e-6,
        "grpo.kl_coef": 0.0,
    }
    return load_config(None, [f"{key}={value}" for key, value in own.items()] + request.settings)


def _on_policy_batch(policy: Any, config: RunConfig, device: torch.device) -> LearnerBatch:
    sampler = Sampler(copy.deepcopy(policy), device=device, dtype=config.rollout.dtype)
    sampler.update_weights(*pack_weights(policy.state_dict(), version=0))
    scored = [
        ScoredRollout(
            rollout=sampler.sample(unit),
            rewards={},
            features_BF=None,
            judge_features_BF=None,
            judge_hits_B=None,
            images_u8=None,
            scoring_s=0.0,
        )
        for unit in training_units(config, 0, policy_version=0)
    ]
    advantages_B = np.random.default_rng(0).normal(size=config.images_per_step).astype(np.float32)
    return learner_batch(0, scored, StepRewards(0, advantages_B, {}, {}))


class _TimedLearner(Learner):
    """A learner with a clock on the two parts of an inner epoch."""

    def __init__(
        self, policy: Any, config: RunConfig, *, device: torch.device, clock: Clock
    ) -> None:
        super().__init__(policy, config, device=device)
        self._clock = clock

    def _accumulate_gradients(self, *arguments: Any, **options: Any) -> Any:
        with self._clock.part("forward_backward"):
            return super()._accumulate_gradients(*arguments, **options)

    def _step_optimizer(self, step: int) -> float:
        with self._clock.part("optimizer"):
            return super()._step_optimizer(step)
