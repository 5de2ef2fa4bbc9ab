"""The audit of the groups: generated = trained + dropped + in flight, in every step.

Owns the sums over all processes that a run has had. What the coordinator counts begins with its
process; what is trained is told by the lineage of checkpoints that the policy stands on.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rlgen.types import GroupCounts

REWOUND = "rewound"
"""Generated for steps that were done again from a checkpoint."""


class GroupLedger:
    """Counts of a run's training groups."""

    def __init__(self) -> None:
        self.trained = 0
        """Groups that the policy has learnt from, each once."""
        self._trained_at_start = 0
        self._past_generated = 0
        self._past_dropped: Counter[str] = Counter()
        self._seen = GroupCounts()

    def see(self, counts: GroupCounts) -> None:
        """Take in what this process's roles have counted since it began."""
        self._seen = counts

    def totals(self) -> dict[str, Any]:
        """Generated, trained, and dropped by reason; without those in flight."""
        dropped = self._past_dropped + Counter(self._seen.dropped)
        # Handed out, and not learnt from by the policy that there is now.
        dropped[REWOUND] += self._seen.taken - (self.trained - self._trained_at_start)
        return {
            "generated": self._past_generated + self._seen.generated - self._seen.in_flight,
            "trained": self.trained,
            "dropped": dict(+dropped),
        }

    def metrics(self) -> dict[str, float]:
        """The ledger of this step; `groups/unaccounted` is 0 unless a group was lost."""
        totals = self.totals()
        dropped = sum(totals["dropped"].values())
        unaccounted = totals["generated"] - totals["trained"] - dropped
        return {
            "groups/generated": float(totals["generated"] + self._seen.in_flight),
            "groups/trained": float(totals["trained"]),
            "groups/dropped": float(dropped),
            "groups/in_flight": float(self._seen.in_flight),
            "groups/unaccounted": float(unaccounted),
        }

    def adopt(self, totals: Mapping[str, Any], *, lost: int) -> None:
        """Go on, in a new process, from a checkpoint.

        Args:
            totals: what `totals` gave when it was written.
            lost: groups that the earlier process trained after it.
        """
        self._past_generated = totals["generated"] + lost
        self._past_dropped = Counter(totals["dropped"])
        self._past_dropped[REWOUND] += lost
        self._trained_at_start = self.trained = totals["trained"]
