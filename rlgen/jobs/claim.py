"""Repeat the claim on the embedded default: several seeds, with and without the LOO-FID reward.

Each run is the main job in a process of its own; the seed also makes another base policy. The
verdicts are printed with the numbers they rest on and kept in claim.json.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rlgen.config import load_config
from rlgen.jobs.cli import run_job
from rlgen.jobs.variants import SeededRun, Variant, execute_all, parse_seeds

FULL, INSTANCE_ONLY = "full", "instance_only"
_VARIANTS: dict[str, tuple[str, ...]] = {FULL: (), INSTANCE_ONLY: ("reward.loo_fid.weight=0",)}
_FID_RATIO_BARS = {"llamagen": 0.35, "var": 0.35, "vqgan": 0.5}
_BEST_GUIDANCE_BARS = {"llamagen": 0.7, "var": 1.0}
"""A VQGAN has no guidance to compare with."""

Summaries = Mapping[str, Sequence[Mapping[str, Any]]]
"""Per variant the summary.json of each seed."""


@dataclass(frozen=True)
class Verdict:
    """One sentence of the claim, what was measured, and the bar."""

    claim: str
    per_seed: list[float]
    bar: float
    is_at_least: bool = False

    @property
    def value(self) -> float:
        """Mean over the seeds."""
        return mean(self.per_seed)

    @property
    def holds(self) -> bool:
        """Whether the mean over the seeds clears the bar."""
        return self.value >= self.bar if self.is_at_least else self.value <= self.bar


def judge_claim(summaries: Summaries, family: str = "llamagen") -> list[Verdict]:
    """Compare the means over the seeds with the family's bars."""
    full = summaries[FULL]
    verdicts = [
        Verdict(
            "judge FID without guidance: after / base",
            [s["after"]["judge_fid"] / s["before"]["judge_fid"] for s in full],
            _FID_RATIO_BARS[family],
        ),
        Verdict(
            "recall: after - base",
            [s["after"]["recall"] - s["before"]["recall"] for s in full],
            -0.02,
            is_at_least=True,
        ),
    ]
    if family in _BEST_GUIDANCE_BARS:
        verdicts.append(
            Verdict(
                "judge FID: after without guidance / base at its best guidance",
                [s["after"]["judge_fid"] / s["before"]["judge_fid_best_cfg"] for s in full],
                _BEST_GUIDANCE_BARS[family],
            )
        )
    if INSTANCE_ONLY in summaries:
        verdicts += _verdicts_on_the_base_and_diversity(full, summaries[INSTANCE_ONLY])
    return verdicts


def _verdicts_on_the_base_and_diversity(
    full: Sequence[Mapping[str, Any]], alone: Sequence[Mapping[str, Any]]
) -> list[Verdict]:
    return [
        Verdict(
            "base: share of unguided images that the judge recognises",
            [s["before"]["accuracy"] for s in full],
            0.55,
            is_at_least=True,
        ),
        Verdict(
            "base: judge FID at its best guidance / without",
            [s["before"]["judge_fid_best_cfg"] / s["before"]["judge_fid"] for s in full],
            2 / 3,
        ),
        Verdict(
            "recall: full run - run without LOO-FID",
            [a["after"]["recall"] - b["after"]["recall"] for a, b in zip(full, alone, strict=True)],
            0.05,
            is_at_least=True,
        ),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and print the verdicts; 1 if one does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m rlgen.jobs.claim", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated; default 0,1,2")
    parser.add_argument("--config", metavar="FILE", help="preset; default: the embedded LlamaGen's")
    parser.add_argument("--output", type=Path, default=Path("runs/claim"))
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    request = parser.parse_intermixed_args(arguments)
    seeds = parse_seeds(request.seeds)
    family = load_config(request.config, request.settings).digits.family
    # The base and the loss of diversity without LOO-FID are claimed of the default alone.
    settings = _VARIANTS if family == "llamagen" else {FULL: ()}
    runs = {
        name: [
            SeededRun(
                Variant(name, of_variant, request.config),
                seed,
                request.output,
                tuple(request.settings),
            )
            for seed in seeds
        ]
        for name, of_variant in settings.items()
    }
    execute_all([run for of_variant in runs.values() for run in of_variant])
    summaries = {name: [run.summary() for run in of_variant] for name, of_variant in runs.items()}
    verdicts = judge_claim(summaries, family)
    _print(verdicts)
    content = {
        "seeds": seeds,
        "family": family,
        "verdicts": [vars(v) | {"value": v.value, "holds": v.holds} for v in verdicts],
    }
    (request.output / "claim.json").write_text(json.dumps(content, indent=2))
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _print(verdicts: Sequence[Verdict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("claim", "mean", "bar", "per seed", "holds", title="The claim, over all seeds")
    for verdict in verdicts:
        table.add_row(
            verdict.claim,
            f"{verdict.value:.3f}",
            f"{'>=' if verdict.is_at_least else '<='} {verdict.bar:.3f}",
            " ".join(f"{value:.3f}" for value in verdict.per_seed),
            "yes" if verdict.holds else "NO",
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(run_job(main))
