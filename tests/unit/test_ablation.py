"""The ablation: what it runs, what it does not run again, what it concludes, and its page."""

import json
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlgen.config.plan import check_trainable
from rlgen.errors import ConfigError, RlgenError
from rlgen.evaluation.grid import write_grid
from rlgen.jobs import ablation, grpo
from rlgen.jobs.ablation_findings import findings
from rlgen.jobs.ablation_page import markdown, page
from rlgen.jobs.ablation_plan import choose_experiments, experiments
from rlgen.jobs.variants import SeededRun, Variant, execute_all, parse_seeds
from tests.conftest import TINY_RUN

PRESET = str(Path(__file__).parents[2] / "jobs" / "digits_style.yaml")


def launch_here(arguments: Sequence[str], log: Path | None) -> int:
    """The main job in this process: an import less for each run."""
    return grpo.main(arguments)


def values(fid: float, recall: float, *, styled: float = 0.9, kept: float = 0.8) -> dict:
    before = {
        "judge_fid": 6.0,
        "judge_fid_best_cfg": 3.0,
        "best_cfg_scale": 1.5,
        "precision": 0.7,
        "recall": 0.94,
        "accuracy": 0.74,
        "clip": 0.6,
        "preference": 0.4,
        "images_per_s": 200.0,
        "images_per_s_cfg": 100.0,
        "rewards": {"styled": 0.02, "class_kept": 0.7, "styled_class": 0.01},
    }
    rewards = {"styled": styled, "class_kept": kept, "styled_class": styled * kept}
    after = before | {"judge_fid": fid, "recall": recall, "rewards": rewards}
    series = {"policy/entropy_normalized": [(1, 0.68), (2, 0.61)]}
    return {"before": before, "after": after, "wall_s": 60.0, "series": series}


def outcome(names: list[str], **runs: list[dict]) -> dict[str, str]:
    named = {name.replace("_", "-"): seeds for name, seeds in runs.items()}
    return {found.claim: found.outcome for found in findings(names, named)}


def test_every_variant_is_a_configuration_that_can_be_trained():
    seen = set()
    for experiment in experiments(PRESET).values():
        for variant in experiment.variants:
            config = SeededRun(variant, 3, Path("out"), ("runtime=local",)).resolved()
            check_trainable(config)
            assert (config.seed, config.digits.policy_seed) == (3, 3)
            seen.add((variant.name, json.dumps(config.model_dump(mode="json"), sort_keys=True)))
        for row in experiment.rows:
            assert row.variant in {variant.name for variant in experiment.variants}
    assert len({name for name, _ in seen}) == len(seen), "one name, one configuration"
    assert len({config for _, config in seen}) == len(seen), "no two variants are the same run"


def test_the_variants_differ_in_what_they_are_named_for():
    configs = {
        variant.name: SeededRun(variant, 0, Path("out")).resolved()
        for experiment in experiments(PRESET).values()
        for variant in experiment.variants
    }
    loo_fids = {name: config.reward.loo_fid for name, config in configs.items()}
    assert all(loo_fid is not None for loo_fid in loo_fids.values())
    without = {name for name, loo_fid in loo_fids.items() if loo_fid and loo_fid.weight == 0}
    assert without == {name for name in configs if "instance" in name}
    diagonal = {n for n, loo_fid in loo_fids.items() if loo_fid and loo_fid.covariance != "full"}
    assert diagonal == {"diagonal"}
    assert {n for n, c in configs.items() if c.entropy.base_coef > 0} == {
        "both-entropy",
        "instance-entropy",
    }
    weights = {s.weight for s in configs["distribution"].reward.active_scorers.values()}
    assert weights == {0.0}
    assert {n for n, c in configs.items() if c.digits.family == "var"} == {
        f"{style}-{kind}"
        for style in ("slanted", "thick", "inverted")
        for kind in ("instance", "both")
    }


