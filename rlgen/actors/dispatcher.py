"""Who works on which unit: queues, leases and results, without Ray or clocks.

Owns the way of a unit: queued -> sampled -> queued for scoring -> scored -> taken. A unit is
leased to one worker at a time; what a lost worker held goes back to the head of its queue and
comes out the same, because its noise is keyed by the unit.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlgen.errors import RolloutError
from rlgen.types import Rollout, ScoredRollout, WorkUnit


@dataclass
class Dispatcher:
    """The state of all units that were submitted and not yet taken."""

    duplicate_groups: int = 0
    """Training groups that came for units already answered, and were dropped."""
    _to_sample: deque[WorkUnit] = field(default_factory=deque)
    _to_score: deque[Rollout] = field(default_factory=deque)
    _sampling: dict[str, WorkUnit] = field(default_factory=dict)
    _scoring: dict[str, Rollout] = field(default_factory=dict)
    _scored: dict[str, ScoredRollout] = field(default_factory=dict)
    _open: set[str] = field(default_factory=set)

    def submit(self, units: Sequence[WorkUnit]) -> None:
        """Queue units for sampling."""
        for unit in units:
            if unit.unit_id in self._open:
                raise RolloutError(f"unit {unit.unit_id} was submitted twice; collect it first.")
            self._open.add(unit.unit_id)
            self._to_sample.append(unit)

    def lease_sampling(self, worker: str) -> WorkUnit | None:
        """Give a rollout worker the next unit, if there is one."""
        if not self._to_sample:
            return None
        self._sampling[worker] = self._to_sample.popleft()
        return self._sampling[worker]

    def finish_sampling(self, worker: str, rollout: Rollout) -> None:
        """Take a rollout and queue it for scoring.

        Raises:
            RolloutError: it was sampled with another policy version than the unit asks for.
        """
        self._sampling.pop(worker, None)
        unit = rollout.unit
        if rollout.policy_version != unit.policy_version:
            raise RolloutError(
                f"unit {unit.unit_id} asks for policy version {unit.policy_version} and was "
                f"sampled with {rollout.policy_version}."
            )
        if self._is_answered(unit.unit_id) or self._is_past_sampling(unit.unit_id):
            self._drop_duplicate(unit)
            return
        self._to_score.append(rollout)

    def lease_scoring(self, worker: str) -> Rollout | None:
        """Give a reward worker the next rollout, if there is one."""
        if not self._to_score:
            return None
        self._scoring[worker] = self._to_score.popleft()
        return self._scoring[worker]

    def finish_scoring(self, worker: str, scored: ScoredRollout) -> None:
        """Take a scored rollout."""
        self._scoring.pop(worker, None)
        unit = scored.rollout.unit
        if self._is_answered(unit.unit_id):
            self._drop_duplicate(unit)
            return
        self._scored[unit.unit_id] = scored

    def release(self, worker: str) -> None:
        """Put what a lost worker held back at the head of its queue."""
        if worker in self._sampling:
            self._to_sample.appendleft(self._sampling.pop(worker))
        if worker in self._scoring:
            self._to_score.appendleft(self._scoring.pop(worker))

    def are_scored(self, unit_ids: Sequence[str]) -> bool:
        """Whether all of these can be taken."""
        return all(unit_id in self._scored for unit_id in unit_ids)

    def take(self, unit_ids: Sequence[str]) -> list[ScoredRollout]:
        """Hand out results, which the dispatcher then forgets."""
        self._open.difference_update(unit_ids)
        return [self._scored.pop(unit_id) for unit_id in unit_ids]

    def describe(self) -> str:
        """Where the open units are, for messages."""
        return (
            f"{len(self._to_sample)} units wait for a rollout worker, {len(self._sampling)} are "
            f"sampled ({', '.join(sorted(self._sampling)) or 'by no one'}), {len(self._to_score)} "
            f"wait for a reward worker, {len(self._scoring)} are scored "
            f"({', '.join(sorted(self._scoring)) or 'by no one'}), {len(self._scored)} are done"
        )

    def _drop_duplicate(self, unit: WorkUnit) -> None:
        if unit.purpose == "train":
            self.duplicate_groups += len(unit.class_ids_P)

    def _is_answered(self, unit_id: str) -> bool:
        return unit_id in self._scored or unit_id not in self._open

    def _is_past_sampling(self, unit_id: str) -> bool:
        rollouts = [*self._to_score, *self._scoring.values()]
        return any(rollout.unit.unit_id == unit_id for rollout in rollouts)
