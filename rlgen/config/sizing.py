"""How many GPUs each role should have, from measured rates.

Owns the rates, where they come from, and the table that `--dry-run` prints. Must not import torch.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlgen.config.load import load_config
from rlgen.config.run import RunConfig
from rlgen.errors import ConfigError

ROLES = ("sampling", "scoring", "learning")
_BENCHMARKS = {"sample": "sampling", "learn": "learning"}
_TOTALS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
_WARM_UP_STEPS = 1
"""The first step of a run compiles, and fills caches."""


@dataclass(frozen=True)
class Rates:
    """Images per second of one process of a role on its device."""

    images_per_s: dict[str, float] = field(default_factory=dict)
    """By role: sampling, scoring, learning."""
    sources: dict[str, str] = field(default_factory=dict)
    """What each was read from, and on what it was measured."""

    @property
    def missing(self) -> list[str]:
        """Roles without a rate."""
        return [role for role in ROLES if role not in self.images_per_s]


@dataclass(frozen=True)
class Split:
    """Processes by role, one GPU each, and how long a step keeps each role busy."""

    counts: dict[str, int]
    seconds: dict[str, float]

    @property
    def longest_s(self) -> float:
        """Seconds of the role that is busy longest."""
        return max(self.seconds.values())


def load_rates(locations: Sequence[str]) -> Rates:
    """Read rates; a later source replaces what an earlier one says of the same role.

    Args:
        locations: JSON files, written by `bench sample` or `bench learn` or by hand
            ({"scoring": 40.0}), and folders of runs, which have measured all three.
    Raises:
        ConfigError: one can't be read, or holds no rates.
    """
    found, sources = dict[str, float](), dict[str, str]()
    for location in locations:
        rates, source = _run_rates(location) if Path(location).is_dir() else _file_rates(location)
        for role, rate in rates.items():
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0:
                raise ConfigError(
                    f"{location} gives {role} a rate of {rate!r}; it must be a positive number, in "
                    "images per second."
                )
            found[role], sources[role] = float(rate), source
    return Rates(found, sources)


def _file_rates(location: str) -> tuple[dict[str, Any], str]:
    try:
        told = json.loads(Path(location).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rates can't be read from {location} ({type(error).__name__}); give a JSON file of "
            "`bench sample` or `bench learn`, or a run's folder."
        ) from None
    told = told if isinstance(told, dict) else {}
    if told.get("benchmark") in _BENCHMARKS:
        words = [told.get(key) for key in ("model", "dtype", "device")]
        words += told.get("settings") or []
        source = f"{location} ({', '.join(str(word) for word in words if word)})"
        return {_BENCHMARKS[told["benchmark"]]: told.get("images_per_s")}, source
    if not told or told.keys() - set(ROLES):
        raise ConfigError(
            f"{location} holds {', '.join(map(str, told)) or 'nothing'}, and no rates; it must be "
            f"written by `bench sample` or `bench learn`, or name some of {', '.join(ROLES)} in "
            "images per second."
        )
    return told, location


def _run_rates(folder: str) -> tuple[dict[str, Any], str]:
    """Rates of one process of each role in a run; its first step doesn't count."""
    try:
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"rates can't be read from {folder} ({type(error).__name__}); give the folder of a run "
            "that has made some steps."
        ) from None
    steps = [row for row in rows if "time/scoring_s" in row][_WARM_UP_STEPS:]
    if not steps:
        raise ConfigError(f"{folder} has made too few steps to tell a rate; give one with two.")
    run = load_config(str(Path(folder) / "config.yaml"))
    keys = {"sampling": "time/sampling_s", "scoring": "time/scoring_s", "learning": "time/learn_s"}
    processes = {"sampling": 1, "scoring": 1, "learning": run.learner.num_workers}
    images = run.images_per_step * len(steps)
    rates = {r: images / (processes[r] * sum(s[key] for s in steps)) for r, key in keys.items()}
    return rates, f"{folder} ({len(steps)} steps)"


def split(config: RunConfig, rates: Rates, total: int) -> Split:
    """Share GPUs out so that the role that is busy longest is busy as short as possible.

    Learner ranks divide the conditions of a step, and no unit is cut, so some GPUs may be left
    over. Of equal splits the one with the fewest GPUs is taken.

    Args:
        config: the run.
        rates: of all roles.
        total: GPUs, at least one for each role.
    """
    candidates = [
        _timed(config, rates, {"sampling": s, "scoring": c, "learning": n})
        for n in _divisors(config.rollout.conditions_per_step)
        for s in range(1, min(config.num_units, total - n) + 1)
        for c in range(1, min(config.num_units, total - n - s) + 1)
    ]
    assert candidates, f"{total} GPUs are fewer than the roles"
    return min(candidates, key=lambda c: (round(c.longest_s, 9), sum(c.counts.values())))


