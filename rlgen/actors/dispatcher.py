"""Who works on which unit: queues, leases and results, without Ray or clocks.

Owns the way of a unit: queued -> sampled -> queued for scoring -> scored -> taken. A unit is
leased to one worker at a time and only its holder may answer; what a lost worker held goes back
to the head of its queue and comes out the same, because its noise is keyed by the unit.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from rlgen.errors import RolloutError
from rlgen.types import GroupCounts, Rollout, ScoredRollout, WorkUnit


@dataclass
class Dispatcher:
    """The state of all units that were submitted and not yet taken."""

    generated: int = 0
    """Training groups that were sampled."""
    taken: int = 0
    """Training groups that were handed out."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Training groups that were generated and not handed out, by reason: `late` came from a worker
    that was given up, `rewound` belong to steps that are done again from a checkpoint."""
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
        unit = rollout.unit
        self.generated += _groups(unit)
        held = self._sampling.pop(worker, None)
        if held is None or held.unit_id != unit.unit_id:
            self._drop(unit, "late")
            return
        if rollout.policy_version != unit.policy_version:
            raise RolloutError(
                f"unit {unit.unit_id} asks for policy version {unit.policy_version} and was "
                f"sampled with {rollout.policy_version}."
            )
        self._to_score.append(rollout)

    def lease_scoring(self, worker: str) -> Rollout | None:
        """Give a reward worker the next rollout, if there is one."""
        if not self._to_score:
            return None
        self._scoring[worker] = self._to_score.popleft()
        return self._scoring[worker]

    def finish_scoring(self, worker: str, scored: ScoredRollout) -> None:
        """Take a scored rollout; a second score of one rollout is forgotten."""
        unit = scored.rollout.unit
        held = self._scoring.pop(worker, None)
        if held is None or held.unit.unit_id != unit.unit_id:
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
        taken = [self._scored.pop(unit_id) for unit_id in unit_ids]
        self.taken += sum(_groups(item.rollout.unit) for item in taken)
        return taken

    def rewind(self) -> None:
        """Forget every unit; whoever still works on one finds that it is no longer wanted."""
        for rollout in self._held():
            self._drop(rollout.unit, "rewound")
        for queue in (self._to_sample, self._to_score):
            queue.clear()
        for leases in (self._sampling, self._scoring, self._scored):
            leases.clear()
        self._open.clear()

    def counts(self) -> GroupCounts:
        """The ledger of training groups."""
        in_flight = sum(_groups(rollout.unit) for rollout in self._held())
        return GroupCounts(self.generated, self.taken, dict(self.dropped), in_flight)

    def describe(self) -> str:
        """Where the open units are, for messages."""
        return (
            f"{len(self._to_sample)} units wait for a rollout worker, {len(self._sampling)} are "
            f"sampled ({', '.join(sorted(self._sampling)) or 'by no one'}), {len(self._to_score)} "
            f"wait for a reward worker, {len(self._scoring)} are scored "
            f"({', '.join(sorted(self._scoring)) or 'by no one'}), {len(self._scored)} are done"
        )

    def _held(self) -> list[Rollout]:
        scored = [item.rollout for item in self._scored.values()]
        return [*self._to_score, *self._scoring.values(), *scored]

    def _drop(self, unit: WorkUnit, reason: str) -> None:
        if _groups(unit):
            self.dropped[reason] += _groups(unit)


def _groups(unit: WorkUnit) -> int:
    """How many groups to train on a unit has."""
    return len(unit.class_ids_P) if unit.purpose == "train" else 0