def test_unknown_experiments_and_seeds_are_refused():
    with pytest.raises(ConfigError, match=r"colour is unknown; there are rewards, covariance"):
        choose_experiments("rewards,colour", PRESET)
    with pytest.raises(ConfigError, match="--styles bold is unknown; there are slanted, thick"):
        choose_experiments("style", PRESET, "bold")
    with pytest.raises(ConfigError, match="--seeds 0,a is no list"):
        parse_seeds("0,a")
    with pytest.raises(ConfigError, match="names a seed twice"):
        parse_seeds("0,1,0")
    assert [e.name for e in choose_experiments("style,rewards,style", PRESET)] == [
        "style",
        "rewards",
    ]


def test_a_claim_agrees_on_every_seed_contradicts_on_none_and_else_is_mixed():
    low, high = values(2.0, 0.94), values(7.0, 0.80)
    keeps = "Instance rewards alone narrow the samples; LOO-FID keeps them diverse"
    pairs = {"agrees": (low, low), "contradicts": (high, high), "mixed": (low, high)}
    for expected, both in pairs.items():
        found = outcome(
            ["rewards"], both=list(both), instance=[high, high], distribution=[low, low]
        )
        assert found[keeps] == expected
    guided = "Tuned, the policy without guidance is better than its base with guidance"
    assert outcome(["guidance"], both=[values(2.9, 0.9)])[guided] == "agrees"
    assert outcome(["guidance"], both=[values(3.1, 0.9)])[guided] == "contradicts"


@pytest.mark.parametrize(
    ("styled", "kept", "expected"),
    [(0.81, 0.75, "agrees"), (0.79, 0.9, "contradicts"), (0.99, 0.74, "contradicts")],
)
def test_a_style_counts_only_with_its_class(styled, kept, expected):
    run = [values(5.0, 0.5, styled=styled, kept=kept)]
    found = findings(["style"], {"slanted-instance": run, "slanted-both": run})
    assert [f.outcome for f in found if "a VAR to a style" in f.claim] == [expected, expected]


class TextOf(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(source)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)


def test_page_and_markdown_show_the_numbers_and_escape_text(tmp_path):
    [experiment] = choose_experiments("covariance", PRESET)
    runs = {"both": [values(2.0, 0.9), values(3.0, 0.9)], "diagonal": [values(4.0, 0.8)] * 2}
    found = findings(["covariance"], runs)
    table = [
        {
            "title": row.title,
            "variant": row.variant,
            "is_base": row.is_base,
            "values": {c.title: [c.measure(v) for v in runs[row.variant]] for c in row.columns},
            "forms": {c.title: c.form for c in row.columns},
        }
        for row in experiment.rows
    ]
    table[1]["title"] = "<script>alert(1)</script>"
    for step in (0, 120):
        images = np.full((4, 3, 16, 16), step, dtype=np.uint8)
        write_grid(tmp_path / f"grids/step_{step:05}.png", images, columns=2)
    facts = {
        "seeds": [0, 1],
        "settings": ["<b>"],
        "runs": 4,
        "runs_wall_s": 240.0,
        "jobs": 1,
        "cpus": 2,
        "machine": "x86_64",
    }
    folders = {"both": tmp_path, "diagonal": tmp_path}
    source = page([experiment], {"covariance": table}, found, facts, folders)
    read = TextOf(source)
    text = " ".join(read.words)
    assert "script" not in read.tags and "<script>alert(1)</script>" in text
    assert "2.50 ± 0.71" in text, "mean and standard deviation of the default's judge FID"
    assert "1.667 (2.000, 1.333)" in text, "diagonal / full on each seed"
    assert "contradicts" in text
    pictures = [part.split('"')[0] for part in source.split('src="')[1:]]
    assert len(pictures) == 3 and pictures[0] != pictures[1] == pictures[2], "base, two variants"
    written = markdown([experiment], {"covariance": table}, found, 2)
    assert "| full covariance (the default) | 2.50 ± 0.71 |" in written
    assert all(line.count("|") == 9 for line in written.splitlines() if "±" in line and "|" in line)


