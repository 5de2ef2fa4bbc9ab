"""What a run will do, in words, before anything starts.

Owns the plan that `--dry-run` prints and the checks that need no model. Must not import torch.
"""

import math
import re
from pathlib import Path

from rlgen.config.base import EMBEDDED, REQUIRED
from rlgen.config.model_plan import GIB, describe_models, memory_estimates
from rlgen.config.models import model_spec
from rlgen.config.roles import role_resources, shared_gpus
from rlgen.config.run import PublicFile, RunConfig
from rlgen.config.sizing import Rates, describe_sizing
from rlgen.errors import ConfigError

_PATH_FIELDS = (
    "checkpoint",
    "head",
    "captions",
    "extractor",
    "reference",
    "judge",
    "judge_reference",
    "resume_from",
)


def named_files(config: RunConfig) -> dict[str, str]:
    """Every path or URL of an input that the configuration names, by dotted key."""
    return {
        key: value
        for key, value in config.flattened().items()
        if key.rsplit(".", 1)[-1] in _PATH_FIELDS
        and isinstance(value, str)
        and value not in (EMBEDDED, REQUIRED)
        and key != "grpo.reference"
        and not re.match(r"reward\.scorers\.[^.]+\.arguments\.", key)
    }


def check_local_files(config: RunConfig) -> None:
    """Refuse local inputs that do not exist; remote ones are checked when they are opened.

    Raises:
        ConfigError: names the keys and the paths.
    """
    missing = [
        f"{key} = {value}"
        for key, value in named_files(config).items()
        if "://" not in value and not Path(value).exists()
    ]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} does not exist; give a path or URL, or `{EMBEDDED}` for the "
            "embedded default."
        )


def required_files(config: RunConfig) -> dict[str, str]:
    """What is meant by every path that a preset leaves to the user, by dotted key."""
    meanings = {
        "policy.checkpoint": _published(config.policy),
        "policy.captions": "encoded captions",
        "tokenizer.checkpoint": _published(config.tokenizer),
        "reward.loo_fid.extractor": "weights of a feature extractor",
        "reward.loo_fid.reference": "moments of real images in that extractor's features",
        "evaluation.judge": "weights of another feature extractor, which no reward sees",
        "evaluation.judge_reference": "features of real images by the judge",
    }
    scorers = {
        "clip": "open_clip folder of a CLIP; or, with `model`, one published file of weights",
        "hpsv2": "HPSv2's weights, such as HPS_v2.1_compressed.pt, or an open_clip folder of them",
        "aesthetic": "the CLIP that the head was trained on, as for `clip`",
    }
    for name, scorer in config.reward.active_scorers.items():
        key = f"reward.scorers.{name}"
        meanings[f"{key}.checkpoint"] = scorers.get(scorer.type, "a path or URL")
        meanings[f"{key}.head"] = "weights of LAION's aesthetic head for that CLIP"
    return {key: meanings.get(key, "a path or URL") for key in config.keys_with(REQUIRED)}


def _published(file: PublicFile) -> str:
    if file.model is None:
        return "weights that rlgen wrote"
    names = model_spec(file.model).files
    return f"weights of {file.model}, " + (
        f"published as {' or '.join(names)}" if names else "which nobody has published"
    )


def check_required(config: RunConfig) -> None:
    """Refuse to start while paths that only the user can give are not given.

    Raises:
        ConfigError: lists all of them and what is meant.
    """
    wanted = required_files(config)
    if wanted:
        listed = "".join(f"\n  {key}=...  {meaning}" for key, meaning in wanted.items())
        raise ConfigError(
            f"this configuration leaves {len(wanted)} path{'s' * (len(wanted) > 1)} to you; give "
            f"each on the command line or in the YAML file:{listed}"
        )


def check_trainable(config: RunConfig) -> None:
    """Refuse what samples well but can't be trained.

    Raises:
        ConfigError: sampler and learner may cut off different codes.
    """
    rollout, learner = config.rollout, config.learner
    if not config.is_exact and (rollout.top_k > 0 or rollout.top_p < 1.0):
        raise ConfigError(
            f"rollout.dtype = {rollout.dtype} and learner.dtype = {learner.dtype} may cut off "
            f"different codes at rollout.top_k = {rollout.top_k} and rollout.top_p = "
            f"{rollout.top_p}; train with float32 for both, or with top_k 0 and top_p 1."
        )


