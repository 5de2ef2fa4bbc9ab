"""What an evaluation of a policy asks for, and its plan in words.

Owns the run configuration that an evaluation makes of a training run's, and the numbers that
follow from sizes alone. Must not import torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgen.config.model_sizes import policy_sizes
from rlgen.config.models import architecture_of, model_spec
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError

LARGE_NUM_IMAGES = 50_000
"""Images that published numbers of large models are taken over."""
MIN_IMAGES = 10
"""The Inception score takes ten parts."""


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation: one policy, several guidance scales, the same noise for each."""

    config: RunConfig
    """Without anything of training that could stand in the way; its rollouts are not guided."""
    scales: tuple[float, ...]
    """Guidance scales, ascending; 1 is none."""
    num_images: int
    """Images per scale."""


def plan_evaluation(
    config: RunConfig, *, scales: str | None, num_images: int | None, policy: Mapping[str, Any]
) -> EvaluationPlan:
    """Make the plan of an evaluation from a training run's configuration.

    Args:
        config: judge, scorers, extractor, number format, workers and seeds are taken from it.
        scales: numbers with commas between; None takes no guidance and evaluation.cfg_scales.
        num_images: None takes 50,000 for a published model and evaluation.num_images else.
        policy: dotted keys that put another policy in place of the configuration's.
    Raises:
        ConfigError: a scale below 1 or that is no number, or too few images.
    """
    chosen = (1.0, *config.evaluation.cfg_scales) if scales is None else _parse_scales(scales)
    ordered = tuple(sorted({float(f"{scale:g}") for scale in chosen}))  # as files name them
    if num_images is None:
        is_large = config.policy.model is not None
        num_images = LARGE_NUM_IMAGES if is_large else config.evaluation.num_images
    at_least = max(MIN_IMAGES, config.evaluation.num_neighbors + 1)
    if num_images < at_least:
        raise ConfigError(
            f"{num_images} images a scale are too few for {MIN_IMAGES} splits and "
            f"evaluation.num_neighbors = {config.evaluation.num_neighbors}; make --num-images "
            f"{at_least} or more."
        )
    neutral = {
        "rollout.cfg_scale": 1.0,
        "evaluation.cfg_scales": tuple(scale for scale in ordered if scale > 1.0),
        "learner.num_workers": 1,
        "learner.lora": None,
        "grpo.kl_coef": 0.0,
        "checkpoint.resume_from": None,
    }
    return EvaluationPlan(config.with_values(neutral | dict(policy)), ordered, num_images)


def published_architecture(config: RunConfig) -> tuple[str, dict[str, Any]] | None:
    """Family and fields of a published policy; None if only its file says what it is."""
    policy = config.policy
    if policy.model is None:
        return None
    return model_spec(policy.model).family, architecture_of(policy.model, policy.architecture)


def model_evaluations(family: str, architecture: Mapping[str, Any], cfg_scale: float) -> int:
    """Forward passes of the policy per image: one per token or scale, twice that with guidance."""
    num_blocks = len(policy_sizes(family, architecture).block_sizes)
    return num_blocks * (1 if cfg_scale == 1.0 else 2)


def describe_evaluation(
    plan: EvaluationPlan, architecture: tuple[str, Mapping[str, Any]] | None, folder: str
) -> str:
    """Images, units, scales, model evaluations and workers, for people to read.

    Args:
        architecture: the policy's family and fields; None if its file is not there yet.
        folder: where the results go.
    """
    config, evaluation = plan.config, plan.config.evaluation
    num_units = -(-plan.num_images // evaluation.images_per_unit)
    where = "in this process, without Ray"
    if config.runtime == "ray":
        where = (
            f"on Ray by {config.rollout.num_workers} rollout and {config.reward.num_workers} "
            "reward actor(s)"
        )
    lines = [
        f"policy {config.policy.checkpoint}",
        f"  {plan.num_images:,} images at each of {len(plan.scales)} guidance scale(s), "
        f"{where}, seed {evaluation.seed}",
        f"  {num_units:,} work units of up to {evaluation.images_per_unit} images a scale, "
        f"{num_units * len(plan.scales):,} in all",
    ]
    for scale in plan.scales:
        if architecture is None:
            count = "model evaluations are known once the embedded default is trained"
        else:
            each = model_evaluations(*architecture, scale)
            count = f"{each:,} model evaluations an image, {each * plan.num_images:,} in all"
        lines.append(f"  scale {scale:g}: {count}")
    scorers = ", ".join(config.reward.active_scorers) or "none"
    extractor = config.reward.loo_fid.extractor if config.reward.loo_fid else "none"
    lines += [
        f"  judge: {evaluation.judge}",
        f"  second feature space: {extractor}",
        f"  scorers: {scorers}",
        f"  results: {folder}",
    ]
    return "\n".join(lines)


def _parse_scales(text: str) -> Sequence[float]:
    try:
        scales = [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--scales {text!r} must be numbers with commas between, such as 1,1.5,2."
        ) from None
    wrong = [f"{scale:g}" for scale in scales if not 1.0 <= scale < float("inf")]
    if wrong:
        raise ConfigError(f"--scales has {', '.join(wrong)}; guidance is 1 (none) or more.")
    return scales
