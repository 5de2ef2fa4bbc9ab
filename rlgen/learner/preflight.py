"""Checks that need the models' files, made before any worker starts.

Owns the questions whether the files that a configuration names fit each other.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlgen.config.identity import differences, resume_key
from rlgen.config.plan import named_files
from rlgen.config.reward import PythonRewardConfig
from rlgen.config.run import RunConfig
from rlgen.errors import CheckpointError, ConfigError, RewardError
from rlgen.evaluation.judge import load_real_features
from rlgen.features.extractor import load_extractor
from rlgen.learner.checkpoint import read_meta, read_part
from rlgen.learner.sample_size import few_samples
from rlgen.moments.reference import check_reference
from rlgen.policies.captions import load_captions
from rlgen.policies.load import load_policy, read_policy_file
from rlgen.policies.protocol import Policy
from rlgen.rewards.load import check_scorer, load_reward
from rlgen.rewards.protocol import Asked
from rlgen.rewards.reference import load_class_means, read_reference
from rlgen.storage import without_credentials
from rlgen.tokenizers.protocol import Tokenizer
from rlgen.tokenizers.published import open_tokenizer


def check_named_files(config: RunConfig) -> None:
    """Open what the user named, before time is spent on training the embedded default.

    Raises:
        CheckpointError: a file is missing, damaged or of another kind.
        ConfigError: reference statistics can't be read.
    """
    device = torch.device("cpu")
    readers: dict[str, Callable[[str], Any]] = {
        "policy.checkpoint": lambda _: read_policy_file(config.policy),
        "policy.captions": load_captions,
        "tokenizer.checkpoint": lambda _: open_tokenizer(config.tokenizer, device=device),
        "reward.loo_fid.extractor": load_extractor,
        "reward.loo_fid.reference": read_reference,
        "evaluation.judge": load_extractor,
        "evaluation.judge_reference": load_real_features,
        "checkpoint.resume_from": read_meta,
    }
    for key, location in named_files(config).items():
        if key in readers:
            readers[key](location)
    for scorer in config.reward.active_scorers.values():
        check_scorer(scorer)


def check_inputs(config: RunConfig) -> None:
    """Open every input and compare them; nothing is kept.

    Raises:
        ConfigError: two of them do not fit; names both values.
        CheckpointError: one is missing or damaged.
    """
    device = torch.device("cpu")
    policy = load_policy(config, device=device)
    tokenizer = open_tokenizer(config.tokenizer, device=device)
    check_fit(config, policy, tokenizer, num_classes=len(config.class_names))
    scales = {config.rollout.cfg_scale, *config.evaluation.cfg_scales} - {1.0}
    if policy.null_class is None and scales:
        raise ConfigError(
            f"rollout.cfg_scale or evaluation.cfg_scales ask for guidance {sorted(scales)} and the "
            f"policy {config.policy.checkpoint} has no null class; set evaluation.cfg_scales=[] "
            "and rollout.cfg_scale=1, or pretrain it with dropped conditions "
            "(digits.class_dropout)."
        )
    for name, scorer in config.reward.active_scorers.items():
        check_scorer(scorer)
        if isinstance(scorer, PythonRewardConfig) and scorer.try_first:
            _try_scorer(name, scorer, tokenizer, config.class_names)
    _check_moments(config, device)
    _check_judge(config, device)
    if config.checkpoint.resume_from is not None:
        check_resume(config, config.checkpoint.resume_from)


def check_fit(config: RunConfig, policy: Policy, tokenizer: Tokenizer, *, num_classes: int) -> None:
    """Refuse names of other classes than the policy's, and tokens of another tokenizer.

    Raises:
        ConfigError: names both values.
    """
    if policy.num_classes != num_classes:
        raise ConfigError(
            f"class_names has {num_classes} names and the policy {config.policy.checkpoint} has "
            f"{policy.num_classes} classes; name every class."
        )
    ours = (policy.codebook_size, policy.num_tokens)
    theirs = (tokenizer.codebook_size, tokenizer.num_tokens)
    if ours != theirs:
        raise ConfigError(
            f"the policy makes {ours[1]} tokens of {ours[0]} codes and the tokenizer "
            f"{config.tokenizer.checkpoint} takes {theirs[1]} tokens of {theirs[0]} codes; use "
            "the tokenizer that the policy was trained with."
        )


@torch.inference_mode()
def _try_scorer(
    name: str, scorer: PythonRewardConfig, tokenizer: Tokenizer, class_names: Sequence[str]
) -> None:
    """Let a user's scorer score two images of random codes, of the first and the last class."""
    reward = load_reward(name, scorer, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    codes_BL = torch.randint(
        tokenizer.codebook_size, (2, tokenizer.num_tokens), generator=generator
    )
    asked = Asked(torch.tensor([0, len(class_names) - 1]), [class_names[0], class_names[-1]])
    try:
        reward(tokenizer.decode(codes_BL), asked)
    except RewardError as error:
        raise ConfigError(
            f"reward.scorers.{name} = {scorer.target} does not pass a trial on two images of "
            f"random codes: {error} If it only runs on a GPU, set "
            f"reward.scorers.{name}.try_first=false."
        ) from error


def _check_moments(config: RunConfig, device: torch.device) -> None:
    loo_fid = config.reward.loo_fid
    if loo_fid is None:
        return
    extractor = load_extractor(loo_fid.extractor, device)
    reference = read_reference(loo_fid.reference)
    check_reference(
        reference,
        feature_space=extractor.feature_space,
        num_features=extractor.num_features,
        path=f"reward.loo_fid.reference = {loo_fid.reference}",
    )
    load_class_means(config)  # refuses a reference without the run's classes
    few = few_samples(config, num_features=extractor.num_features, reference_count=reference.count)
    if few:
        warnings.warn(few, stacklevel=2)


def _check_judge(config: RunConfig, device: torch.device) -> None:
    judge = load_extractor(config.evaluation.judge, device)
    real = load_real_features(config.evaluation.judge_reference)
    if real.feature_space != judge.feature_space:
        raise ConfigError(
            f"evaluation.judge_reference = {config.evaluation.judge_reference} holds features of "
            f"{real.feature_space!r} and evaluation.judge is {judge.feature_space!r}; compute the "
            "real features with this judge."
        )
    if config.reward.loo_fid is not None:
        rewarded = load_extractor(config.reward.loo_fid.extractor, device)
        if rewarded.feature_space == judge.feature_space:
            raise ConfigError(
                f"evaluation.judge and reward.loo_fid.extractor are the same network "
                f"({judge.feature_space!r}); a judge that the reward sees proves nothing: use "
                "another one."
            )


def check_resume(config: RunConfig, uri: str) -> None:
    """A resumed run must be the same run: everything but where and how it runs is equal.

    Raises:
        CheckpointError: the checkpoint can't be read, or settings differ; names them.
    """
    meta = read_meta(uri)
    if meta["resume_key"] != resume_key(config):
        told = differences(read_part(uri, "config.yaml"), config)
        raise CheckpointError(
            f"checkpoint.resume_from = {without_credentials(uri)} was written with other settings: "
            f"{told}. Resume with the config.yaml in that run's folder, or start from its "
            "policy.safetensors as policy.checkpoint."
        )