def uses_embedded(config: RunConfig) -> bool:
    """Whether any input is the embedded default's."""
    return bool(config.keys_with(EMBEDDED))


def describe_plan(config: RunConfig, rates: Rates | None = None) -> str:
    """Batch algebra, actors and resources of a run, for people to read.

    Args:
        config: the run.
        rates: what sizes a cluster; without them the plan says how they are measured.
    """
    rollout, learner, reward = config.rollout, config.learner, config.reward
    per_unit = rollout.conditions_per_unit * rollout.group_size
    per_rank = config.images_per_step // learner.num_workers
    micro_batches = -(-per_rank // learner.micro_batch_size)
    scales = ", ".join(f"{scale:g}" for scale in config.evaluation.cfg_scales)
    sweep = f"; before and after also with guidance {scales}" if scales else ""
    rewards = [f"{name} x {s.weight:g}" for name, s in reward.active_scorers.items()]
    if reward.loo_fid is not None:
        rewards.append(
            f"loo_fid x {reward.loo_fid.weight:g} ({reward.loo_fid.covariance}, decay "
            f"{reward.loo_fid.decay:g})"
        )
    where = "on Ray" if config.runtime == "ray" else "in this process, without Ray"
    lines = [
        f"{config.steps} steps {where}, seed {config.seed}, "
        + ("synchronous" if config.max_policy_lag == 0 else f"lag {config.max_policy_lag}"),
        "",
        "Batch",
        f"  {rollout.conditions_per_step} conditions x {rollout.group_size} images = "
        f"{config.images_per_step} images a step",
        f"  {config.num_units} work units of {rollout.conditions_per_unit} conditions = "
        f"{per_unit} images, for {rollout.num_workers} rollout workers",
        f"  {per_rank} images a learner rank in {micro_batches} micro-batch(es) of up to "
        f"{learner.micro_batch_size}, {config.grpo.inner_epochs} inner epoch(s)",
        f"  rewards: {', '.join(rewards)}",
        f"  evaluation: {config.evaluation.num_images} images every "
        f"{config.evaluation.every_steps} steps{sweep}",
        *describe_models(config),
        *describe_sizing(config, rates or Rates()),
    ]
    if config.runtime == "ray":
        lines += ["", "Actors", *_describe_actors(config)]
    files = named_files(config)
    lines += ["", "Inputs"]
    lines += [f"  {key}: {value}" for key, value in files.items()]
    lines += [f"  {key}: to be given: {what}" for key, what in required_files(config).items()]
    if uses_embedded(config):
        lines.append("  the embedded digits preset, trained once and cached")
    return "\n".join(lines)


def _describe_actors(config: RunConfig) -> list[str]:
    """Processes by role, what is set aside for them, and how they divide GPUs."""
    roles = role_resources(config)
    most = {"rollout": config.rollout.num_workers, "reward": config.reward.num_workers}
    lines = []
    for role in roles:
        upper = most.get(role.name, role.count)
        count = f"{role.count}" if upper == role.count else f"{role.count} to {upper}"
        labels = "".join(f", {key}={value}" for key, value in role.label_selector.items())
        lines.append(
            f"  {count} x {role.name:<13} {role.threads} thread(s), {role.num_cpus:g} CPU and "
            f"{role.num_gpus:g} GPU set aside for each{labels}"
        )
    cpus = sum(role.count * role.num_cpus for role in roles)
    gpus = sum(role.count * role.num_gpus for role in roles)
    return [*lines, f"  together {cpus:g} CPU, {gpus:g} GPU", *_describe_sharing(config)]


def _describe_sharing(config: RunConfig) -> list[str]:
    """How roles that ask for parts of a GPU divide it, and whether that fits by estimate."""
    shares = shared_gpus(config)
    if not shares:
        return []
    together = sum(shares.values())
    num_gpus = math.ceil(together - 1e-6)
    where = "one GPU" if num_gpus == 1 else f"at least {num_gpus} GPUs"
    listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    lines = [f"  shared: {listed}: {together:g}, on {where}"]
    if config.policy.model is None or num_gpus > 1:
        return lines
    counts = {role.name: role.count for role in role_resources(config)}
    needed = sum(
        estimate.total * counts[estimate.role] / GIB
        for estimate in memory_estimates(config)
        if estimate.role in shares
    )
    return [
        *lines,
        f"  it needs {needed / 0.9:.2f} GiB by estimate, a tenth left free, and on top what "
        "scorers, extractor and judge take",
    ]
