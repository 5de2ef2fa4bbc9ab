"""Rollouts of a step on disk: tokens and what they earned, a few hundred bytes an image.

Owns the file's layout. Must not know what will score the tokens again.

Shapes: B = P*G images in the order of the step, L image tokens.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlgen.errors import CheckpointError, StorageError
from rlgen.storage import join, read_bytes, without_credentials, write_bytes
from rlgen.types import Purpose, Rollout, SamplingSettings, ScoredRollout, StepRewards, WorkUnit

FOLDER = "replay"
BOOTSTRAP = "bootstrap"
_REWARD = "reward."


@dataclass(frozen=True)
class StoredStep:
    """What is kept of a step."""

    name: str
    """step-00020, or bootstrap."""
    policy_version: int
    group_size: int
    class_ids_B: np.ndarray
    """int64."""
    tokens_BL: np.ndarray
    """int32."""
    rewards: dict[str, np.ndarray]
    """Per reward float32 [B], as the run saw them; empty for the bootstrap."""
    advantages_B: np.ndarray | None
    """float32; None for the bootstrap."""

    def rollout(self, purpose: Purpose) -> Rollout:
        """The step as one rollout, for a reward engine."""
        class_ids_P = self.class_ids_B[:: self.group_size]
        unit = WorkUnit(
            unit_id=f"replay-{self.name}",
            purpose=purpose,
            step=0,
            index=0,
            policy_version=self.policy_version,
            seed=0,
            condition_indices_P=np.arange(len(class_ids_P)),
            class_ids_P=class_ids_P,
            group_size=self.group_size,
            settings=SamplingSettings(),
        )
        return Rollout(
            unit=unit,
            policy_version=self.policy_version,
            tokens_BL=self.tokens_BL,
            rollout_logprobs_BL=np.zeros(self.tokens_BL.shape, np.float32),  # not kept
            sampling_s=0.0,
        )


def step_name(step: int) -> str:
    """Name of a training step's file."""
    return f"step-{step:05d}"


def store_step(
    folder: str, name: str, scored: Sequence[ScoredRollout], rewards: StepRewards | None = None
) -> None:
    """Write the rollouts of a step.

    Args:
        folder: path or URL of the run folder.
        name: `step_name`, or BOOTSTRAP.
        scored: the units of the step, in their order.
        rewards: what the moment store answered; None for the bootstrap.
    """
    units = [item.rollout.unit for item in scored]
    tokens_BL = np.concatenate([item.rollout.tokens_BL for item in scored])
    narrow = np.uint16 if tokens_BL.max(initial=0) < 2**16 else np.int32
    earned: Mapping[str, np.ndarray] = {} if rewards is None else rewards.rewards
    arrays = {
        "tokens": tokens_BL.astype(narrow),
        "class_ids": np.concatenate([np.repeat(u.class_ids_P, u.group_size) for u in units]).astype(
            np.int32
        ),
        "group_size": np.array(units[0].group_size),
        "policy_version": np.array(scored[0].rollout.policy_version),
        **{f"{_REWARD}{reward}": values for reward, values in earned.items()},
    }
    if rewards is not None:
        arrays["advantages"] = rewards.advantages_B
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(join(folder, FOLDER, f"{name}.npz"), buffer.getvalue())


def load_step(folder: str, name: str) -> StoredStep:
    """Read what store_step wrote.

    Raises:
        CheckpointError: missing or damaged.
    """
    location = join(folder, FOLDER, f"{name}.npz")
    try:
        with np.load(io.BytesIO(read_bytes(location)), allow_pickle=False) as archive:
            return StoredStep(
                name=name,
                policy_version=int(archive["policy_version"]),
                group_size=int(archive["group_size"]),
                class_ids_B=archive["class_ids"].astype(np.int64),
                tokens_BL=archive["tokens"].astype(np.int32),
                rewards={
                    key.removeprefix(_REWARD): archive[key]
                    for key in archive.files
                    if key.startswith(_REWARD)
                },
                advantages_B=archive["advantages"] if "advantages" in archive.files else None,
            )
    except (StorageError, ValueError, KeyError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{without_credentials(location)} holds no stored rollouts ({error}); a run stores "
            "them with replay.every above 0."
        ) from None
