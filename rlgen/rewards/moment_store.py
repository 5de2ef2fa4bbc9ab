"""The moment store: EMA feature moments, leave-one-out rewards, advantages of the whole step.

Owns state that training needs and no worker may lose: the EMA moments (float64) and the running
scale of each reward. One idempotent commit per step. The plain object inside the named actor.

Shapes: B images of the step in the order of its units, F features.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from rlgen.config.reward import LooFidConfig
from rlgen.config.run import RunConfig
from rlgen.errors import NumericsError, RewardError
from rlgen.grpo.advantages import RunningScale, WeightedReward, combine_advantages
from rlgen.moments.batch_distance import batch_distance
from rlgen.moments.coordinates import ReferenceCoordinates, to_coordinates
from rlgen.moments.ema import EmaState
from rlgen.moments.leave_one_out import LeaveOneOut, leave_one_out
from rlgen.rewards.reference import rewarded_reference
from rlgen.types import StepRewards

LOO_FID = "loo_fid"


class MomentStore:
    """Turns one step's scores and features into advantages."""

    def __init__(self, config: RunConfig) -> None:
        """Read the reference moments.

        The EMA begins there if the configuration says so, else it is empty until `bootstrap` or
        `load_state_dict`.
        """
        self.config = config
        self._loo_config: LooFidConfig | None = config.reward.loo_fid
        self._reference: ReferenceCoordinates | None = None
        if self._loo_config is not None:
            self._reference = to_coordinates(rewarded_reference(self._loo_config))
        self._state: EmaState | None = None
        if self._loo_config is not None and self._loo_config.start == "reference":
            assert self._reference is not None, "read above"
            self._state = EmaState.from_reference(self._reference)
        self._scales: dict[str, RunningScale] = {}
        self._last: StepRewards | None = None
        self._last_digest = ""
        self._next_step = 0

    def bootstrap(self, features_BF: np.ndarray) -> None:
        """Start the EMA from features of the base policy's images."""
        assert self._reference is not None, "only runs with reward.loo_fid bootstrap"
        self._state = EmaState.bootstrap(torch.from_numpy(features_BF.copy()), self._reference)

    def commit(
        self, step: int, rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None
    ) -> StepRewards:
        """Take in one step and answer its advantages. Committing a step again changes nothing.

        Args:
            step: the next step, or the last one once more with the same content.
            rewards: instance rewards, float32 [B] each.
            features_BF: float32 [B, F]; None if the run has no distribution reward.
        Raises:
            RewardError: a step out of order, or the last step with other content.
            NumericsError: a reward or a feature is not finite; nothing was changed.
        """
        digest = _digest(rewards, features_BF)
        if self._last is not None and step == self._last.step:
            if digest != self._last_digest:
                raise RewardError(
                    f"step {step} was committed before with other scores; a step is committed "
                    "once, so its units must be sampled from one policy version."
                )
            return self._last
        if step != self._next_step:
            raise RewardError(
                f"step {step} was committed but step {self._next_step} is next; rewind the store "
                "with the checkpoint that the learner restarted from."
            )
        weighted: dict[str, WeightedReward] = {
            name: WeightedReward(
                torch.from_numpy(values.astype(np.float64)),
                self.config.reward.active_scorers[name].weight,
                self.config.advantage.instance_scale,
                "group",
            )
            for name, values in rewards.items()
        }
        outcome = None
        if self._loo_config is not None:
            outcome = self._leave_one_out(features_BF)
            weighted[LOO_FID] = WeightedReward(
                outcome.influence_B.cpu(),
                self._loo_config.weight,
                self.config.advantage.distribution_scale,
                self.config.advantage.distribution_center,
            )
        advantages_B, scales, metrics = combine_advantages(
            weighted,
            self._scales,
            group_size=self.config.rollout.group_size,
            config=self.config.advantage,
        )
        all_rewards = {name: r.values_B.float().numpy() for name, r in weighted.items()}
        if outcome is not None:
            metrics |= _moment_metrics(outcome)
            metrics |= self._batch_metrics(features_BF)
            self._state = outcome.state
            all_rewards[LOO_FID] = outcome.rewards_B.float().cpu().numpy()
        self._scales = scales
        self._last = StepRewards(step, advantages_B.numpy(), all_rewards, metrics)
        self._last_digest = digest
        self._next_step = step + 1
        return self._last

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next commit depends on: tensors and plain values."""
        return {
            "next_step": self._next_step,
            "scales": {name: (s.mean, s.num_steps) for name, s in self._scales.items()},
            "moments": None if self._state is None else self._state.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Rewind to what state_dict gave."""
        self._next_step = int(state["next_step"])
        self._scales = {name: RunningScale(*values) for name, values in state["scales"].items()}
        self._last, self._last_digest = None, ""
        if state["moments"] is not None and self._reference is not None:
            self._state = EmaState.from_state_dict(state["moments"], self._reference)

    def _leave_one_out(self, features_BF: np.ndarray | None) -> LeaveOneOut:
        assert self._loo_config is not None and self._reference is not None
        if features_BF is None:
            raise RewardError("the step has no features, and reward.loo_fid needs them.")
        if self._state is None:
            raise RewardError("the EMA moments are empty; bootstrap the store first.")
        bad = (~np.isfinite(features_BF).all(axis=1)).nonzero()[0]
        if len(bad):
            group = self.config.rollout.group_size
            raise NumericsError(
                f"the features of condition {bad[0] // group}, sample {bad[0] % group} are not "
                f"finite ({len(bad)} of {len(features_BF)} images); check reward.loo_fid.extractor."
            )
        return leave_one_out(
            self._state,
            torch.from_numpy(features_BF.copy()),
            self._reference,
            decay=self._loo_config.decay,
            covariance=self._loo_config.covariance,
        )

    def _batch_metrics(self, features_BF: np.ndarray | None) -> dict[str, float]:
        """The distance of this step's images alone: what the EMA's may hide."""
        assert self._loo_config is not None and self._reference is not None
        assert features_BF is not None, "checked by _leave_one_out"
        fid = batch_distance(
            torch.from_numpy(features_BF.copy()),
            self._reference,
            covariance=self._loo_config.covariance,
        )
        return {"moments/batch_fid": fid, "moments/batch_images": float(len(features_BF))}


def _moment_metrics(outcome: LeaveOneOut) -> dict[str, float]:
    assert outcome.fid is not None, "rewards are absolute"
    return {
        "moments/ema_fid": outcome.fid,
        "moments/n_eff": outcome.n_eff,
        "moments/guard_frac": outcome.guard_fraction,
        "moments/reward_std": outcome.rewards_B.std(correction=0).item(),
    }


def _digest(rewards: Mapping[str, np.ndarray], features_BF: np.ndarray | None) -> str:
    digest = hashlib.sha256()
    for name in sorted(rewards):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(rewards[name]).data)
    if features_BF is not None:
        digest.update(np.ascontiguousarray(features_BF).data)
    return digest.hexdigest()
