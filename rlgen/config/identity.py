"""What makes two runs the same run.

Owns which settings decide a run's result, and the words for how two runs differ. Must not import
torch.
"""

import reprlib
from typing import Any

import yaml

from rlgen.config.base import EMBEDDED
from rlgen.config.run import RunConfig
from rlgen.config.secrets import scrubbed
from rlgen.config.tree import digest, flatten

_PLACES = {"num_workers", "min_workers", "num_cpus", "num_gpus", "label_selector"}
_NO_PART_OF_IT: dict[str, bool | set[str]] = {
    **dict.fromkeys(("runtime", "checkpoint", "replay", "tracking", "cluster", "weights"), True),
    **dict.fromkeys(("rollout", "reward", "learner"), _PLACES),
}
"""Fields that say where a run works and what it keeps. They may change between an interruption
and the same command, and a new one among them orphans no checkpoint."""
_MOST_TOLD = 5


def resume_key(config: RunConfig) -> str:
    """Digest of the settings that decide a run's result; worker counts and places do not."""
    return digest(_deciding(config))


def differences(dumped: bytes, config: RunConfig) -> str:
    """Say which settings that decide the result are others, for a message.

    Args:
        dumped: the other run's config.yaml.
        config: ours.
    Returns:
        Such as "steps (3, now 4), learner.lr (0.01, now 0.02)".
    """
    theirs = dict(flatten(yaml.safe_load(dumped)))
    ours = dict(flatten(_deciding(config)))
    told = [
        f"{key} ({reprlib.repr(theirs.get(key))}, now {reprlib.repr(value)})"
        for key, value in ours.items()
        if theirs.get(key) != value and EMBEDDED not in (theirs.get(key), value)
    ]
    more = f" and {len(told) - _MOST_TOLD} more" if len(told) > _MOST_TOLD else ""
    return scrubbed(", ".join(told[:_MOST_TOLD]) + more) or "none that its config.yaml shows"


def _deciding(config: RunConfig) -> dict[str, Any]:
    return config.model_dump(mode="json", exclude=_NO_PART_OF_IT)
