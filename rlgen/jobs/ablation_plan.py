"""What the ablation runs and why: its experiments, their variants, and which numbers they report.

Owns the questions. Must not run anything.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlgen.errors import ConfigError
from rlgen.jobs.variants import Variant

ENTROPY = ("entropy.base_coef=0.01", "entropy.target=0.68")
"""Adaptive entropy towards the base's own normalised entropy. With instance rewards alone this
coefficient held it on seed 10; 0.03 drove it up to 0.84, and the judge FID with it."""
STYLES = ("slanted", "thick", "inverted")

Values = Mapping[str, Any]
"""What a finished run left: its summary, with `series` of metrics by step."""
Measure = Callable[[Values], float | None]


@dataclass(frozen=True)
class Column:
    """One number of a run."""

    title: str
    measure: Measure
    form: str = ".2f"


@dataclass(frozen=True)
class Row:
    """One line of a table: a variant, after its run or before it."""

    title: str
    variant: str
    columns: tuple[Column, ...]
    is_base: bool = False
    """Whether it tells of the policy before the run."""


@dataclass(frozen=True)
class Experiment:
    """A question with the runs that answer it."""

    name: str
    question: str
    variants: tuple[Variant, ...]
    rows: tuple[Row, ...]
    note: str = ""


def _of(side: str, key: str) -> Measure:
    return lambda values: values[side][key]


def _reward(side: str, name: str) -> Measure:
    return lambda values: values[side]["rewards"].get(name)


def entropy_at(values: Values, position: int) -> float | None:
    """Normalised entropy of the policy at the first (0) or the last (-1) step."""
    points = values["series"].get("policy/entropy_normalized")
    return points[position][1] if points else None


def _columns(side: str) -> tuple[Column, ...]:
    position = 0 if side == "before" else -1
    return (
        Column("judge FID", _of(side, "judge_fid")),
        Column("precision", _of(side, "precision"), ".3f"),
        Column("recall", _of(side, "recall"), ".3f"),
        Column("class right", _of(side, "accuracy"), ".3f"),
        Column("CLIP", _of(side, "clip"), ".3f"),
        Column("preference", _of(side, "preference"), ".3f"),
        Column("entropy H / ln V", lambda values: entropy_at(values, position), ".3f"),
    )


def _guidance_columns(side: str) -> tuple[Column, ...]:
    return (
        Column("judge FID, no guidance", _of(side, "judge_fid")),
        Column("judge FID, best guidance", _of(side, "judge_fid_best_cfg")),
        Column("best scale", _of(side, "best_cfg_scale"), ".2f"),
        Column("recall, no guidance", _of(side, "recall"), ".3f"),
        Column(
            "images/s, no / best guidance",
            lambda values: values[side]["images_per_s"] / values[side]["images_per_s_cfg"],
        ),
    )


def _style_columns(side: str) -> tuple[Column, ...]:
    return (
        Column("styled", _reward(side, "styled"), ".3f"),
        Column("class right", _reward(side, "class_kept"), ".3f"),
        Column("both right", _reward(side, "styled_class"), ".3f"),
        Column("judge FID to the style", _of(side, "judge_fid")),
        Column("recall of the style", _of(side, "recall"), ".3f"),
        Column("precision of the style", _of(side, "precision"), ".3f"),
    )


ENDS_ONLY = ("evaluation.every_steps=0", "guard.every=0")
"""The tables compare the ends of runs alone."""
_NO_SWEEP = (*ENDS_ONLY, "evaluation.cfg_scales=[]")

BOTH = Variant("both", ENDS_ONLY)
INSTANCE = Variant("instance", ("reward.loo_fid.weight=0", *_NO_SWEEP))
DISTRIBUTION = Variant(
    "distribution",
    ("reward.scorers.clip.weight=0", "reward.scorers.preference.weight=0", *_NO_SWEEP),
)
DIAGONAL = Variant("diagonal", ("reward.loo_fid.covariance=diagonal", *_NO_SWEEP))
BOTH_ENTROPY = Variant("both-entropy", (*ENTROPY, *_NO_SWEEP))
INSTANCE_ENTROPY = Variant("instance-entropy", ("reward.loo_fid.weight=0", *ENTROPY, *_NO_SWEEP))


def _table(*rows: tuple[str, Variant]) -> tuple[Row, ...]:
    base = Row("base", rows[0][1].name, _columns("before"), is_base=True)
    return (base, *(Row(title, variant.name, _columns("after")) for title, variant in rows))


def style_settings(style: str) -> tuple[str, ...]:
    """Settings that turn the style preset, which asks for slanted digits, to another style."""
    article = "an" if style == "inverted" else "a"
    prompts = [
        f"reward.scorers.{name}.prompt={article} {style} {{class}}"
        for name in ("clip", "preference")
    ]
    judges = [
        f"reward.scorers.{name}.arguments.style={style}"
        for name in ("styled", "class_kept", "styled_class")
    ]
    return (f"digits.style={style}", *prompts, *judges)


def _style(config: str, styles: Sequence[str]) -> Experiment:
    def variant(style: str, *, with_loo_fid: bool) -> Variant:
        name = f"{style}-both" if with_loo_fid else f"{style}-instance"
        weight = () if with_loo_fid else ("reward.loo_fid.weight=0",)
        return Variant(name, (*style_settings(style), *weight, *_NO_SWEEP), config)

    variants, rows = [], []
    for style in styles:
        alone, both = variant(style, with_loo_fid=False), variant(style, with_loo_fid=True)
        variants += [alone, both]
        rows += [
            Row(f"{style}: base", both.name, _style_columns("before"), is_base=True),
            Row(f"{style}: prompt alone", alone.name, _style_columns("after")),
            Row(f"{style}: prompt + LOO-FID", both.name, _style_columns("after")),
        ]
    return Experiment(
        "style",
        "Does a VAR that never saw a style learn it from a prompt, and what does LOO-FID add?",
        tuple(variants),
        tuple(rows),
        "The base policy was pretrained on plain digits alone. Shares are those of a net that "
        "predicts class and style and that no reward uses; judge FID and recall are against real "
        "digits of the style. LOO-FID's reference are real digits of the style too.",
    )


def experiments(style_config: str, styles: Sequence[str] = STYLES) -> dict[str, Experiment]:
    """All experiments by name.

    Args:
        style_config: YAML file of the style preset.
        styles: those that the style experiment asks for.
    """
    both = ("instance and distribution (the default)", BOTH)
    alone = ("instance only", INSTANCE)
    listed = (
        Experiment(
            "rewards",
            "What do instance rewards (CLIP, preference) and the distribution reward (LOO-FID) do "
            "alone, and what together?",
            (BOTH, INSTANCE, DISTRIBUTION),
            _table(alone, ("distribution only", DISTRIBUTION), both),
        ),
        Experiment(
            "covariance",
            "Is the published diagonal form of LOO-FID as good as the full covariance?",
            (BOTH, DIAGONAL),
            _table(("diagonal covariance", DIAGONAL), ("full covariance (the default)", BOTH)),
            "The judge FID is taken with the full covariance in both rows.",
        ),
        Experiment(
            "entropy",
            "Does an adaptive entropy bonus keep diversity?",
            (BOTH, BOTH_ENTROPY, INSTANCE, INSTANCE_ENTROPY),
            _table(
                alone,
                ("instance only, adaptive entropy", INSTANCE_ENTROPY),
                both,
                ("both rewards, adaptive entropy", BOTH_ENTROPY),
            ),
            f"The bonus: {', '.join(ENTROPY)}.",
        ),
        Experiment(
            "guidance",
            "Does the tuned policy without guidance beat its base with the best guidance?",
            (BOTH,),
            (
                Row("base", BOTH.name, _guidance_columns("before"), is_base=True),
                Row("after GRPO", BOTH.name, _guidance_columns("after")),
            ),
            "The base's best guidance is the best judge FID over evaluation.cfg_scales.",
        ),
        _style(style_config, styles),
    )
    return {experiment.name: experiment for experiment in listed}


def choose_experiments(
    names: str | None, style_config: str, styles: str | None = None
) -> list[Experiment]:
    """Read comma-separated lists of experiments and styles; None takes all.

    Raises:
        ConfigError: a name is unknown.
    """
    known = experiments(style_config, _chosen(styles, STYLES, "--styles"))
    return [known[name] for name in _chosen(names, tuple(known), "--experiment")]


def _chosen(names: str | None, known: Sequence[str], option: str) -> list[str]:
    wanted = list(known) if names is None else names.split(",")
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ConfigError(f"{option} {','.join(unknown)} is unknown; there are {', '.join(known)}.")
    return list(dict.fromkeys(wanted))
