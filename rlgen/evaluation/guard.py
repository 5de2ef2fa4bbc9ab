"""The guard: rules on the judge's numbers that tell a collapse from progress.

Owns the rules and what they remember. Must not know what is done about a broken rule, nor
where the numbers come from. The judge's feature space is one that no reward uses, so that a
policy can't please it by pleasing the rewards.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from rlgen.config.guard import GuardConfig
from rlgen.evaluation.judge import Quality


@dataclass(frozen=True)
class Judgement:
    """What the rules look at."""

    step: int
    judge_fid: float
    recall: float
    reward: float
    """Weighted sum of the instance rewards; 0 if there are none."""

    @classmethod
    def of(cls, step: int, quality: Quality, weights: dict[str, float]) -> "Judgement":
        """Take the numbers of an evaluation."""
        reward = sum(weight * quality.rewards[name] for name, weight in weights.items())
        return cls(step, quality.judge_fid, quality.recall, reward)


@dataclass(frozen=True)
class Guard:
    """The rules with their memory; each judgement gives the next guard."""

    config: GuardConfig
    base: Judgement | None = None
    best: Judgement | None = None
    """The lowest judge FID of those that broke no rule."""
    last: Judgement | None = None
    num_hollow_gains: int = 0
    """Successive judgements in which reward and judge FID both rose."""

    def observed(self, now: Judgement) -> "Guard":
        """Remember a judgement; the first one is the base's."""
        is_hollow = (
            self.last is not None
            and now.reward > self.last.reward
            and now.judge_fid > self.last.judge_fid
        )
        seen = replace(
            self,
            base=self.base or now,
            best=self.best or now,
            last=now,
            num_hollow_gains=self.num_hollow_gains + 1 if is_hollow else 0,
        )
        assert seen.best is not None, "set above"
        if now.judge_fid < seen.best.judge_fid and not seen.broken_rules():
            return replace(seen, best=now)
        return seen

    def broken_rules(self) -> list[str]:
        """What is wrong with the last judgement, in words with numbers; empty if nothing is."""
        now, best, base = self.last, self.best, self.base
        if now is None or best is None or base is None:
            return []
        rules = self.config
        broken = []
        if rules.max_fid_ratio is not None and now.judge_fid > rules.max_fid_ratio * best.judge_fid:
            broken.append(
                f"judge FID {now.judge_fid:.3g} is over guard.max_fid_ratio = "
                f"{rules.max_fid_ratio:g} times the best, {best.judge_fid:.3g} at step {best.step}"
            )
        if rules.min_recall_ratio is not None and now.recall < rules.min_recall_ratio * base.recall:
            broken.append(
                f"recall {now.recall:.3f} is under guard.min_recall_ratio = "
                f"{rules.min_recall_ratio:g} times the base's, {base.recall:.3f}"
            )
        if rules.max_hollow_gains is not None and self.num_hollow_gains >= rules.max_hollow_gains:
            broken.append(
                f"instance rewards and judge FID rose together {self.num_hollow_gains} times in a "
                f"row (guard.max_hollow_gains = {rules.max_hollow_gains})"
            )
        return broken

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "base": _plain(self.base),
            "best": _plain(self.best),
            "last": _plain(self.last),
            "num_hollow_gains": self.num_hollow_gains,
        }

    def restored(self, state: dict[str, Any]) -> "Guard":
        """A guard that goes on from what state_dict gave."""
        return replace(
            self,
            base=_judgement(state["base"]),
            best=_judgement(state["best"]),
            last=_judgement(state["last"]),
            num_hollow_gains=int(state["num_hollow_gains"]),
        )


def _plain(judgement: Judgement | None) -> dict[str, Any] | None:
    return None if judgement is None else asdict(judgement)


def _judgement(values: dict[str, Any] | None) -> Judgement | None:
    return None if values is None else Judgement(**values)
