"""The sampler: work units in, rollouts out. The plain object inside a rollout actor.

Owns a copy of the policy and its version. Must not know Ray, rewards or the learner.

Shapes: P conditions, G group, B = P*G images, L image tokens.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from rlgen.config.base import Dtype
from rlgen.errors import RolloutError
from rlgen.nn.flat import unpack_weights
from rlgen.nn.precision import cast_parameters
from rlgen.sampling.decode import sample_tokens
from rlgen.sampling.noise import uniform_noise
from rlgen.types import Rollout, WeightManifest, WorkUnit


class Sampler:
    """Samples work units with the weights that it was given last."""

    def __init__(self, policy: Any, *, device: torch.device, dtype: Dtype = "float32") -> None:
        """Take over a policy module that follows the Policy protocol; its version is 0."""
        self.policy = policy.requires_grad_(False)
        cast_parameters(policy, dtype, keep=policy.float32_parts)
        self.device = device
        self.policy_version: int | None = 0

    def update_weights(
        self, manifest: WeightManifest, buffer: np.ndarray | Sequence[np.ndarray | torch.Tensor]
    ) -> None:
        """Copy published weights in, whole or in chunks; the version changes last.

        Raises:
            WeightTransferError: what arrived is not what was published; nothing is sampled
                before other weights arrive.
        """
        self.policy_version = None
        unpack_weights(manifest, buffer, self.policy)
        self.policy_version = manifest.version

    def sample(self, unit: WorkUnit) -> Rollout:
        """Draw the unit's images; the result depends on the unit and the weights alone.

        Raises:
            RolloutError: the weights are of another version, or a class id is out of range.
        """
        if unit.policy_version != self.policy_version:
            raise RolloutError(
                f"unit {unit.unit_id} asks for policy version {unit.policy_version} and the "
                f"sampler holds {self.policy_version}; fetch the weights first."
            )
        highest = int(unit.class_ids_P.max())
        if highest >= self.policy.num_classes:
            raise RolloutError(
                f"unit {unit.unit_id} asks for class {highest} and the policy has "
                f"{self.policy.num_classes}; make class_names as long as the policy's classes."
            )
        start = time.perf_counter()
        num_conditions, group = len(unit.class_ids_P), unit.group_size
        noise_BL = uniform_noise(
            seed=unit.seed,
            purpose=unit.purpose,
            step=unit.step,
            condition_indices_B=self._to_device(unit.condition_indices_P).repeat_interleave(group),
            sample_indices_B=torch.arange(group, device=self.device).repeat(num_conditions),
            num_tokens=self.policy.num_tokens,
        )
        class_ids_B = self._to_device(unit.class_ids_P).repeat_interleave(group)
        tokens_BL, logprobs_BL = sample_tokens(self.policy, class_ids_B, noise_BL, unit.settings)
        return Rollout(
            unit=unit,
            policy_version=self.policy_version,
            tokens_BL=tokens_BL.cpu().numpy().astype(np.int32),
            rollout_logprobs_BL=logprobs_BL.cpu().numpy(),
            sampling_s=time.perf_counter() - start,
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, dtype=np.int64)).to(self.device)