@pytest.fixture
def recorded_launch():
    """Writes what a run writes, and remembers what was started."""
    started: list[str] = []

    def launch(arguments: Sequence[str], log: Path | None) -> int:
        folder = Path(arguments[1])
        started.append(folder.name)
        if "fails" in folder.name:
            return 3
        if "slow" in folder.name:
            time.sleep(0.4)
        (folder / "summary.json").write_text(json.dumps({"seed": folder.name}))
        return 0

    return launch, started


def test_what_is_finished_is_not_run_again_and_what_broke_is(tmp_path, recorded_launch):
    launch, started = recorded_launch
    runs = [SeededRun(Variant("a"), seed, tmp_path) for seed in (0, 1)]
    execute_all(runs[:1], launch=launch)
    (runs[1].folder / "grids").mkdir(parents=True)
    (runs[1].folder / "request.json").write_text("{}")  # an attempt that was interrupted
    told: list[str] = []
    execute_all(runs, launch=launch, say=told.append)
    assert started == ["a-seed0", "a-seed1"]
    assert told[0] == "1 of 2 runs are finished already"
    assert not (runs[1].folder / "grids").exists(), "its leavings are gone"
    execute_all(runs, launch=launch)
    assert len(started) == 2


def test_a_result_of_other_settings_is_refused_before_anything_starts(tmp_path, recorded_launch):
    launch, started = recorded_launch
    execute_all([SeededRun(Variant("a"), 0, tmp_path)], launch=launch)
    longer = SeededRun(Variant("a", ("steps=7",)), 0, tmp_path)
    with pytest.raises(ConfigError, match=r"a-seed0 holds a run with other settings.*steps=7"):
        execute_all([SeededRun(Variant("b"), 0, tmp_path), longer], launch=launch)
    assert started == ["a-seed0"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failed_run_stops_the_rest_and_names_its_log(tmp_path, recorded_launch, jobs):
    launch, started = recorded_launch
    runs = [SeededRun(Variant("fails"), 0, tmp_path)]
    runs += [SeededRun(Variant(f"slow{i}"), 0, tmp_path) for i in range(4)]
    with pytest.raises(RlgenError, match=r"fails-seed0 ended with status 3; see .*log\.txt"):
        execute_all(runs, jobs=jobs, launch=launch, logs=True)
    assert len(started) <= jobs


def test_reduced_form_of_the_command(tmp_path, cache_folder, capsys):
    """Real runs of the main job, from nothing to the page, and none of them a second time."""
    output = tmp_path / "ablation"
    arguments = [
        *("--seeds", "0", "--experiment", "covariance,style", "--output", str(output)),
        *("--style-config", PRESET, "--styles", "slanted"),
        *TINY_RUN,
        *("digits.tokenizer_steps=40", "digits.feature_steps=30", "digits.policy_steps=30"),
        *("digits.augmentations=1", "digits.policy_layers=1", "digits.preference_steps=5"),
        *("steps=2", "evaluation.cfg_scales=[]"),
    ]
    assert ablation.main(arguments, launch=launch_here) == 0
    content = json.loads((output / "ablation.json").read_text())
    assert content["facts"]["runs"] == 4
    diagonal = content["variants"]["diagonal"]["seeds"][0]
    [_, row, _] = content["experiments"]["covariance"]
    assert row["values"]["judge FID"] == [diagonal["after"]["judge_fid"]]
    style = {row["title"]: row["values"] for row in content["experiments"]["style"]}
    assert list(style) == [
        "slanted: base",
        "slanted: prompt alone",
        "slanted: prompt + LOO-FID",
    ]
    before = [s["seeds"][0]["before"] for n, s in content["variants"].items() if "slanted" in n]
    assert before[0]["rewards"] == before[1]["rewards"], "one base, one judge, one noise"
    assert style["slanted: base"]["styled"] == [before[0]["rewards"]["styled"]]
    text = (output / "ablation.html").read_text()
    assert text.count("data:image/png;base64,") == 6
    written = (output / "diagonal-seed0" / "summary.json").stat().st_mtime_ns
    assert ablation.main(arguments, launch=launch_here) == 0
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    assert (output / "diagonal-seed0" / "summary.json").stat().st_mtime_ns == written