def _timed(config: RunConfig, rates: Rates, counts: dict[str, int]) -> Split:
    """Busy seconds: whole units for samplers and scorers, equal parts for learners."""
    per_unit = config.images_per_step / config.num_units
    seconds = {
        role: -(-config.num_units // count) * per_unit / rates.images_per_s[role]
        for role, count in counts.items()
        if role != "learning"
    }
    learnt = config.images_per_step / counts["learning"] / rates.images_per_s["learning"]
    return Split(counts, seconds | {"learning": learnt})


def describe_sizing(config: RunConfig, rates: Rates) -> list[str]:
    """GPUs by role such that all are busy equally long; without rates, how to measure them."""
    if config.policy.model is None and not rates.images_per_s:
        return []
    if rates.missing:
        return ["", "GPUs by role", *_describe_missing(config, rates)]
    inverse = {role: 1 / rates.images_per_s[role] for role in ROLES}
    shares = ", ".join(f"{100 * inverse[r] / sum(inverse.values()):.0f} % {r}" for r in ROLES)
    lines = [
        "",
        "GPUs by role",
        *(
            f"  {role}: {rates.images_per_s[role]:.4g} images/s each, from {rates.sources[role]}"
            for role in ROLES
        ),
        f"  equally busy: {shares}",
        "  GPUs  sampling  scoring  learning  busy s a step",
    ]
    best: Split | None = None
    for total in _TOTALS:
        found = split(config, rates, total)
        if best is not None and found.longest_s >= best.longest_s * (1 - 1e-9):
            continue
        best = found
        counts, busy = found.counts, "  ".join(f"{found.seconds[r]:.3g}" for r in ROLES)
        lines.append(
            f"  {sum(counts.values()):4d}  {counts['sampling']:8d}  {counts['scoring']:7d}  "
            f"{counts['learning']:8d}  {busy}"
        )
    order = (
        "sampling and scoring overlap, and learning follows; with max_policy_lag of 1 or more "
        "it overlaps too"
        if config.max_policy_lag == 0
        else "all three overlap"
    )
    return [
        *lines,
        f"  {order}. A step has {config.num_units} units and "
        f"{config.rollout.conditions_per_step} conditions: no more GPUs than those can work.",
    ]


def _describe_missing(config: RunConfig, rates: Rates) -> list[str]:
    """The commands that measure what isn't known."""
    rollout, learner = config.rollout, config.learner
    per_unit = rollout.conditions_per_unit * rollout.group_size
    common = f"--model {config.policy.model} --cfg-scale {rollout.cfg_scale:g} --device cuda"
    cuts = f"--temperature {rollout.temperature:g} --top-k {rollout.top_k} --top-p {rollout.top_p}"
    lora = learner.lora
    settings = [
        f"grpo.kl_coef={config.grpo.kl_coef:g}",
        f"grpo.inner_epochs={config.grpo.inner_epochs}",
        f"learner.gradient_checkpointing={str(learner.gradient_checkpointing).lower()}",
    ]
    if lora is not None:
        settings.append(f"learner.lora.rank={lora.rank} learner.lora.alpha={lora.alpha:g}")
    per_rank = config.images_per_step // learner.num_workers
    micro = min(learner.micro_batch_size, per_rank)
    measured_by = {
        "sampling": f"python -m rlgen.jobs.bench sample {common} --batch {per_unit} "
        f"--dtype {rollout.dtype} {cuts} --json sample.json",
        "scoring": "a run's folder knows it, after two steps or more of any run with these rewards",
        "learning": f"python -m rlgen.jobs.bench learn {common} --batch {per_rank} "
        f"--micro-batch {micro} --dtype {learner.dtype} --json learn.json {' '.join(settings)}",
    }
    if config.policy.model is None:
        measured_by |= dict.fromkeys(("sampling", "learning"), measured_by["scoring"])
    return [
        "  measure the rates on one GPU of the cluster's kind, and give them to --dry-run by",
        "  --rates FILE or --rates RUN_FOLDER, as often as needed:",
        *(f"  {role}: {measured_by[role]}" for role in rates.missing),
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
