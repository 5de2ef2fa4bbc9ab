"""What the published works say, beside what the ablation's runs say.

Owns the comparisons and when one counts as agreement: on every seed, for the means would hide
one that disagrees. Must not know where the numbers come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from rlgen.jobs.ablation_plan import Values

Runs = Mapping[str, Sequence[Values]]
"""By variant the values of each seed."""
Outcome = Literal["agrees", "contradicts", "mixed"]
RECALL_SCATTER = 0.015
"""How far one recall scatters between runs that differ in rounding alone."""


@dataclass(frozen=True)
class Finding:
    """One sentence of a published work, and what came out here."""

    experiment: str
    claim: str
    source: str
    measured: str
    """What is measured on each seed, and from where on it counts as agreement."""
    per_seed: list[float]
    outcome: Outcome

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return mean(self.per_seed)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self) | {"mean": self.value}


@dataclass(frozen=True)
class _Claim:
    experiment: str
    claim: str
    source: str
    measured: str
    variants: tuple[str, ...]
    measure: Callable[..., float]
    """Of the values of one seed for each of the variants."""
    holds: Callable[[float], bool]
    also: Callable[..., bool] = lambda *values: True
    """What must be true beside it, of the same values."""


GRPO_AR = "arXiv:2603.23086"
GRPO_VAR = "arXiv:2505.23331"


def _after(key: str) -> Callable[[Values], float]:
    return lambda values: values["after"][key]


def _gain(key: str) -> Callable[[Values, Values], float]:
    return lambda first, second: first["after"][key] - second["after"][key]


def _is_learnt_with_its_class(run: Values) -> bool:
    """Whether the base hardly had the style, and the classes were kept."""
    return (
        run["before"]["rewards"]["styled"] < 0.05 and run["after"]["rewards"]["class_kept"] >= 0.75
    )


_CLAIMS = (
    _Claim(
        "rewards",
        "Instance rewards alone narrow the samples; LOO-FID keeps them diverse",
        GRPO_AR,
        "recall, both - instance only; above the scatter of 0.015",
        ("both", "instance"),
        _gain("recall"),
        lambda value: value > RECALL_SCATTER,
    ),
    _Claim(
        "rewards",
        "Both rewards together give a better FID than the instance rewards alone",
        GRPO_AR,
        "judge FID, both / instance only; below 1",
        ("both", "instance"),
        lambda both, alone: both["after"]["judge_fid"] / alone["after"]["judge_fid"],
        lambda value: value < 1,
    ),
    _Claim(
        "rewards",
        "Both rewards together give a better FID than LOO-FID alone",
        GRPO_AR,
        "judge FID, both / distribution only; below 1",
        ("both", "distribution"),
        lambda both, alone: both["after"]["judge_fid"] / alone["after"]["judge_fid"],
        lambda value: value < 1,
    ),
    _Claim(
        "covariance",
        "Diagonal covariances are enough for LOO-FID, as published",
        GRPO_AR,
        "judge FID, diagonal / full; at most 1.1",
        ("diagonal", "both"),
        lambda diagonal, full: diagonal["after"]["judge_fid"] / full["after"]["judge_fid"],
        lambda value: value <= 1.1,
    ),
    _Claim(
        "entropy",
        "An adaptive entropy bonus guards against collapse: instance rewards alone",
        GRPO_AR,
        "recall, with - without the bonus; above the scatter of 0.015",
        ("instance-entropy", "instance"),
        _gain("recall"),
        lambda value: value > RECALL_SCATTER,
    ),
    _Claim(
        "entropy",
        "An adaptive entropy bonus helps the full reward, too",
        GRPO_AR,
        "judge FID, with / without the bonus; below 1",
        ("both-entropy", "both"),
        lambda bonus, none: bonus["after"]["judge_fid"] / none["after"]["judge_fid"],
        lambda value: value < 1,
    ),
    _Claim(
        "guidance",
        "Tuned, the policy without guidance is better than its base with guidance",
        GRPO_AR,
        "judge FID, after without guidance / base with its best; below 1",
        ("both",),
        lambda both: both["after"]["judge_fid"] / both["before"]["judge_fid_best_cfg"],
        lambda value: value < 1,
    ),
    *(
        _Claim(
            "style",
            f"A style prompt as reward takes a VAR to a style it never saw{addition}",
            GRPO_VAR,
            "share judged slanted, after; over 0.8 from under 0.05, with 0.75 of the classes right",
            (variant,),
            lambda run: run["after"]["rewards"]["styled"],
            lambda value: value > 0.8,
            _is_learnt_with_its_class,
        )
        for variant, addition in (
            ("slanted-instance", ""),
            ("slanted-both", " (with LOO-FID)"),
        )
    ),
    _Claim(
        "style",
        "LOO-FID against real slanted digits makes them more like those",
        "rlgen",
        "judge FID to real slanted digits, with / without LOO-FID; below 1",
        ("slanted-both", "slanted-instance"),
        lambda both, alone: both["after"]["judge_fid"] / alone["after"]["judge_fid"],
        lambda value: value < 1,
    ),
)


def findings(names: Sequence[str], runs: Runs) -> list[Finding]:
    """Compare what the chosen experiments found with what was published.

    Args:
        names: of the experiments; what they were not asked to run is passed over.
        runs: by variant the values of each seed, in one order.
    """
    found = []
    for claim in _CLAIMS:
        if claim.experiment not in names or not all(v in runs for v in claim.variants):
            continue
        seeds = list(zip(*(runs[variant] for variant in claim.variants), strict=True))
        per_seed = [claim.measure(*of_seed) for of_seed in seeds]
        held = [
            claim.holds(value) and claim.also(*of_seed)
            for value, of_seed in zip(per_seed, seeds, strict=True)
        ]
        outcome: Outcome = "agrees" if all(held) else "mixed" if any(held) else "contradicts"
        found.append(
            Finding(claim.experiment, claim.claim, claim.source, claim.measured, per_seed, outcome)
        )
    return found
